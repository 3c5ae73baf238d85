// Feature-major and batch-major copies of a (batch, features) tensor.
#include "product/kernels.h"
#include "runtime.h"

namespace rewire {
namespace {

// dst[r, c] = src[r * row_step + c * col_step] for a contiguous (rows, cols) dst.
void copy_rows(int type, const void* src, void* dst, int64_t rows, int64_t cols, int64_t row_step,
               int64_t col_step) {
  constexpr int64_t kRows = 64;  // a multiple of every vector length
  const CopyArgs args{src, dst, cols, cols, row_step, col_step};
  const int64_t items = std::max<int64_t>(1, rows / kRows);
  const auto copy = product_kernels().copy[type];
  for_each_item(items, rows * cols < kSerialWork / 4, [&](int64_t item) {
    // The last item takes the rest too, so that none is narrower than a vector.
    copy(args, item * kRows, item + 1 == items ? rows : (item + 1) * kRows);
  });
}

void require_matrix(const Tensor& x, const char* op, const char* name) {
  require_cpu(x, op);
  if (x.dim() != 2) fail(op, std::string(name) + " must have two dimensions, batch and features");
}

}  // namespace

Tensor feature_major(const Tensor& x) {
  require_matrix(x, "feature_major", "x");
  const int type = any_element_type(x, "feature_major");
  const int64_t batch = x.size(0), features = x.size(1);
  Tensor y = empty_strided(x, {batch, features}, {1, batch});
  copy_rows(type, x.const_data_ptr(), y.mutable_data_ptr(), features, batch, x.stride(1),
            x.stride(0));
  return y;
}

Tensor batch_major(const Tensor& x) {
  require_matrix(x, "batch_major", "x");
  const int type = any_element_type(x, "batch_major");
  const int64_t batch = x.size(0), features = x.size(1);
  Tensor y = empty_strided(x, {batch, features}, {features, 1});
  copy_rows(type, x.const_data_ptr(), y.mutable_data_ptr(), batch, features, x.stride(0),
            x.stride(1));
  return y;
}

Matrix as_matrix(const Tensor& x, const char* op, const char* name) {
  require_matrix(x, op, name);
  return {static_cast<const char*>(x.const_data_ptr()), x.size(0), x.size(1), x.stride(0),
          x.stride(1)};
}

Runs as_runs(const Tensor& x, const char* op, const char* name) {
  require_matrix(x, op, name);
  const int64_t batch = x.size(0), features = x.size(1);
  if (batch == 1 || x.stride(0) == 1) return {x, x.const_data_ptr(), batch, features, x.stride(1)};
  Tensor copy = feature_major(x);
  return {copy, copy.const_data_ptr(), batch, features, batch};
}

REWIRE_OPERATOR(feature_major, "(Tensor x) -> Tensor")
REWIRE_OPERATOR(batch_major, "(Tensor x) -> Tensor")

}  // namespace rewire
