// DEEP R's pass over a pool: noise, L1 and the sign test.
#include "random/kernels.h"
#include "random/walk.h"

namespace rewire {

constexpr int64_t kPiece = 64 * kLangevinGrain;  // slots at once

Tensor walk(const Tensor& values, const Tensor& rows_, const Tensor& signs_, bool full,
            const Diffusion& by, const char* op) {
  for (const Tensor* t : {&values, &rows_, &signs_}) {
    require_cpu(*t, op);
    require(t->dim() == 1, op, "values, rows and signs must have one dimension");
    require(t->numel() == values.numel(), op, "values, rows and signs must have the same length");
  }
  require(values.is_contiguous(), op, "values must be contiguous");
  require(signs_.scalar_type() == ScalarType::Char, op, "signs must be int8");
  const Tensor rows = packed(rows_), signs = packed(signs_);
  const auto kernel = random_kernels().langevin[element_type(values, op)][index_type(rows, op)];

  const int64_t slots = values.numel();
  std::vector<uint64_t> dropped(static_cast<size_t>((slots + 63) / 64));
  const LangevinArgs args{values.mutable_data_ptr(),
                          full ? nullptr : rows.const_data_ptr(),
                          static_cast<const int8_t*>(signs.const_data_ptr()),
                          dropped.data(),
                          by.shrink,
                          by.noise,
                          by.seed,
                          by.step,
                          by.stream};
  for_each_item((slots + kPiece - 1) / kPiece, slots < 4 * kPiece, [&](int64_t item) {
    kernel(args, item * kPiece, std::min(slots, (item + 1) * kPiece));
  });

  const int64_t words = static_cast<int64_t>(dropped.size()),
                count = random_kernels().list_bits(dropped.data(), words, nullptr);
  std::vector<int64_t> found(static_cast<size_t>(count) + kBitsAtOnce);
  random_kernels().list_bits(dropped.data(), words, found.data());
  Tensor result = empty_1d(count, ScalarType::Long);
  std::copy(found.data(), found.data() + count, static_cast<int64_t*>(result.mutable_data_ptr()));
  return result;
}

namespace {

Tensor langevin_step_(const Tensor& values, const Tensor& rows, const Tensor& signs, double shrink,
                      double noise, int64_t seed, int64_t step, int64_t stream) {
  const Diffusion by{shrink, noise, static_cast<uint64_t>(seed), static_cast<uint32_t>(step),
                     static_cast<uint32_t>(stream)};
  return walk(values, rows, signs, false, by, "langevin_step_");
}

void add_normal_(const Tensor& values, double scale, int64_t seed, int64_t step, int64_t stream) {
  const char* op = "add_normal_";
  require_cpu(values, op);
  require(values.dim() == 1 && values.is_contiguous(), op, "values must be a contiguous list");
  const auto kernel = random_kernels().add_normals[element_type(values, op)];
  void* data = values.mutable_data_ptr();
  const int64_t n = values.numel();
  for_each_item((n + kPiece - 1) / kPiece, n < 4 * kPiece, [&](int64_t item) {
    kernel(data, scale, static_cast<uint64_t>(seed), static_cast<uint32_t>(step),
           static_cast<uint32_t>(stream), item * kPiece, std::min(n, (item + 1) * kPiece));
  });
}

}  // namespace

REWIRE_OPERATOR(add_normal_,
                "(Tensor(a!) values, float scale, int seed, int step, int stream) -> ()")
REWIRE_OPERATOR(langevin_step_,
                "(Tensor(a!) values, Tensor rows, Tensor signs, float shrink, float noise, int "
                "seed, int step, int stream) -> Tensor")

}  // namespace rewire
