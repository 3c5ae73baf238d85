// Kernels for x86-64 with avx2, fma, f16c; only called where the processor has them.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define REWIRE_ISA avx2
#define REWIRE_HAS_F16C
#define REWIRE_REGISTER "+x"
#define REWIRE_VECTOR_BYTES 32
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
