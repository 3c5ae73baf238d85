#include "product/kernels.h"

#define REWIRE_KERNELS "product/kernels-inl.h"
#include "simd/each_target.h"

const rewire::ProductKernels& rewire::product_kernels() { return REWIRE_BEST(kProducts); }
