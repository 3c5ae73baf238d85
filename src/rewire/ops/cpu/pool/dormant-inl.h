// Positions that are not in an index list, found by their rank; included by kernels-inl.h. See
// DormantArgs.

// How many of the `count` numbers of a row come before `bound`; with `Gaps`, row[k] - k is what is
// compared. `guess` is where they would end in an even spread: nearly always two blocks there say
// it. `readable`: numbers from the row's first on that may be read, with what follows the row.
template <class I, bool Gaps = false>
REWIRE_INLINE int64_t count_less(const I* row, int64_t count, int64_t readable, int64_t guess,
                                 int64_t bound) {
  constexpr int64_t kBlock = 64 / sizeof(I), kBoth = 2 * kBlock;
  int64_t low = 0, high = count;
  if (readable >= kBoth) {
    // Whole lines of memory, the first of which begins half a line before the guess at least.
    int64_t from = guess - kBlock / 2;
    from -= static_cast<int64_t>(
        (reinterpret_cast<uintptr_t>(row) / sizeof(I) + static_cast<uint64_t>(from)) % kBlock);
    from = from < readable - kBoth ? from : readable - kBoth;
    from = from > 0 ? from : 0;
    const int64_t less =
        leading_less<I, 2, Gaps>(row + from, static_cast<I>(bound + (Gaps ? from : 0)));
    const int64_t found = from + less;
    if (__builtin_expect((less > 0 || from == 0) && (less < kBoth || found >= count), 1))
      return found < count ? found : count;
    if (less == 0)
      high = from;
    else
      low = found;
  }
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (static_cast<int64_t>(row[middle]) - (Gaps ? middle : 0) < bound)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Asks for what `count_less` reads.
template <class I>
REWIRE_INLINE void prefetch_guess(const I* row, int64_t guess) {
  constexpr int64_t kBlock = 64 / sizeof(I);
  prefetch_value(row, guess - kBlock / 2);
  prefetch_value(row, guess + kBlock / 2);
}

// Looks for ranks among the dormant positions of some rows.
template <class I>
struct Dormant {
  const I *ptr, *cols;
  int64_t rows, length, n_cols;

  REWIRE_METHOD explicit Dormant(const DormantArgs& a)
      : ptr(static_cast<const I*>(a.ptr)),
        cols(static_cast<const I*>(a.cols)),
        rows(a.rows),
        length(a.length),
        n_cols(a.n_cols) {}

  REWIRE_METHOD int64_t before(int64_t row) const { return row * n_cols - ptr[row]; }

  // The last row with before(row) <= rank, for ranks below before(rows); those behind `guess` are
  // tried first.
  REWIRE_METHOD int64_t row_of(int64_t rank, int64_t guess) const {
    int64_t low = before(guess) <= rank ? guess : 0, high = rows - 1;
    for (int tries = 0; tries < 8; ++tries, ++low)
      if (low == high || before(low + 1) > rank) return low;
    while (low < high) {
      const int64_t middle = high - (high - low) / 2;
      if (before(middle) <= rank)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }

  // Where the nth dormant column of a row of `count` connections would be in an even spread: that
  // many are before it.
  REWIRE_METHOD int64_t guess(int64_t count, int64_t nth) const {
    const double free = static_cast<double>(n_cols > count ? n_cols - count : 1);
    const double before = static_cast<double>(nth) * static_cast<double>(count) / free;
    return before < static_cast<double>(count) ? static_cast<int64_t>(before) : count;
  }
};

// Rows are looked for first, and their memory is asked for.
template <class I>
Status dormant(const DormantArgs& a, const int64_t* ranks, int64_t n, int64_t* row, int64_t* col) {
  constexpr int64_t kSome = 16;
  const Dormant<I> list(a);
  const int64_t end = a.dormant;
  // What was checked of a row is kept until its columns are read: another thread may write to the
  // list.
  struct Found {
    int64_t begin, count, nth, guess;
  };
  Found found[2][kSome];
  int64_t last = 0;
  const auto ask = [&](int64_t first) __attribute__((always_inline)) {
    for (int64_t i = first; i < n && i < first + kSome; ++i) {
      if (ranks[i] < 0) return kBadIndex;
      if (ranks[i] >= end) continue;
      last = row[i] = list.row_of(ranks[i], last);
      const int64_t begin = __atomic_load_n(list.ptr + last, __ATOMIC_RELAXED);
      const int64_t count = __atomic_load_n(list.ptr + last + 1, __ATOMIC_RELAXED) - begin;
      if (begin < 0 || count < 0 || begin > list.length - count) return kBadPointer;
      const int64_t nth = ranks[i] - (last * list.n_cols - begin), here = list.guess(count, nth);
      found[first / kSome % 2][i - first] = {begin, count, nth, here};
      prefetch_guess(list.cols + begin, here);
    }
    return kFine;
  };
  Status status = ask(0);
  for (int64_t first = 0; first < n && status == kFine; first += kSome) {
    status = ask(first + kSome);
    if (status != kFine) break;
    for (int64_t i = first; i < n && i < first + kSome; ++i) {
      if (ranks[i] >= end) continue;
      const auto [begin, count, nth, here] = found[first / kSome % 2][i - first];
      col[i] =
          nth + count_less<I, true>(list.cols + begin, count, list.length - begin, here, nth + 1);
    }
  }
  return status;
}
