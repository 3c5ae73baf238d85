// DEEP R's pass over a pool: noise, L1 and the sign test.
#include "runtime.h"

namespace rewire {
namespace {

Tensor langevin_step_(const Tensor& values, const Tensor& rows_, const Tensor& signs_, double shrink, double noise,
                      int64_t seed, int64_t step, int64_t stream) {
  const char* op = "langevin_step_";
  for (const Tensor* t : {&values, &rows_, &signs_}) {
    require_cpu(*t, op);
    require(t->dim() == 1, op, "values, rows and signs must have one dimension");
    require(t->numel() == values.numel(), op, "values, rows and signs must have the same length");
  }
  require(values.is_contiguous(), op, "values must be contiguous");
  require(signs_.scalar_type() == ScalarType::Char, op, "signs must be int8");
  const Tensor rows = packed(rows_), signs = packed(signs_);
  const auto kernel = kernels().langevin[element_type(values, op)][index_type(rows, op)];

  const int64_t slots = values.numel();
  std::vector<uint64_t> dropped(static_cast<size_t>((slots + 63) / 64));
  const LangevinArgs args{values.mutable_data_ptr(), rows.const_data_ptr(),
                          static_cast<const int8_t*>(signs.const_data_ptr()), dropped.data(), shrink, noise,
                          static_cast<uint64_t>(seed), static_cast<uint32_t>(step), static_cast<uint32_t>(stream)};
  constexpr int64_t kPiece = 64 * kLangevinGrain;
  for_each_item((slots + kPiece - 1) / kPiece, slots < 4 * kPiece, [&](int64_t item) {
    kernel(args, item * kPiece, std::min(slots, (item + 1) * kPiece));
  });

  int64_t count = 0;
  for (uint64_t word : dropped) count += __builtin_popcountll(word);
  Tensor result = empty_1d(count, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(result.mutable_data_ptr());
  for (size_t w = 0; w < dropped.size(); ++w)
    for (uint64_t word = dropped[w]; word != 0; word &= word - 1)
      *out++ = static_cast<int64_t>(w) * 64 + __builtin_ctzll(word);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rewire, m) {
  m.def(
      "langevin_step_(Tensor(a!) values, Tensor rows, Tensor signs, float shrink, float noise, int seed, int step, "
      "int stream) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rewire, CPU, m) { m.impl("langevin_step_", TORCH_BOX(&langevin_step_)); }

}  // namespace rewire
