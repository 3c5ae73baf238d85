#include "runtime.h"

#include <cstdlib>

#if defined(__unix__)
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rewire {
int64_t cache_bytes() {
  static const int64_t bytes = [] {
    const char* variable = std::getenv("REWIRE_CACHE_BYTES");
    long found = variable == nullptr ? 0 : std::atol(variable);
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (found <= 0) found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found > 0 ? static_cast<int64_t>(found) : int64_t{1} << 20;
  }();
  return bytes;
}

void want_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  // So large that the memory goes back to the system when it is freed: the wish would stay with it
  // otherwise, for others.
  if (bytes < int64_t{64} << 20) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (at + kPage - 1) / kPage * kPage,
                  end = (at + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

Tensor empty_strided(const Tensor& like, std::initializer_list<int64_t> sizes,
                     std::initializer_list<int64_t> strides) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                  strides.begin(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_1d(int64_t length, ScalarType type) {
  const int32_t dtype = type == ScalarType::Long     ? aoti_torch_dtype_int64()
                        : type == ScalarType::Double ? aoti_torch_dtype_float64()
                        : type == ScalarType::Float  ? aoti_torch_dtype_float32()
                                                     : aoti_torch_dtype_int8();
  const int64_t stride = 1;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &length, &stride, dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Integers as_integers(const Tensor& t, const char* op) {
  require_cpu(t, op);
  require(t.dim() == 1, op, "lists of integers must have one dimension");
  Integers result{packed(t), {}, nullptr, t.numel()};
  if (index_type(t, op) == kInt64) {
    result.data = static_cast<const int64_t*>(result.kept.const_data_ptr());
  } else {
    const int32_t* from = static_cast<const int32_t*>(result.kept.const_data_ptr());
    result.converted.assign(from, from + result.count);
    result.data = result.converted.data();
  }
  return result;
}

Integers own_integers(const Tensor& t, const char* op) {
  Integers result = as_integers(t, op);
  if (result.converted.empty()) result.converted.assign(result.data, result.data + result.count);
  result.data = result.converted.data();
  return result;
}

}  // namespace rewire
