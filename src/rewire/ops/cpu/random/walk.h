// The random walk of DEEP R; see rewire/ops/langevin.py.
#pragma once

#include "runtime.h"

namespace rewire {

struct Diffusion {
  double shrink, noise;
  uint64_t seed;
  uint32_t step, stream;
};

// One step of all values; the slots that crossed zero, ascending. `full`: there are no empty slots,
// so rows are not read.
Tensor walk(const Tensor& values, const Tensor& rows, const Tensor& signs, bool full,
            const Diffusion& by, const char* op);

}  // namespace rewire
