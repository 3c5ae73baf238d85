#include "product/kernels.h"

#define REWIRE_KERNELS "product/kernels-inl.h"
#define REWIRE_ONLY REWIRE_AVX2
#include "simd/each_target.h"
