// Sums and dot products of the rows of a list, over one panel of samples; see WalkArgs.

// Keeps a vector that is used twice in its register; GCC would rather read it twice, and the second
// reading of a line that is still on its way costs as much as the first.
template <class V>
REWIRE_INLINE void keep(V& v) {
#if defined(REWIRE_REGISTER)
  if constexpr (sizeof(V) >= 16) asm("" : REWIRE_REGISTER(v));
#endif
}

// Leaves a copy of a few numbers in memory, where the compiler would read their origin again.
template <class I, int U>
REWIRE_INLINE void keep_list(I (&list)[U]) {
  asm("" : "+m"(list));
}

// What an index must be below, in its own width: with it, negative numbers are found as well, in a
// few instructions for several indices together.
template <class I>
REWIRE_INLINE typename UnsignedOf<sizeof(I)>::type end_of(int64_t bound) {
  const uint64_t most = uint64_t(1) << (8 * sizeof(I) - 1), end = static_cast<uint64_t>(bound);
  return static_cast<typename UnsignedOf<sizeof(I)>::type>(end < most ? end : most);
}

// (Sanitizers see the same accesses in a loop, and take a fraction of the time to build.)
#if defined(__SANITIZE_ADDRESS__)
#define REWIRE_UNROLL
#else
#define REWIRE_UNROLL _Pragma("GCC unroll 8")
#endif

constexpr int kMostVectors = REWIRE_VECTOR_BYTES >= 64 ? 8 : 4;

// P: of ptr, I: of idx and slots. Ordered: there are no slots. Read: what is wanted.
template <class T, class P, class I, bool Ordered, Wanted Out, int W, int NV>
Status walk_rows(const WalkArgs& a, int64_t row0, int64_t row1) {
  using V = Vec<T, W>;
  using Bits = typename UnsignedOf<sizeof(I)>::type;
  constexpr bool kHasSums = Out != kDots, kHasDots = Out != kSums;
  // Connections that are looked at together, and independent chains of sums: enough of them to hide
  // the latency of a multiply-add, as far as there are registers.
  constexpr int kGroup = !kHasDots ? 4 : W == 1 || W > 8 ? 8 : W;
  constexpr int kChains = NV == 1                                ? 4
                          : NV == 2 || (NV <= 4 && !kHasDots)    ? 2
                          : NV <= 4 && REWIRE_VECTOR_BYTES >= 64 ? 2
                                                                 : 1;
  constexpr int kAhead = 24;
  const P* ptr = static_cast<const P*>(a.ptr);
  const I* idx = static_cast<const I*>(a.idx);
  const I* slots = static_cast<const I*>(a.slots);
  const T* values = static_cast<const T*>(a.values);
  const T* bias = static_cast<const T*>(a.bias);
  const T* x = static_cast<const T*>(a.x);
  const T* own = static_cast<const T*>(a.own);
  T* sums = static_cast<T*>(a.sums);
  T* dots = static_cast<T*>(a.dots);
  const Bits features = end_of<I>(a.features), capacity = end_of<I>(a.capacity);
  const int64_t step = a.x_step, furthest = a.length - kAhead - kGroup;
  const bool add = a.add, far = !Ordered && a.far, go_on = a.go_on;
  for (int64_t r = row0; r < row1; ++r) {
    const int64_t row = ptr[r], end = ptr[r + 1], begin = go_on ? a.next[r] : row;
    if (__builtin_expect(begin < 0 || begin > end || end > a.length, 0)) return kBadPointer;
    const int64_t until = a.next == nullptr || end - row > kSegment ? INT64_MAX : a.until;
    V g[NV], total[NV], sum[kChains][NV];
    if constexpr (kHasDots) {
      for (int j = 0; j < NV; ++j) g[j] = load<V>(own + j * W);
      own += a.own_step;
    }
    // U connections from i on.
    const auto group = [&](auto size, int64_t i) __attribute__((always_inline)) {
      constexpr int U = decltype(size)::value;
      // Read once, because another thread may write to the lists: what is checked is what is used.
      I at[U], slot[U];
      __builtin_memcpy(at, idx + i, sizeof(at));
      if constexpr (!Ordered) {
        __builtin_memcpy(slot, slots + i, sizeof(slot));
        keep_list(at);
        keep_list(slot);
        Bits bad = 0;
        for (int u = 0; u < U; ++u)
          bad |= (static_cast<Bits>(at[u]) >= features) | (static_cast<Bits>(slot[u]) >= capacity);
        if (__builtin_expect(bad, 0)) {
          for (int u = 0; u < U; ++u)
            if (static_cast<Bits>(at[u]) >= features) return kBadIndex;
          return kBadSlot;
        }
        if (far && i < furthest)
          for (int u = 0; u < U; ++u) {
            if constexpr (kHasSums) prefetch_value(values, slots[i + kAhead + u]);
            if constexpr (kHasDots) prefetch_value<T, I, true>(dots, slots[i + kAhead + u]);
          }
      }
      V dot[U];
      REWIRE_UNROLL
      for (int u = 0; u < U; ++u) {
        const T* run = x + static_cast<int64_t>(at[u]) * step;
        V value{};
        if constexpr (kHasSums) value += Ordered ? values[i + u] : values[slot[u]];
        V even{}, odd{};
        REWIRE_UNROLL
        for (int j = 0; j < NV; ++j) {
          V part = load<V>(run + j * W);
          if constexpr (Out == kBoth) keep(part);
          if constexpr (kHasSums) sum[u % kChains][j] += value * part;
          if constexpr (kHasDots) {
            if (j % 2)
              odd += g[j] * part;
            else
              even += g[j] * part;
          }
        }
        if constexpr (kHasDots) dot[u] = NV > 1 ? even + odd : even;
      }
      if constexpr (kHasDots) {
        T found[U];
        sum_lanes<T, W, U>(dot, found);
        if (add)
          for (int u = 0; u < U; ++u) found[u] += Ordered ? dots[i + u] : dots[slot[u]];
        REWIRE_UNROLL
        for (int u = 0; u < U; ++u) dots[Ordered ? i + u : slot[u]] = found[u];
      }
      return kFine;
    };
    int64_t i = begin;
    for (int64_t first = begin;; first += kSegment) {
      const int64_t stop = first + kSegment < end ? first + kSegment : end;
      if constexpr (kHasSums) {
        for (int chain = 0; chain < kChains; ++chain)
          for (int j = 0; j < NV; ++j) sum[chain][j] = V{};
        if (go_on && first == begin)
          for (int j = 0; j < NV; ++j) sum[0][j] = load<V>(sums + j * W);
        else if (bias && first == begin)
          for (int j = 0; j < NV; ++j) sum[0][j] += bias[r];
      }
      for (; i + kGroup <= stop && idx[i + kGroup - 1] < until; i += kGroup)
        if (const Status status = group(Count<kGroup>(), i); status != kFine) return status;
      for (; i < stop && idx[i] < until; ++i)
        if (const Status status = group(Count<1>(), i); status != kFine) return status;
      if constexpr (kHasSums) {
        for (int chain = 1; chain < kChains; ++chain)
          for (int j = 0; j < NV; ++j) sum[0][j] += sum[chain][j];
        for (int j = 0; j < NV; ++j) total[j] = first == begin ? sum[0][j] : total[j] + sum[0][j];
      }
      if (i < stop || stop == end) break;  // the tile or the row ends
    }
    if (a.next) a.next[r] = i;
    if constexpr (kHasSums) {
      for (int j = 0; j < NV; ++j) store(sums + j * W, total[j]);
      sums += a.sums_step;
    }
  }
  return kFine;
}

