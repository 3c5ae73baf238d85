#include "conv/kernels.h"

#define REWIRE_KERNELS "conv/kernels-inl.h"
#include "simd/each_target.h"

const rewire::ConvKernels& rewire::conv_kernels() { return REWIRE_BEST(kConvolutions); }
