// Random numbers for many counters at once; included by kernels-inl.h. Lanes of 64 bits hold the
// words of Philox in their lower halves; what is in the upper ones does not matter.

constexpr int kCounters = REWIRE_VECTOR_BYTES / 8;
using Counters = Vec<uint64_t, kCounters>;

// Lower half times lower half.
REWIRE_INLINE Counters multiply(Counters a, Counters b) {
#if defined(REWIRE_HAS_AVX2) && REWIRE_VECTOR_BYTES >= 64
  return (Counters)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(REWIRE_HAS_AVX2)
  return (Counters)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

struct CounterWords {
  Counters w[4];
};

REWIRE_INLINE CounterWords philox_all(uint64_t seed, Counters a, Counters b, Counters c,
                                      Counters d) {
  const Counters m0 = Counters{} + 0xD2511F53u, m1 = Counters{} + 0xCD9E8D57u;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Counters p = multiply(a, m0), q = multiply(c, m1);
    a = (q >> 32) ^ b ^ k0;
    b = q;
    c = (p >> 32) ^ d ^ k1;
    d = p;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

template <int... P>
REWIRE_INLINE Counters counting(Positions<P...>) {
  return Counters{uint64_t(P)...};
}

// Of the counters first, first + 1, ...
REWIRE_INLINE CounterWords philox_from(uint64_t seed, uint64_t first, uint32_t step,
                                       uint32_t stream) {
  const Counters index = counting(typename MakePositions<kCounters>::type()) + first;
  return philox_all(seed, index, index >> 32, Counters{} + step, Counters{} + stream);
}

// out[0 ... n): random.bits from number `first` on.
void random_bits(uint64_t seed, uint32_t step, uint32_t stream, int64_t first, int64_t n,
                 int64_t* out) {
  for (int64_t k = 0; k < n; k += kCounters) {
    const CounterWords words = philox_from(seed, static_cast<uint64_t>(first + k), step, stream);
    const Counters bits = ((words.w[1] << 32) | (words.w[0] & 0xFFFFFFFFu)) & 0x7FFFFFFFFFFFFFFFu;
    if (n - k >= kCounters)
      store(out + k, bits);
    else
      __builtin_memcpy(out + k, &bits, static_cast<uint64_t>(n - k) * 8);
  }
}

// out[0 ... n): topology.position_signs.
void position_signs(const int64_t* rows, const int64_t* cols, int64_t n, uint64_t seed,
                    uint32_t stream, int8_t* out) {
  const Counters tag = Counters{} + (0x80000000u | (stream & 0x7FFFu) << 16);
  for (int64_t k = 0; k < n; k += kCounters) {
    const int64_t some = n - k < kCounters ? n - k : kCounters;
    Counters r{}, c{};
    if (some == kCounters) {
      r = load<Counters>(rows + k);
      c = load<Counters>(cols + k);
    } else {
      __builtin_memcpy(&r, rows + k, static_cast<uint64_t>(some) * 8);
      __builtin_memcpy(&c, cols + k, static_cast<uint64_t>(some) * 8);
    }
    const Counters word = philox_all(seed, r, c, r >> 32, tag | ((c >> 32) & 0xFFFFu)).w[0] & 1;
    for (int64_t i = 0; i < some; ++i)
      out[k + i] = static_cast<int8_t>(1 - 2 * static_cast<int>(word[i]));
  }
}
