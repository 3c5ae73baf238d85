// The vector kernels of index lists; compiled once per instruction set by pool/kernels.cpp.

namespace {

#include "simd/vectors-inl.h"

#include "pool/merge-inl.h"

#include "pool/dormant-inl.h"

}  // namespace

const PoolKernels kPools = {{merge<int32_t>, merge<int64_t>}, {dormant<int32_t>, dormant<int64_t>}};
