// Changes merged into one list of an index, in one pass and in place; included by kernels-inl.h.
// See MergeArgs.

#define REWIRE_METHOD inline __attribute__((always_inline))

// How many blocks are looked through before it is asked whether something was found: with short
// vectors, asking is cheaper.
constexpr int kAtOnce = REWIRE_VECTOR_BYTES >= 64 ? 4 : 1;

#if !defined(REWIRE_HAS_AVX2) || REWIRE_VECTOR_BYTES < 64
// As leading_less, of one block.
template <class I, bool Gaps>
REWIRE_INLINE int64_t leading_less_of_one(const I* list, I bound) {
#if defined(REWIRE_HAS_AVX2)
  __m256i a = load<__m256i>(list), b = load<__m256i>(list + 32 / sizeof(I));
  if constexpr (sizeof(I) == 4) {
    using V = Vec<uint32_t, 8>;
    if constexpr (Gaps)
      a = (__m256i)((V)a - V{0, 1, 2, 3, 4, 5, 6, 7}),
      b = (__m256i)((V)b - V{8, 9, 10, 11, 12, 13, 14, 15});
    const __m256i t = _mm256_set1_epi32(bound);
    const unsigned low =
        static_cast<unsigned>(_mm256_movemask_ps((__m256)_mm256_cmpgt_epi32(t, a)));
    const unsigned high =
        static_cast<unsigned>(_mm256_movemask_ps((__m256)_mm256_cmpgt_epi32(t, b)));
    return __builtin_ctz(~(low | high << 8));
  } else {
    using V = Vec<uint64_t, 4>;
    if constexpr (Gaps) a = (__m256i)((V)a - V{0, 1, 2, 3}), b = (__m256i)((V)b - V{4, 5, 6, 7});
    const __m256i t = _mm256_set1_epi64x(bound);
    const unsigned low =
        static_cast<unsigned>(_mm256_movemask_pd((__m256d)_mm256_cmpgt_epi64(t, a)));
    const unsigned high =
        static_cast<unsigned>(_mm256_movemask_pd((__m256d)_mm256_cmpgt_epi64(t, b)));
    return __builtin_ctz(~(low | high << 4));
  }
#else
  using U = typename UnsignedOf<sizeof(I)>::type;  // a damaged list may hold any number
  constexpr int kBlock = 64 / sizeof(I);
  uint32_t others = 1u << kBlock;
  for (int k = 0; k < kBlock; ++k) {
    const I number = static_cast<I>(static_cast<U>(list[k]) - (Gaps ? static_cast<U>(k) : 0));
    others |= static_cast<uint32_t>(number < bound ? 0 : 1) << k;
  }
  return __builtin_ctz(others);
#endif
}
#endif

// How many numbers at the beginning of so many blocks of 64 bytes of a list are less than `bound`;
// with `Gaps`, list[k] - k instead of list[k]. Behind them anything may come: the next row, or what
// is not of the list.
template <class I, int Blocks = 1, bool Gaps = false>
REWIRE_INLINE int64_t leading_less(const I* list, I bound) {
  using U = typename UnsignedOf<sizeof(I)>::type;
  constexpr int kBlock = 64 / sizeof(I);
#if defined(REWIRE_HAS_AVX2) && REWIRE_VECTOR_BYTES >= 64
  uint64_t others = 0;
  for (int b = 0; b < Blocks; ++b) {
    __m512i v = load<__m512i>(list + b * kBlock);
    uint64_t some;
    if constexpr (sizeof(I) == 4) {
      using V = Vec<uint32_t, 16>;
      if constexpr (Gaps)
        v = (__m512i)((V)v - V{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} -
                      static_cast<U>(b * kBlock));
      some = _mm512_cmp_epi32_mask(v, _mm512_set1_epi32(bound), _MM_CMPINT_NLT);
    } else {
      using V = Vec<uint64_t, 8>;
      if constexpr (Gaps)
        v = (__m512i)((V)v - V{0, 1, 2, 3, 4, 5, 6, 7} - static_cast<U>(b * kBlock));
      some = _mm512_cmp_epi64_mask(v, _mm512_set1_epi64(bound), _MM_CMPINT_NLT);
    }
    others |= some << (b * kBlock);
  }
  if constexpr (Blocks * kBlock < 64)
    return __builtin_ctzll(others | uint64_t{1} << (Blocks * kBlock));
  return others == 0 ? Blocks * kBlock : __builtin_ctzll(others);
#else
  int64_t found = 0;
  for (int b = 0; b < Blocks; ++b) {
    // (With Gaps, every block is compared as if it began at 0.)
    const U first = static_cast<U>(Gaps ? b * kBlock : 0);
    const int64_t less = leading_less_of_one<I, Gaps>(
        list + b * kBlock, static_cast<I>(static_cast<U>(bound) + first));
    found += less;
    if (less < kBlock) break;
  }
  return found;
#endif
}

