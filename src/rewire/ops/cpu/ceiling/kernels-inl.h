// Multiply-adds and nothing else; compiled once per instruction set by ceiling/ceiling.cpp.

namespace {

#include "simd/vectors-inl.h"

// Sums that do not wait for each other: two units that take four or five cycles for a multiply-add
// need ten, and sixteen registers hold them beside a factor.
constexpr int kSums = 12;
constexpr int kLanes = REWIRE_VECTOR_BYTES / 4;
using Vector = Vec<float, kLanes>;

REWIRE_INLINE float total(const Vector* sums) {
  float result = 0.0f;
  for (int k = 0; k < kSums; ++k)
    for (int j = 0; j < kLanes; ++j) result += sums[k][j];
  return result;
}

// Adds factor * x[i] to the sums, for all n numbers (a multiple of kBlock), `passes` times.
float from_memory(const float* x, int64_t n, int64_t passes) {
  Vector sums[kSums] = {}, factor = Vector{} + 0.5f;
  for (int64_t pass = 0; pass < passes; ++pass) {
    keep(factor);  // each pass reads again
    for (int64_t i = 0; i < n; i += kSums * kLanes)
      for (int k = 0; k < kSums; ++k) sums[k] += factor * load<Vector>(x + i + k * kLanes);
  }
  return total(sums);
}

// As many multiply-adds of numbers in registers; they tend to 2.
float in_registers(const float*, int64_t n, int64_t passes) {
  Vector sums[kSums] = {}, factor = Vector{} + 0.5f, more = Vector{} + 1.0f;
  for (int64_t pass = 0; pass < passes; ++pass) {
    keep(factor);
    for (int64_t i = 0; i < n; i += kSums * kLanes)
      for (int k = 0; k < kSums; ++k) sums[k] = sums[k] * factor + more;
  }
  return total(sums);
}

static_assert(kBlock % (kSums * kLanes) == 0);
const CeilingKernels kCeiling = {from_memory, in_registers};

}  // namespace
