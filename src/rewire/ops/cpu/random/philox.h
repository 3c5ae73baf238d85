// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011), as rewire/random.py defines it.
#pragma once

#include "simd/types.h"

namespace rewire {

struct Words {
  uint32_t w[4];
};

REWIRE_STATIC Words philox(uint64_t seed, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = static_cast<uint64_t>(a) * 0xD2511F53u,
                   q = static_cast<uint64_t>(c) * 0xCD9E8D57u;
    a = static_cast<uint32_t>(q >> 32) ^ b ^ k0;
    b = static_cast<uint32_t>(q);
    c = static_cast<uint32_t>(p >> 32) ^ d ^ k1;
    d = static_cast<uint32_t>(p);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

// An integer in [0, bound): random.below.
REWIRE_STATIC int64_t philox_below(uint64_t seed, uint32_t step, uint32_t stream, int64_t index,
                                   int64_t bound) {
  const uint64_t i = static_cast<uint64_t>(index);
  const Words r =
      philox(seed, static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), step, stream);
  const uint64_t bits = ((static_cast<uint64_t>(r.w[1]) << 32) | r.w[0]) & 0x7FFFFFFFFFFFFFFFull;
  return static_cast<int64_t>(bits % static_cast<uint64_t>(bound));
}

}  // namespace rewire
