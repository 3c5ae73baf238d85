// Both products of one walk over a list, from one reading of x: backward's input gradient (a sum
// per row of the list) and value gradient (a dot product per connection). Included by
// kernels-inl.h.

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

constexpr int kFusedAhead = 24;  // connections

// Asks for the values of U connections, and for where their gradients go.
template <class T, class I, int U>
REWIRE_INLINE void prefetch_values(const T* values, const T* out, const I* slots) {
  for (int u = 0; u < U; ++u) {
    prefetch_value(values, slots[u]);
    prefetch_value<T, I, true>(out, slots[u]);
  }
}

// Tiles jump from row to row, where the processor's own prefetching loses them: asks for the index
// of the row after the next, and for the values of the next.
template <class T, class I>
REWIRE_INLINE void fused_prefetch(const FusedArgs& a, const Part& p, int64_t r, int64_t count) {
  const Tile& tile = *p.tile;
  const I* ptr = static_cast<const I*>(a.list.ptr);
  const auto start = [&](int64_t row) {
    return tile.first ? static_cast<int64_t>(ptr[row]) : tile.next[row];
  };
  if (r + 2 < p.row1) prefetch_row<I>(a.list, start(r + 2), count + 8);
  if (r + 1 < p.row1 && start(r + 1) >= 0 && start(r + 1) < a.list.length - kFusedAhead)
    prefetch_values<T, I, kFusedAhead>(static_cast<const T*>(a.values),
                                       static_cast<const T*>(a.out),
                                       static_cast<const I*>(a.list.slots) + start(r + 1));
}

// Add: to what `out` has from the blocks of the batch before. (A flag would cost registers, and
// reading `out` where it is only written costs more.)
template <class S, class I, int W, int NV, bool Shifted, bool Add>
Status fused_walk(const FusedArgs& a, const Part& p) {
  using T = Compute<S>;
  using V = Vec<T, W>;
  // Connections that are checked, and whose lanes are summed, together; independent chains of sums,
  // where vectors are too few to hide latency. (Of two vectors in one chain where tiles come in
  // such blocks, that is under sanitizers: bits must not depend on tiles.)
  constexpr int kGroup = W == 1 || W > 8 ? 8 : W, kChains = NV == 1                         ? 4
                                                            : NV < kVectorsPerBlock / 2 - 1 ? 2
                                                                                            : 1;
  const I* ptr = static_cast<const I*>(a.list.ptr);
  const I* idx = static_cast<const I*>(a.list.idx);
  const I* slots = static_cast<const I*>(a.list.slots);
  const T* values = static_cast<const T*>(a.values);
  const S* x = static_cast<const S*>(a.x) + p.b0;
  T* out = static_cast<T*>(a.out);
  using Bits = typename UnsignedOf<sizeof(I)>::type;
  const Bits features = end_of<I>(a.features), capacity = end_of<I>(a.capacity);
  const int64_t step = a.x_step, last = p.width - W;
  const Mask<T, W> fresh =
      mask_from<T, W>(static_cast<int>(NV * W - p.width), typename MakePositions<W>::type());
  const Tile* tile = p.tile;
  const int64_t until = tile && !tile->last ? tile->end : INT64_MAX,
                furthest = a.list.length - kFusedAhead - kGroup;
  const bool go_on = tile && !tile->first, far = a.scattered;
  const auto start = [&](int64_t r) {
    return go_on ? tile->next[r] : static_cast<int64_t>(ptr[r]);
  };
  int64_t count = 0;  // of the row before
  for (int64_t r = p.row0; r < p.row1; ++r) {
    const int64_t begin = start(r), end = ptr[r + 1];
    if (__builtin_expect(bad_range(begin, end, a.list.length), 0)) return kBadPointer;
    const S* row = static_cast<const S*>(a.g) + r * a.g_step + p.b0;
    T* y = static_cast<T*>(a.y) + r * a.y_step + p.b0;
    V g[NV], sum[kChains][NV];
    for (int j = 0; j < NV; ++j) {
      const int64_t at = j + 1 < NV ? j * W : last;
      g[j] = load_as<S, W>(row + at);
      sum[0][j] = go_on ? load<V>(y + at) : V{};
      for (int chain = 1; chain < kChains; ++chain) sum[chain][j] = V{};
    }
    if constexpr (Shifted) g[NV - 1] = only<T, W>(fresh, g[NV - 1]);
    if (r + 1 < p.row1) {
      prefetch_run(row + a.g_step, p.width);
      if (go_on) prefetch_run(y + a.y_step, p.width);
    }
    if (__builtin_expect(tile != nullptr, 0)) fused_prefetch<T, I>(a, p, r, count);
    // U connections from i on: their x is added to the row's sums and multiplied with the row's g,
    // both in registers.
    const auto group = [&](auto size, int64_t i) __attribute__((always_inline)) {
      constexpr int U = decltype(size)::value;
      // Read once, because another thread may write to the lists: what is checked is what is used.
      I at[U], slot[U];
      __builtin_memcpy(at, idx + i, sizeof(at));
      __builtin_memcpy(slot, slots + i, sizeof(slot));
      keep_list(at);
      keep_list(slot);
      Bits bad = 0;
      for (int u = 0; u < U; ++u)
        bad |= (static_cast<Bits>(at[u]) >= features) | (static_cast<Bits>(slot[u]) >= capacity);
      if (__builtin_expect(bad, 0)) {
        for (int u = 0; u < U; ++u)
          if (outside(at[u], a.features)) return kBadIndex;
        return kBadSlot;
      }
      if (far && i < furthest && idx[i + kFusedAhead] < until)
        prefetch_values<T, I, U>(values, out, slots + i + kFusedAhead);
      V dot[U];
      REWIRE_UNROLL
      for (int u = 0; u < U; ++u) {
        const T value = values[slot[u]];
        const S* run = x + static_cast<int64_t>(at[u]) * step;
        V even{}, odd{};
        REWIRE_UNROLL
        for (int j = 0; j < NV; ++j) {
          V part = load_as<S, W>(run + (j + 1 < NV ? j * W : last));
          keep(part);
          sum[u % kChains][j] += value * part;
          if (Shifted && j + 1 == NV) part = only<T, W>(fresh, part);
          if (j % 2)
            odd += g[j] * part;
          else
            even += g[j] * part;
        }
        dot[u] = even + odd;
      }
      T found[U];
      sum_lanes<T, W, U>(dot, found);
      if constexpr (Add)
        for (int u = 0; u < U; ++u) found[u] += out[slot[u]];
      REWIRE_UNROLL
      for (int u = 0; u < U; ++u) out[slot[u]] = found[u];
      return kFine;
    };
    int64_t i = begin;
    for (; i + kGroup <= end && idx[i + kGroup - 1] < until; i += kGroup)
      if (const Status status = group(Count<kGroup>(), i); status != kFine) return status;
    for (; i < end && idx[i] < until; ++i)
      if (const Status status = group(Count<1>(), i); status != kFine) return status;
    for (int j = 0; j < NV; ++j) {
      for (int chain = 1; chain < kChains; ++chain) sum[0][j] += sum[chain][j];
      store(y + (j + 1 < NV ? j * W : last), sum[0][j]);
    }
    if (tile) tile->next[r] = i;
    count = i - begin;
  }
  return kFine;
}

