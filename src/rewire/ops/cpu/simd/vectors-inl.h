// Vectors of W lanes on top of the compiler's vector extensions; included inside the namespace of
// one instruction set. One lane is a plain scalar, so that a batch of one needs no code of its own.

#define REWIRE_INLINE static inline __attribute__((always_inline))

template <class T, int W>
struct Lanes {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <class T>
struct Lanes<T, 1> {
  using type = T;
};
template <class T, int W>
using Vec = typename Lanes<T, W>::type;

template <int Bytes>
struct IntegerOf;
template <>
struct IntegerOf<2> {
  using type = int16_t;
  using without_sign = uint16_t;
};
template <>
struct IntegerOf<4> {
  using type = int32_t;
  using without_sign = uint32_t;
};
template <>
struct IntegerOf<8> {
  using type = int64_t;
  using without_sign = uint64_t;
};

template <int Bytes>
struct UnsignedOf {
  using type = typename IntegerOf<Bytes>::without_sign;
};

template <class V, class T>
REWIRE_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
REWIRE_INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// Keeps a vector that is used twice in its register; GCC would rather read it twice, and the second
// reading of a line that is still on its way costs as much as the first.
template <class V>
REWIRE_INLINE void keep(V& v) {
#if defined(REWIRE_REGISTER)
  if constexpr (sizeof(V) >= 16) asm("" : REWIRE_REGISTER(v));
#endif
}

// A number that is known to the compiler, as an argument.
template <int N>
struct Count {
  static constexpr int value = N;
};

template <int... I>
struct Positions {};
template <int N, int... I>
struct MakePositions : MakePositions<N - 1, N - 1, I...> {};
template <int... I>
struct MakePositions<0, I...> {
  using type = Positions<I...>;
};

// Lane p of the result is lane Pattern::at(p) of the pair (a, b), b's lanes counting on from W.
template <class Pattern, class T, int W, int... P>
REWIRE_INLINE Vec<T, W> shuffle_at(Vec<T, W> a, Vec<T, W> b, Positions<P...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, Pattern::at(P)...);
#else
  using Mask = Vec<typename IntegerOf<sizeof(T)>::type, W>;
  return __builtin_shuffle(a, b, Mask{Pattern::at(P)...});
#endif
}

template <class Pattern, class T, int W>
REWIRE_INLINE Vec<T, W> shuffle(Vec<T, W> a, Vec<T, W> b) {
  return shuffle_at<Pattern, T, W>(a, b, typename MakePositions<W>::type());
}

// Half `Part` (0 or 1) of every segment of a and of b, the segments of a and b taking turns.
template <int W, int Segment, int Part>
struct Halves {
  static constexpr int at(int p) {
    return ((p / (Segment / 2)) % 2) * W + (p / Segment) * Segment + p % (Segment / 2) +
           Part * (Segment / 2);
  }
};

// The other half of the own segment.
template <int Segment>
struct Swapped {
  static constexpr int at(int p) { return p ^ (Segment / 2); }
};

// One step of a transpose: the element blocks of size Step off the diagonal change places.
template <int W, int Step, int Part>
struct Exchange {
  static constexpr int at(int p) {
    return Part == 0 ? ((p & Step) == 0 ? p : W + p - Step) : ((p & Step) == 0 ? p + Step : W + p);
  }
};

// Sums of the lanes of `Count` vectors (Start, Start + Stride, ...), W / Count partial sums each,
// in order.
template <class T, int W, int Start, int Stride, int Count>
struct Tree {
  static constexpr int kSegment = 2 * W / Count;
  REWIRE_INLINE Vec<T, W> of(const Vec<T, W>* v) {
    Vec<T, W> a = Tree<T, W, Start, 2 * Stride, Count / 2>::of(v);
    Vec<T, W> b = Tree<T, W, Start + Stride, 2 * Stride, Count / 2>::of(v);
    return shuffle<Halves<W, kSegment, 0>, T, W>(a, b) +
           shuffle<Halves<W, kSegment, 1>, T, W>(a, b);
  }
};
template <class T, int W, int Start, int Stride>
struct Tree<T, W, Start, Stride, 1> {
  REWIRE_INLINE Vec<T, W> of(const Vec<T, W>* v) { return v[Start]; }
};

template <class T, int W, int Segment>
REWIRE_INLINE Vec<T, W> sum_segments(Vec<T, W> v) {
  if constexpr (Segment > 1) {
    v += shuffle<Swapped<Segment>, T, W>(v, v);
    return sum_segments<T, W, Segment / 2>(v);
  } else {
    return v;
  }
}

// sums[u] = sum of the lanes of v[u], for U <= W vectors (of one lane: any number) at about three
// instructions each.
template <class T, int W, int U>
REWIRE_INLINE void sum_lanes(const Vec<T, W>* v, T* sums) {
  if constexpr (W == 1) {
    for (int u = 0; u < U; ++u) sums[u] = v[u];
  } else {
    T lanes[W];
    store(lanes, sum_segments<T, W, W / U>(Tree<T, W, 0, 1, U>::of(v)));
    for (int u = 0; u < U; ++u) sums[u] = lanes[u * (W / U)];
  }
}

// All ones but for the first `skip` lanes, to clear those of a vector with `only`. (Multiplying by
// zero would turn an infinity into a NaN.)
template <class T, int W>
using Mask = Vec<typename IntegerOf<sizeof(T)>::type, W>;

template <class T, int W, int... P>
REWIRE_INLINE Mask<T, W> mask_from(int skip, Positions<P...>) {
  using Int = typename IntegerOf<sizeof(T)>::type;
  if constexpr (W == 1)
    return skip > 0 ? 0 : -1;
  else
    return Mask<T, W>{Int(P)...} >= Int(skip);
}

template <class T, int W>
REWIRE_INLINE Vec<T, W> only(Mask<T, W> mask, Vec<T, W> v) {
  if constexpr (W == 1)
    return mask ? v : T(0);
  else
    return (Vec<T, W>)((Mask<T, W>)v & mask);
}

template <class T, int W, int Step>
REWIRE_INLINE void transpose_steps(Vec<T, W>* v) {
  if constexpr (Step > 0) {
    for (int i = 0; i < W; ++i) {
      if (i & Step) continue;
      Vec<T, W> a = v[i], b = v[i + Step];
      v[i] = shuffle<Exchange<W, Step, 0>, T, W>(a, b);
      v[i + Step] = shuffle<Exchange<W, Step, 1>, T, W>(a, b);
    }
    transpose_steps<T, W, Step / 2>(v);
  }
}

// Asks for values that are used soon. Slots may be in any order, and here they are not checked yet.
template <class T, class I, bool Write = false>
REWIRE_INLINE void prefetch_value(const T* values, I slot) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(values) +
                                    static_cast<uint64_t>(static_cast<int64_t>(slot)) * sizeof(T)),
      Write);
}
