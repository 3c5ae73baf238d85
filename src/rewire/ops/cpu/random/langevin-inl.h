// The random walk of DEEP R over a range of slots; included by kernels-inl.h. Plain loops over
// short arrays, which the compiler turns into vectors of whatever length this instruction set has.

constexpr int kQuads = 32, kBlock = 4 * kQuads;  // slots that are worked on together

// log(u) for u in [2^-24, 1]: u = m 2^e with m in [sqrt(1/2), sqrt(2)), and a polynomial in m - 1,
// which is exact, so that the result is accurate relative to itself near u = 1 too. (Coefficients:
// Cephes logf.)
REWIRE_INLINE float log_unit(float u) {
  int32_t bits;
  __builtin_memcpy(&bits, &u, 4);
  const int32_t shifted = bits - 0x3F3504F3;  // sqrt(1/2)
  const int32_t exponent = shifted >> 23;
  bits -= exponent << 23;
  float m;
  __builtin_memcpy(&m, &bits, 4);
  const float x = m - 1.0f, e = static_cast<float>(exponent), z = x * x;
  float p = 7.0376836292e-2f;
  p = p * x - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  p = p * x * z + e * -2.12194440e-4f - 0.5f * z;
  return x + p + e * 0.693359375f;
}

// cos and sin for angles in [0, 2 pi]: reduced to [-pi/4, pi/4] by a multiple of pi/2 in three
// parts.
REWIRE_INLINE void cos_sin(float angle, float* cosine, float* sine) {
  const int32_t quarter = static_cast<int32_t>(angle * 0.636619772f + 0.5f);
  const float q = static_cast<float>(quarter);
  const float x =
      ((angle - q * 1.5703125f) - q * 4.837512969970703125e-4f) - q * 7.54978995489188216e-8f;
  const float z = x * x;
  const float s = x + x * z * ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f);
  const float c =
      1.0f - 0.5f * z +
      z * z * ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f);
  const bool swap = (quarter & 1) != 0;
  const float cs = swap ? s : c, sn = swap ? c : s;
  *cosine = ((quarter + 1) & 2) != 0 ? -cs : cs;
  *sine = (quarter & 2) != 0 ? -sn : sn;
}

// normals[0 ... kBlock): random.normal from number 4 quad0 on.
REWIRE_INLINE void normals_from(uint64_t seed, uint32_t step, uint32_t stream, int64_t quad0,
                                float* normals) {
  uint32_t word[4][kQuads];
  for (int q = 0; q < kQuads; q += kCounters) {
    const CounterWords words = philox_from(seed, static_cast<uint64_t>(quad0 + q), step, stream);
    for (int k = 0; k < 4; ++k)
      store(&word[k][q], __builtin_convertvector(words.w[k], Vec<uint32_t, kCounters>));
  }
  float normal[4][kQuads];
  for (int pair = 0; pair < 4; pair += 2) {
    for (int q = 0; q < kQuads; ++q) {
      const float u1 =
          static_cast<float>(static_cast<int32_t>((word[pair][q] >> 8) + 1)) * 0x1p-24f;
      const float u2 =
          static_cast<float>(static_cast<int32_t>((word[pair + 1][q] >> 8) + 1)) * 0x1p-24f;
      const float radius = __builtin_sqrtf(-2.0f * log_unit(u1));
      float cosine, sine;
      cos_sin(6.28318530717958647692f * u2, &cosine, &sine);
      normal[pair][q] = radius * cosine;
      normal[pair + 1][q] = radius * sine;
    }
  }
  for (int q = 0; q < kQuads; ++q)
    for (int k = 0; k < 4; ++k) normals[4 * q + k] = normal[k][q];
}

// Bit k of the result is byte k, of 64 bytes that are 0 or 1.
REWIRE_INLINE uint64_t bits_of_bytes(const uint8_t* bytes) {
#if defined(REWIRE_HAS_AVX2) && REWIRE_VECTOR_BYTES >= 64
  const __m512i v = load<__m512i>(bytes);
  return _mm512_test_epi8_mask(v, v);
#elif defined(REWIRE_HAS_AVX2)
  const __m256i none = _mm256_setzero_si256();
  const __m256i low = _mm256_cmpgt_epi8(load<__m256i>(bytes), none);
  const __m256i high = _mm256_cmpgt_epi8(load<__m256i>(bytes + 32), none);
  return static_cast<uint32_t>(_mm256_movemask_epi8(low)) |
         static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(high))) << 32;