// What comes next to one row of a list: a connection that leaves or one that enters.
template <class I>
struct Next {
  const Change<I>* change;
  bool leaves;

  // The first of both lists of changes; those of other rows than `major` come after all.
  REWIRE_METHOD Next(const Change<I>* r, const Change<I>* d, I major) {
    const bool out = r->major == major, in = d->major == major;
    leaves = out & (!in | (r->minor <= d->minor));
    change = leaves ? r : d;
  }
};

// Goes over a list without changing it.
template <class I>
struct Looker {
  const I *minor, *slots;
  int64_t at = 0;  // the next entry

  REWIRE_METHOD Looker(const MergeArgs& a, int64_t)
      : minor(static_cast<const I*>(a.minor)), slots(static_cast<const I*>(a.slots)) {}
  REWIRE_METHOD bool skip_to(int64_t end) {
    at = end;
    return true;
  }
  REWIRE_METHOD void renew(I*, int64_t, int64_t) {}

  // Goes through the changes of one row, whose entries end at `end`; whether they fit.
  REWIRE_METHOD bool row(const Change<I>*& r, const Change<I>*& d, I major, int64_t end) {
    constexpr int64_t kBlock = 64 / sizeof(I);
    I last = -1;
    while (r->major == major || d->major == major) {
      const Next<I> next(r, d, major);
      const I bound = next.change->minor;
      while (at + kBlock <= end) {
        const int64_t less = leading_less(minor + at, bound);
        if (less < kBlock) {
          at += less;
          break;
        }
        at += kBlock;  // a constant, so that the next block does not wait for the comparison
      }
      while (at < end && minor[at] < bound) ++at;
      const bool there = at < end && minor[at] == bound;
      if (next.leaves ? !there || slots[at] != next.change->slot : there || bound == last)
        return false;
      at += next.leaves ? 1 : 0;
      r += next.leaves ? 1 : 0;
      d += next.leaves ? 0 : 1;
      last = next.leaves ? last : bound;
    }
    return true;
  }
};

// Called once in thousands of entries, and told nothing of what shall stay in registers.
template <class I>
__attribute__((noinline)) void move_numbers(I* to, const I* from, int64_t n) {
  __builtin_memmove(to, from, static_cast<uint64_t>(n) * sizeof(I));
}

// Moves the entries of a list on the way, in whole blocks: what a block writes too much is written
// again by what follows. The list is read some way ahead, into a room, so that nothing is lost by
// that or where entries move to the right.
template <class I>
struct Mover {
  static constexpr int64_t kBlock = 64 / sizeof(I), kSpan = kAtOnce * kBlock, kFetch = 32 * kBlock;
  static constexpr int64_t kWindow = 512, kBatch = 32;
  I *minor, *slots, *minor_room, *slots_room;
  int64_t length;                // of a room
  int64_t count, after;          // entries of the list, before and after
  int64_t base = 0, loaded = 0;  // the entries [base, loaded) are in the room
  int64_t at = 0, shift = 0;     // the next entry; it goes to at + shift

  REWIRE_METHOD Mover(const MergeArgs& a, int64_t count_)
      : minor(static_cast<I*>(a.minor)),
        slots(static_cast<I*>(a.slots)),
        minor_room(static_cast<I*>(a.room)),
        slots_room(minor_room + merge_room(a.n_added) / 2),
        length(merge_room(a.n_added) / 2),
        count(count_),
        after(count_ - a.n_removed + a.n_added) {}

