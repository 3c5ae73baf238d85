// The vector kernels of products; compiled once per instruction set by product/kernels.cpp.

namespace {

#include "simd/vectors-inl.h"

#include "simd/narrow-inl.h"

#include "product/panel-inl.h"

#include "product/walk-inl.h"

}  // namespace

#define REWIRE_WALK(T, P, I, ordered) \
  {walk<T, P, I, ordered, kSums>, walk<T, P, I, ordered, kDots>, walk<T, P, I, ordered, kBoth>}

const ProductKernels kProducts = {
    {REWIRE_VECTOR_BYTES / 4, REWIRE_VECTOR_BYTES / 8, REWIRE_VECTOR_BYTES / 4,
     REWIRE_VECTOR_BYTES / 4},
    kMostVectors,
    {{REWIRE_WALK(float, int32_t, int32_t, false), REWIRE_WALK(float, int64_t, int64_t, false)},
     {REWIRE_WALK(double, int32_t, int32_t, false), REWIRE_WALK(double, int64_t, int64_t, false)}},
    {{REWIRE_WALK(float, int32_t, int32_t, true), REWIRE_WALK(float, int64_t, int32_t, true)},
     {REWIRE_WALK(double, int32_t, int32_t, true), REWIRE_WALK(double, int64_t, int32_t, true)}},
    {pack<float>, pack<double>, pack<BFloat16>, pack<Float16>},
    {unpack<float>, unpack<double>, unpack<BFloat16>, unpack<Float16>},
    {widen<BFloat16>, widen<Float16>},
};
#undef REWIRE_WALK