template <class S, class I, int W, int NV, bool Add>
Status fused_rows(const FusedArgs& a, const Part& p) {
  if constexpr (NV > 1) {
    if (p.width < NV * W) return fused_walk<S, I, W, NV, true, Add>(a, p);
  }
  return fused_walk<S, I, W, NV, false, Add>(a, p);
}

template <class S, class I, int W, bool Add>
Status fused_narrow(const FusedArgs& a, const Part& p) {
  if constexpr (W > 1) {
    if (p.width < W) return fused_narrow<S, I, W / 2, Add>(a, p);
    if (p.width > W) return fused_rows<S, I, W, 2, Add>(a, p);
  }
  return fused_rows<S, I, W, 1, Add>(a, p);
}

template <class S, class I, bool Add>
Status fused_width(const FusedArgs& a, const Part& p) {
  constexpr int W = REWIRE_VECTOR_BYTES / sizeof(Compute<S>);
  switch ((p.width + W - 1) / W) {
    case 1:
      return fused_narrow<S, I, W, Add>(a, p);
    case 2:
      return fused_rows<S, I, W, 2, Add>(a, p);
    case 3:
      return fused_rows<S, I, W, 3, Add>(a, p);
#if !defined(__SANITIZE_ADDRESS__)
    case 4:
      return fused_rows<S, I, W, 4, Add>(a, p);
    case 5:
      return fused_rows<S, I, W, 5, Add>(a, p);
    case 6:
      return fused_rows<S, I, W, 6, Add>(a, p);
    case 7:
      return fused_rows<S, I, W, 7, Add>(a, p);
#endif
    default:
      return fused_rows<S, I, W, kVectorsPerBlock, Add>(a, p);
  }
}

template <class S, class I>
Status fused(const FusedArgs& a, const Part& p, bool add) {
  return add ? fused_width<S, I, true>(a, p) : fused_width<S, I, false>(a, p);
}