  // Reads entries up to `upto`, at least, or all; they are not more than a window and what is moved
  // to the right.
  REWIRE_METHOD void read(int64_t upto) {
    upto = upto < count ? upto : count;
    if (loaded >= upto) return;
    // No more of the room is used than what is needed several times over, so that it stays in the
    // first cache.
    const int64_t needed = 4 * (upto - at), used = needed < 1024 ? 1024 : needed;
    if (upto + kSpan - base > (used < length ? used : length)) {
      move_numbers(minor_room, minor_room + (at - base), loaded - at);
      move_numbers(slots_room, slots_room + (at - base), loaded - at);
      base = at;
    }
    I *to_minor = minor_room - base, *to_slots = slots_room - base;
    int64_t k = loaded;
    for (; k < upto && k + kBlock <= count; k += kBlock) {
      __builtin_prefetch(minor + k + kFetch, 1);
      __builtin_prefetch(slots + k + kFetch, 1);
      __builtin_memcpy(to_minor + k, minor + k, 64);
      __builtin_memcpy(to_slots + k, slots + k, 64);
    }
    for (; k < upto; ++k) {
      to_minor[k] = minor[k];
      to_slots[k] = slots[k];
    }
    loaded = k;
  }

  // How far, and not beyond `end`, blocks may be moved and kBatch connections may come without
  // looking: what they write over has been read, and nothing is written behind the new end.
  REWIRE_METHOD int64_t window(int64_t end) {
    int64_t stop = at + kWindow < end ? at + kWindow : end;
    const int64_t most = after - shift - kBatch - kSpan;
    stop = stop < most ? stop : most;
    if (stop > at) read(stop + (shift > 0 ? shift : 0) + kBatch + kSpan);
    return stop;
  }

  REWIRE_METHOD void move_one(int64_t k) {
    minor[k + shift] = minor_room[k - base];
    slots[k + shift] = slots_room[k - base];
  }

  // Moves everything before `end`; false only in a damaged list.
  REWIRE_METHOD bool skip_to(int64_t end) {
    if (end + shift > after) return false;
    if (shift == 0) {  // they are where they belong, but for what the last block wrote over
      const int64_t known = end < loaded ? end : loaded;
      for (int64_t k = at; k < known && k < at + kSpan; ++k) move_one(k);
      at = end;
      if (at >= loaded) base = loaded = at;
      return true;
    }
    while (at < end) {
      const int64_t stop = window(end);
      if (stop > at) {
        const I *from_minor = minor_room - base, *from_slots = slots_room - base;
        I *to_minor = minor + shift, *to_slots = slots + shift;
        for (int64_t k = at; k < stop; k += kBlock) {
          __builtin_memcpy(to_minor + k, from_minor + k, 64);
          __builtin_memcpy(to_slots + k, from_slots + k, 64);
        }
        at = stop;
      } else {
        read(at + 1 + (shift > 0 ? shift : 0));
        move_one(at);
        ++at;
      }
    }
    return true;
  }

  // As `row`, for at most kBatch changes in a window that ends at `stop`; the row may go on then.
  REWIRE_METHOD bool some(const Change<I>*& r, const Change<I>*& d, I major, int64_t stop,
                          bool ends, I& last) {
    const I *from_minor = minor_room - base, *from_slots = slots_room - base;
    I *to_minor = minor + shift, *to_slots = slots + shift;
    int64_t k = at;
    bool fine = true;
    for (int64_t i = 0; i < kBatch && (r->major == major || d->major == major); ++i) {
      const Next<I> next(r, d, major);
      const I bound = next.change->minor, slot = next.change->slot;
      while (k < stop) {
        for (int b = 0; b < kAtOnce; ++b) {
          __builtin_memcpy(to_minor + k + b * kBlock, from_minor + k + b * kBlock, 64);
          __builtin_memcpy(to_slots + k + b * kBlock, from_slots + k + b * kBlock, 64);
        }
        const int64_t less = leading_less<I, kAtOnce>(from_minor + k, bound);
        if (less < kSpan) {
          k += less;
          break;
        }
        k += kSpan;  // a constant, so that the next block does not wait for the comparison
      }
      if (k >= stop) {
        k = stop;
        if (!ends) break;
      }
      const bool there = k < stop && from_minor[k] == bound;
      fine = next.leaves ? there && from_slots[k] == slot : !there && bound != last;
      if (!fine) break;
      to_minor[k] = bound;  // written over where it leaves
      to_slots[k] = slot;
      const int64_t left = next.leaves ? 1 : 0;
      k += left;
      r += left;
      d += 1 - left;
      to_minor += 1 - 2 * left;
      to_slots += 1 - 2 * left;
      last = next.leaves ? last : bound;
    }
    at = k;
    shift = to_minor - minor;
    return fine;
  }

