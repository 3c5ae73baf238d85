#include "frozen/kernels.h"

#define REWIRE_KERNELS "frozen/kernels-inl.h"
#include "simd/each_target.h"

const rewire::FrozenKernels& rewire::frozen_kernels() { return REWIRE_BEST(kFrozen); }
