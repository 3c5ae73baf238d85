// Compiles a file of kernels once per instruction set: the one place that names them, beside
// simd/target.h.
//
//   #define REWIRE_KERNELS "conv/kernels-inl.h"
//   #include "simd/each_target.h"
//
// includes conv/kernels-inl.h in namespaces rewire::portable, rewire::avx2 and rewire::avx512.
// There, REWIRE_VECTOR_BYTES is the length of a vector and REWIRE_HAS_AVX2 says that intrinsics may
// be used. Afterwards REWIRE_BEST(name) is the variable of this name from the namespace that suits
// the machine.
//
// Kernels that take minutes to build have a source file for each instruction set, so that they are
// built side by side: REWIRE_ONLY, defined before, says which one a file is for, and
// REWIRE_EACH_TARGET declares the variable where REWIRE_BEST is used.
#include "simd/target.h"
#include "simd/types.h"

#define REWIRE_PORTABLE 1
#define REWIRE_AVX2 2
#define REWIRE_AVX512 4
#if !defined(REWIRE_ONLY)
#define REWIRE_ONLY (REWIRE_PORTABLE | REWIRE_AVX2 | REWIRE_AVX512)
#endif

#if REWIRE_ONLY & REWIRE_PORTABLE
// What the compiler targets by default: SSE2 on x86-64, NEON on aarch64.
#define REWIRE_VECTOR_BYTES 16
namespace rewire::portable {
#include REWIRE_KERNELS
}  // namespace rewire::portable
#undef REWIRE_VECTOR_BYTES
#endif

#if defined(__x86_64__)
#include <immintrin.h>

#define REWIRE_HAS_AVX2

#if REWIRE_ONLY & REWIRE_AVX2
#define REWIRE_VECTOR_BYTES 32
#define REWIRE_REGISTER "+x"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace rewire::avx2 {
#include REWIRE_KERNELS
}  // namespace rewire::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef REWIRE_REGISTER
#undef REWIRE_VECTOR_BYTES
#endif

#if REWIRE_ONLY & REWIRE_AVX512
#define REWIRE_VECTOR_BYTES 64
#define REWIRE_REGISTER "+v"
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl")
#endif
namespace rewire::avx512 {
#include REWIRE_KERNELS
}  // namespace rewire::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef REWIRE_REGISTER
#undef REWIRE_VECTOR_BYTES
#endif

#undef REWIRE_HAS_AVX2
#endif