  // As `row`, for one entry or one change, with all checks.
  REWIRE_METHOD bool one(const Change<I>*& r, const Change<I>*& d, I major, int64_t end, I& last) {
    const Next<I> next(r, d, major);
    read(at + 1 + (shift > 0 ? shift : 0));
    const int64_t to = at + shift;
    const I bound = next.change->minor;
    if (at < end && minor_room[at - base] < bound) {
      if (to >= after) return false;  // only in a damaged list
      move_one(at);
      ++at;
      return true;
    }
    const bool there = at < end && minor_room[at - base] == bound;
    if (next.leaves) {
      if (!there || slots_room[at - base] != next.change->slot) return false;
      ++at;
      --shift;
      ++r;
    } else {
      if (there || bound == last || to >= after) return false;
      minor[to] = bound;
      slots[to] = next.change->slot;
      ++shift;
      ++d;
      last = bound;
    }
    return true;
  }

  // Makes the changes of one row, whose entries end at `end`; false where they do not fit.
  REWIRE_METHOD bool row(const Change<I>*& r, const Change<I>*& d, I major, int64_t end) {
    I last = -1;
    while (r->major == major || d->major == major) {
      const int64_t stop = window(end);
      if (stop > at ? !some(r, d, major, stop, stop == end, last) : !one(r, d, major, end, last))
        return false;
    }
    return true;
  }

  // Pointers that have been passed.
  REWIRE_METHOD void renew(I* ptr, int64_t begin, int64_t end) {
    using U = typename UnsignedOf<sizeof(I)>::type;  // a damaged one may be any number
    const U by = static_cast<U>(shift);
    for (int64_t m = begin; m < end; ++m) ptr[m] = static_cast<I>(static_cast<U>(ptr[m]) + by);
  }
};

template <class I, class Hand>
REWIRE_INLINE bool merge_with(const MergeArgs& a, int64_t count) {
  I* ptr = static_cast<I*>(a.ptr);
  const Change<I>*r = static_cast<const Change<I>*>(a.removed),
        *d = static_cast<const Change<I>*>(a.added);
  Hand hand(a, count);
  int64_t next = 0;  // the pointers before this one are up to date
  for (;;) {
    const I major = r->major < d->major ? r->major : d->major;
    if (major == a.majors) break;
    const int64_t begin = ptr[major], end = ptr[major + 1];
    if (begin < hand.at || begin > end || end > count) return false;
    hand.renew(ptr, next, int64_t{major} + 1);
    next = int64_t{major} + 1;
    if (!hand.skip_to(begin) || !hand.row(r, d, major, end)) return false;
  }
  hand.renew(ptr, next, a.majors + 1);
  return hand.skip_to(count);
}

template <class I>
bool merge(const MergeArgs& a) {
  const int64_t count = static_cast<const I*>(a.ptr)[a.majors],
                after = count - a.n_removed + a.n_added;
  if (count < 0 || count > a.capacity || after < 0 || after > a.capacity) return false;
  if (a.room == nullptr) return merge_with<I, Looker<I>>(a, count);
  if (!merge_with<I, Mover<I>>(a, count)) return false;
  if (after < count) {
    const uint64_t bytes = static_cast<uint64_t>(count - after) * sizeof(I);
    __builtin_memset(static_cast<I*>(a.minor) + after, 0, bytes);
    __builtin_memset(static_cast<I*>(a.slots) + after, 0, bytes);
  }
  return true;
}
