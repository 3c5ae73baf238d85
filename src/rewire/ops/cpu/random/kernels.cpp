#include "random/kernels.h"

#define REWIRE_KERNELS "random/kernels-inl.h"
#include "simd/each_target.h"

const rewire::RandomKernels& rewire::random_kernels() { return REWIRE_BEST(kRandom); }