template <class T, class P, class I, bool Ordered, Wanted Out, int W>
Status walk_narrow(const WalkArgs& a, int64_t row0, int64_t row1, int64_t width) {
  if constexpr (W > 1) {
    if (width < W) return walk_narrow<T, P, I, Ordered, Out, W / 2>(a, row0, row1, width);
  }
  return walk_rows<T, P, I, Ordered, Out, W, 1>(a, row0, row1);
}

template <class T, class P, class I, bool Ordered, Wanted Out>
Status walk(const WalkArgs& a, int64_t row0, int64_t row1, int64_t width) {
  constexpr int W = REWIRE_VECTOR_BYTES / sizeof(T);
  switch (width / W) {
    case 8:
      return walk_rows<T, P, I, Ordered, Out, W, kMostVectors>(a, row0, row1);
    case 7:
      return walk_rows < T, P, I, Ordered, Out, W, kMostVectors<8 ? 4 : 7>(a, row0, row1);
    case 6:
      return walk_rows < T, P, I, Ordered, Out, W, kMostVectors<8 ? 4 : 6>(a, row0, row1);
    case 5:
      return walk_rows < T, P, I, Ordered, Out, W, kMostVectors<8 ? 4 : 5>(a, row0, row1);
    case 4:
      return walk_rows<T, P, I, Ordered, Out, W, 4>(a, row0, row1);
    case 3:
      return walk_rows<T, P, I, Ordered, Out, W, 3>(a, row0, row1);
    case 2:
      return walk_rows<T, P, I, Ordered, Out, W, 2>(a, row0, row1);
    case 1:
      return walk_rows<T, P, I, Ordered, Out, W, 1>(a, row0, row1);
    default:
      if constexpr (Ordered)
        return kBadPointer;  // there is one panel then, and nothing is put in order
      else
        return walk_narrow<T, P, I, Ordered, Out, W / 2>(a, row0, row1, width);
  }
}
