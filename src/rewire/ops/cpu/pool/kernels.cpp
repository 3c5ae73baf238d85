#include "pool/kernels.h"

#define REWIRE_KERNELS "pool/kernels-inl.h"
#include "simd/each_target.h"

const rewire::PoolKernels& rewire::pool_kernels() { return REWIRE_BEST(kPools); }
