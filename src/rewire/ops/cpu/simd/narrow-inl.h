// Numbers of 16 bits in memory, float32 in registers; included inside the namespace of one
// instruction set.

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type that numbers stored as S are computed in.
template <class S>
struct ComputeOf {
  using type = S;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};
template <>
struct ComputeOf<Float16> {
  using type = float;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

// W lanes of bits that are float32 numbers, from W 16-bit ones, for two lanes or more.
template <int W>
REWIRE_INLINE Vec<uint32_t, W> bits_of(BFloat16, Vec<uint16_t, W> h) {
  // GCC converts halves of a vector one by one, and puts them together again.
#if defined(REWIRE_HAS_AVX2)
  if constexpr (W == 8) return (Vec<uint32_t, W>)_mm256_cvtepu16_epi32((__m128i)h) << 16;
#if REWIRE_VECTOR_BYTES >= 64
  if constexpr (W == 16)
    return (Vec<uint32_t, W>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h) << 16;
#endif
#endif
  return __builtin_convertvector(h, Vec<uint32_t, W>) << 16;
}

template <int W>
REWIRE_INLINE Vec<uint32_t, W> bits_of(Float16, Vec<uint16_t, W> h) {
#if defined(REWIRE_HAS_AVX2)
  if constexpr (W == 8) {
    return (Vec<uint32_t, W>)_mm256_cvtph_ps((__m128i)h);
  }
#if REWIRE_VECTOR_BYTES >= 64
  if constexpr (W == 16) {
    return (Vec<uint32_t, W>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
  }
#endif
#endif
  using U = Vec<uint32_t, W>;
  const U wide = __builtin_convertvector(h, U), size = wide & 0x7fff;
  // Subnormals are multiples of 2^-24; the others get another bias of the exponent, or the exponent
  // of infinity.
  const U small = (U)(__builtin_convertvector((Vec<int32_t, W>)size, Vec<float, W>) * 0x1p-24f);
  const U normal = (size << 13) + (112u << 23);
  const U huge = (size << 13) | 0x7f800000u;
  const U is_small = (U)(size < 0x0400), is_huge = (U)(size >= 0x7c00);
  return ((wide & 0x8000) << 16) | (small & is_small) | (huge & is_huge) |
         (normal & ~(is_small | is_huge));
}

// The nearest 16-bit numbers, ties to even; what is not a number stays so.
template <int W>
REWIRE_INLINE Vec<uint16_t, W> narrowed(BFloat16, Vec<uint32_t, W> f) {
  using U = Vec<uint32_t, W>;
  const U rounded = (f + 0x7fff + ((f >> 16) & 1)) >> 16,
          is_nan = (U)((f & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((((f >> 16) | 0x40) & is_nan) | (rounded & ~is_nan),
                                 Vec<uint16_t, W>);
}

template <int W>
REWIRE_INLINE Vec<uint16_t, W> narrowed(Float16, Vec<uint32_t, W> f) {
  using U = Vec<uint32_t, W>;
  const U size = f & 0x7fffffffu;
  // Below 2^-14 the sum with 1/2 rounds at 2^-24, as subnormals do.
  const U small = (U)((Vec<float, W>)size + 0.5f) - 0x3f000000u;
  const U normal = (size - (112u << 23) + 0x0fff + ((size >> 13) & 1)) >> 13;
  const U is_small = (U)(size < (113u << 23)), is_huge = (U)(size >= (143u << 23)),
          is_nan = (U)(size > 0x7f800000u);
  const U result = (small & is_small) | ((0x7c00 | (is_nan & 0x0200)) & is_huge) |
                   (normal & ~(is_small | is_huge));
  return __builtin_convertvector(result | ((f >> 16) & 0x8000), Vec<uint16_t, W>);
}

// W numbers from memory, as they are computed with.
template <class S, int W>
REWIRE_INLINE Vec<Compute<S>, W> load_as(const S* p) {
  if constexpr (sizeof(S) > 2) {
    return load<Vec<S, W>>(p);
  } else if constexpr (W > 1) {
    return (Vec<float, W>)bits_of<W>(S{}, load<Vec<uint16_t, W>>(p));
  } else {
    const Vec<uint16_t, 2> pair = {p->bits, p->bits};
    return ((Vec<float, 2>)bits_of<2>(S{}, pair))[0];
  }
}

template <class S>
void widen(const void* src, void* dst, int64_t n) {
  constexpr int W = REWIRE_VECTOR_BYTES / 4;
  const S* from = static_cast<const S*>(src);
  float* to = static_cast<float*>(dst);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load_as<S, W>(from + i));
  for (; i < n; ++i) to[i] = load_as<S, 1>(from + i);
}

template <class S>
void narrow(const void* src, void* dst, int64_t n) {
  constexpr int W = REWIRE_VECTOR_BYTES / 4;
  const float* from = static_cast<const float*>(src);
  S* to = static_cast<S*>(dst);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, narrowed<W>(S{}, load<Vec<uint32_t, W>>(from + i)));
  for (; i < n; ++i) {
    const Vec<float, 2> pair = {from[i], from[i]};
    to[i].bits = narrowed<2>(S{}, (Vec<uint32_t, 2>)pair)[0];
  }
}