#else
  uint64_t bits = 0;
  for (int k = 0; k < 64; k += 8) {
    uint64_t eight = 0;
    for (int j = 0; j < 8; ++j) eight |= static_cast<uint64_t>(bytes[k + j]) << (8 * j);
    bits |= (eight * 0x0102040810204080u >> 56) << k;  // byte j, moved by 56 - 7 j, is bit 56 + j
  }
  return bits;
#endif
}

// Full: there are no empty slots, so rows are not looked at.
template <class T, class I, bool Noisy, bool Full>
void langevin_slots(const LangevinArgs& a, int64_t begin, int64_t end) {
  T* values = static_cast<T*>(a.values);
  const I* rows = static_cast<const I*>(a.rows);
  const T shrink = static_cast<T>(a.shrink), noise = static_cast<T>(a.noise);
  for (int64_t s = begin; s < end; s += kBlock) {
    const int n = static_cast<int>(end - s < kBlock ? end - s : kBlock);
    float normals[kBlock];
    if constexpr (Noisy) normals_from(a.seed, a.step, a.stream, s / 4, normals);
    uint8_t dropped[kBlock] = {};
    uint8_t any = 0;
    for (int k = 0; k < n; ++k) {
      const T sign = static_cast<T>(a.signs[s + k]);
      T theta = sign * values[s + k] - shrink;
      if constexpr (Noisy) theta += noise * static_cast<T>(normals[k]);
      const bool active = Full || rows[s + k] >= 0, drop = active & (theta < T(0));
      values[s + k] = active & !drop ? sign * theta : T(0);
      dropped[k] = drop;
      any |= static_cast<uint8_t>(drop);
    }
    for (int w = 0; 64 * w < n; ++w) {
      a.dropped[s / 64 + w] = any ? bits_of_bytes(dropped + 64 * w) : 0;
    }
  }
}

template <class T, class I>
void langevin(const LangevinArgs& a, int64_t begin, int64_t end) {
  if (a.rows == nullptr) {
    if (a.noise != 0.0)
      langevin_slots<T, I, true, true>(a, begin, end);
    else
      langevin_slots<T, I, false, true>(a, begin, end);
  } else {
    if (a.noise != 0.0)
      langevin_slots<T, I, true, false>(a, begin, end);
    else
      langevin_slots<T, I, false, false>(a, begin, end);
  }
}

// How many bits are set; which, into `out` (with room for kBitsAtOnce more) unless it is null.
int64_t list_bits(const uint64_t* words, int64_t n, int64_t* out) {
  int64_t count = 0;
  if (out == nullptr) {
    for (int64_t w = 0; w < n; ++w) count += __builtin_popcountll(words[w]);
    return count;
  }
  constexpr uint64_t kNone = uint64_t{1} << 63;
  for (int64_t w = 0; w < n; ++w) {
    uint64_t word = words[w];
    const int64_t first = 64 * w, some = __builtin_popcountll(word);
    int64_t* to = out + count;
    // So many whether there are as many or not: that cannot be guessed, and they are seldom more.
    for (int k = 0; k < kBitsAtOnce; ++k, word &= word - 1)
      to[k] = first + __builtin_ctzll(word | kNone);
    for (int64_t k = kBitsAtOnce; k < some; ++k, word &= word - 1)
      to[k] = first + __builtin_ctzll(word);
    count += some;
  }
  return count;
}

// values[begin ... end) += scale * (the normals of these numbers); begin is a multiple of
// kLangevinGrain.
template <class T>
void add_normals(void* values_, double scale, uint64_t seed, uint32_t step, uint32_t stream,
                 int64_t begin, int64_t end) {
  T* values = static_cast<T*>(values_);
  for (int64_t s = begin; s < end; s += kBlock) {
    const int n = static_cast<int>(end - s < kBlock ? end - s : kBlock);
    float normals[kBlock];
    normals_from(seed, step, stream, s / 4, normals);
    for (int k = 0; k < n; ++k) values[s + k] += static_cast<T>(scale) * static_cast<T>(normals[k]);
  }
}
