// How many multiply-adds this machine can do: what `rewire bench` holds the products against.
#include <vector>

#include "runtime.h"

namespace rewire {
namespace {

// Of the instruction set with the longest vectors: 12 of 16 numbers.
constexpr int64_t kBlock = 192;
// Multiply-adds of one call: some ten seconds.
constexpr int64_t kMost = int64_t{1} << 36;

struct CeilingKernels {
  float (*from_memory)(const float* x, int64_t n, int64_t passes);
  float (*in_registers)(const float* x, int64_t n, int64_t passes);
};

}  // namespace
}  // namespace rewire

#define REWIRE_KERNELS "ceiling/kernels-inl.h"
#include "simd/each_target.h"

namespace rewire {
namespace {

// Each row of x is read by one thread, `passes` times; returns a sum, so that nothing is left out.
double multiply_adds(Tensor x, int64_t passes, bool from_memory) {
  const char* op = "multiply_adds";
  require_cpu(x, op);
  require(x.dim() == 2 && x.scalar_type() == ScalarType::Float, op,
          "x must be a matrix of float32 numbers");
  require(x.size(1) % kBlock == 0, op, "rows must be a multiple of 192 numbers long");
  const int64_t rows = x.size(0), n = x.size(1);
  require(passes >= 0 && passes <= kMost / std::max<int64_t>(rows * n, 1), op,
          "the numbers times the passes must be from 0 to 2^36");
  const Tensor kept = packed(x);
  const float* data = static_cast<const float*>(kept.const_data_ptr());
  const auto& kernels = REWIRE_BEST(kCeiling);
  const auto kernel = from_memory ? kernels.from_memory : kernels.in_registers;
  std::vector<float> sums(static_cast<size_t>(rows));
  for_each_item(rows, false, [&](int64_t row) {
    sums[static_cast<size_t>(row)] = kernel(data + row * n, n, passes);
  });
  double result = 0.0;
  for (const float sum : sums) result += sum;
  return result;
}

}  // namespace

REWIRE_OPERATOR(multiply_adds, "(Tensor x, int passes, bool from_memory) -> float")

}  // namespace rewire
