// What kernels and the code that calls them share.
//
// Kernels are compiled once per instruction set and must not instantiate inline functions of the
// standard library (the linker might keep the AVX-512 copy for everybody), so the headers they
// include hold plain data only.
#pragma once

#include <cstdint>

// Static and always inlined: no copy compiled for one instruction set may serve another.
#define REWIRE_STATIC static inline __attribute__((always_inline))

namespace rewire {

enum Status : int { kFine = 0, kBadPointer = 1, kBadIndex = 2, kBadSlot = 3 };

constexpr int kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kInt32 = 0, kInt64 = 1;
// Accumulators held in registers by one pass over a row. (Under sanitizers half as many: the same
// code for fewer of them, of which a fraction has to be built.)
#if defined(__SANITIZE_ADDRESS__)
constexpr int kVectorsPerBlock = 4;
#else
constexpr int kVectorsPerBlock = 8;
#endif

}  // namespace rewire
