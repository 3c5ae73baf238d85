// What the drivers (langevin.cpp, sampling.cpp, pool/regrow.cpp) ask of the vector kernels that
// draw numbers.
#pragma once

#include "simd/types.h"

namespace rewire {

// theta <- theta - shrink + noise * nu over slots; see rewire/ops/langevin.py.
struct LangevinArgs {
  void* values;
  const void* rows;  // null where no slot is empty
  const int8_t* signs;
  uint64_t* dropped;  // one bit per slot
  double shrink, noise;
  uint64_t seed;
  uint32_t step, stream;
};
constexpr int kBitsAtOnce = 2;
constexpr int64_t kLangevinGrain = 128;  // ranges of slots start at multiples of this

struct RandomKernels {
  void (*langevin[2][2])(const LangevinArgs&, int64_t begin, int64_t end);
  // random.bits of the numbers first, first + 1, ... (the lower 63 of 64 bits);
  // topology.position_signs.
  void (*random_bits)(uint64_t seed, uint32_t step, uint32_t stream, int64_t first, int64_t n,
                      int64_t* out);
  void (*position_signs)(const int64_t* rows, const int64_t* cols, int64_t n, uint64_t seed,
                         uint32_t stream, int8_t* out);
  int64_t (*list_bits)(const uint64_t* words, int64_t n, int64_t* out);
  void (*add_normals[2])(void* values, double scale, uint64_t seed, uint32_t step, uint32_t stream,
                         int64_t begin, int64_t end);
};

// Of the instruction set in use.
const RandomKernels& random_kernels();

}  // namespace rewire
