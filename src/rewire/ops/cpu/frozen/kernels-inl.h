// The kernels for frozen weights; compiled once per instruction set by frozen/kernels.cpp.

namespace {

#include "simd/vectors-inl.h"

// Rows of the weight whose results are kept, to be written as rows of y.
constexpr int kTile = 16;
// Connections that one sum takes at once: those of an int8 weight are widened.
constexpr int64_t kPiece = 1024;
// Columns that are copied together.
constexpr int64_t kAhead = 2 * kPiece;

// A number as it is now, which the compiler must not read again.
template <class I>
REWIRE_INLINE I now(const void* list, int64_t at) {
  return __atomic_load_n(static_cast<const I*>(list) + at, __ATOMIC_RELAXED);
}

REWIRE_INLINE int64_t pointer(const FrozenWeight& w, int64_t at) {
  return w.wide ? now<int64_t>(w.ptr, at) : now<int32_t>(w.ptr, at);
}

REWIRE_INLINE void widen(const int8_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// Lanes of a sum over one row of x.
constexpr int kOne = 8;

// The connections of one segment of a row after the other, in pieces. Each pointer and each column
// is read once, into memory of its own, and checked there: another thread may write to the lists.
template <class Col, int Value>
class Pieces {
  using Unsigned = typename UnsignedOf<sizeof(Col)>::type;

 public:
  Pieces(const FrozenWeight& w, int64_t first, int64_t last)
      : w_(w), next_(pointer(w, first)), stop_(pointer(w, last)) {
    if (stop_ > w.connections) stop_ = w.connections;
    for (int u = 0; u < kOne; ++u) columns_[u] = 0;
    for (int u = 0; u < kOne; ++u) wide_[u] = 0.0f;
  }

  // Calls add(columns, values, n, before) for the pieces of the segment whose last pointer is at
  // `at + 1`. Whether `before`, kOne columns and values in front of the last can be read.
  template <class Add>
  __attribute__((always_inline)) Status segment(int64_t at, const Add& add) {
    const int64_t begin = next_, end = pointer(w_, at + 1);
    if (begin < 0 || end < begin || end > w_.connections) return kBadPointer;
    next_ = end;
    for (int64_t k = begin; k < end; k += kPiece) {
      const int64_t n = end - k < kPiece ? end - k : kPiece;
      if (k + n > read_ && !read(k, n)) return kBadIndex;
      const Col* cols = columns_ + kOne + (k - from_);
      if constexpr (Value == kFrozenInt8) {
        widen(static_cast<const int8_t*>(w_.values) + k, wide_ + kOne, n);
        add(cols, static_cast<const float*>(wide_ + kOne), n, true);
      } else if constexpr (Value == kFrozenTernary) {
        add(cols, static_cast<const float*>(nullptr), n, true);
      } else {
        add(cols, static_cast<const float*>(w_.values) + k, n, k + n >= kOne);
      }
    }
    return kFine;
  }

 private:
  // Columns from k on: n of them, and more that will be wanted next. Whether x has all of them.
  bool read(int64_t k, int64_t n) {
    read_ = k + kAhead < stop_ ? k + kAhead : stop_;
    if (read_ < k + n) read_ = k + n;
    from_ = k;
    return static_cast<int64_t>(copy(static_cast<const Col*>(w_.cols) + k, read_ - k)) <
           w_.features;
  }

  // The largest of n columns, which come into columns_; a negative column is a large number.
  Unsigned copy(const Col* from, int64_t n) {
    constexpr int W = REWIRE_VECTOR_BYTES / sizeof(Col);
    using V = Vec<Unsigned, W>;
    V most = {};
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      V cols = load<V>(from + i);
      keep(cols);
      store(columns_ + kOne + i, cols);
      most = cols > most ? cols : most;
    }
    Unsigned found = 0;
    for (int u = 0; u < W; ++u) found = most[u] > found ? most[u] : found;
    for (; i < n; ++i) {
      const Col col = now<Col>(from, i);
      columns_[kOne + i] = col;
      found = static_cast<Unsigned>(col) > found ? static_cast<Unsigned>(col) : found;
    }
    return found;
  }

  const FrozenWeight& w_;
  int64_t next_, stop_;
  int64_t from_ = 0, read_ = -1;  // what of the columns is here
  Col columns_[kOne + kAhead];
  float wide_[Value == kFrozenInt8 ? kOne + kPiece : kOne];
};

// --- one row of x
// ---------------------------------------------------------------------------------------------------

using One = Vec<float, kOne>;
using Lanes8 = MakePositions<kOne>::type;

// Single numbers are loaded: instructions that gather are no faster on many processors, and several
// times slower where microcode guards them against data sampling.
template <class Col, int... P>
REWIRE_INLINE One found(const Col* cols, const float* x, Positions<P...>) {
  return One{x[cols[P]]...};
}

// The sum of values[k] * x[cols[k]], or of x[cols[k]] without values, spread over lanes. Rows are
// short, and a loop over the rest would be guessed wrong for most of them: where what is `before`
// can be read, the last lanes are taken again, and what is in the sum already or belongs to the row
// before is cleared.
template <bool Weighted, class Col>
REWIRE_INLINE One one_run(const Col* cols, const float* values, int64_t n, const float* x,
                          bool before) {
  One sum = {};
  const auto part = [&](int64_t k) {
    const One terms = found(cols + k, x, Lanes8());
    if constexpr (Weighted)
      return terms * load<One>(values + k);
    else
      return terms;
  };
  int64_t k = 0;
  for (; k + kOne <= n; k += kOne) sum += part(k);
  if (k == n) return sum;
  if (before)
    return sum +
           only<float, kOne>(mask_from<float, kOne>(static_cast<int>(kOne - (n - k)), Lanes8()),
                             part(n - kOne));
  float rest[kOne] = {};
  for (int u = 0; k < n; ++k, ++u) rest[u] = Weighted ? values[k] * x[cols[k]] : x[cols[k]];
  return sum + load<One>(rest);
}

template <int Value>
REWIRE_INLINE int64_t segments() {
  return Value == kFrozenTernary ? 2 : 1;
}

template <class Col, int Value>
Status one_rows(const FrozenWeight& w, const FrozenPart& p, int64_t row0, int64_t row1) {
  constexpr int W = sizeof(One) / sizeof(float);
  constexpr bool kWeighted = Value != kFrozenTernary;
  const int64_t each = segments<Value>();
  Pieces<Col, Value> pieces(w, each * row0, each * row1);
  Status status = kFine;
  const auto sum = [&](int64_t at, One& total) {
    status = pieces.segment(at, [&](const Col* cols, const float* values, int64_t n, bool before) {
      total += one_run<kWeighted>(cols, values, n, p.x, before);
    });
    return status == kFine;
  };
  for (int64_t r = row0; r < row1; r += W) {
    const int n = static_cast<int>(row1 - r < W ? row1 - r : W);
    One found[W] = {};
    for (int i = 0; i < n; ++i) {
      if (!sum(each * (r + i), found[i])) return status;
      if constexpr (Value == kFrozenTernary) {
        One less = {};
        if (!sum(each * (r + i) + 1, less)) return status;
        found[i] -= less;
      }
    }
    float sums[W];
    sum_lanes<float, W, W>(found, sums);
    for (int i = 0; i < n; ++i) {
      const float scaled = w.scale == nullptr ? sums[i] : sums[i] * w.scale[r + i];
      p.y[r + i] = w.bias == nullptr ? scaled : scaled + w.bias[r + i];
    }
  }
  return kFine;
}

// --- panels: several rows of x
// ----------------------------------------------------------------------------------------

template <int L, int N>
void fill(const FrozenFill& f, int64_t first, int64_t last) {
  using V = Vec<float, L>;
  constexpr int64_t kWidth = L * N;
  for (int64_t b0 = 0; b0 < kWidth; b0 += L) {
    int64_t at = first;
    const int64_t rows = f.batch - b0;  // of x that there are
    if (f.col_step == 1) {
      for (; at + L <= last; at += L) {
        V block[L];
        for (int i = 0; i < L; ++i)
          block[i] = i < rows ? load<V>(f.x + (b0 + i) * f.row_step + at) : V{};
        transpose_steps<float, L, L / 2>(block);
        for (int i = 0; i < L; ++i) store(f.panel + (at + i) * kWidth + b0, block[i]);
      }
    } else if (f.row_step == 1 && rows >= L) {
      for (; at < last; ++at)
        store(f.panel + at * kWidth + b0, load<V>(f.x + at * f.col_step + b0));
    }
    for (; at < last; ++at)
      for (int64_t i = 0; i < L; ++i)
        f.panel[at * kWidth + b0 + i] =
            i < rows ? f.x[(b0 + i) * f.row_step + at * f.col_step] : 0.0f;
  }
}

template <bool Weighted, int L, int N, class Col>
REWIRE_INLINE void panel_run(const Col* cols, const float* values, int64_t n, const float* x,
                             Vec<float, L>* sums) {
  using V = Vec<float, L>;
  // So many sums side by side that no addition waits for the one before.
  constexpr int U = N == 1 ? 4 : N <= 3 ? 2 : 1;
  V part[U][N] = {};
  const auto add = [&](int64_t k, int u) {
    const float* from = x + static_cast<int64_t>(cols[k]) * (L * N);
    for (int j = 0; j < N; ++j) {
      if constexpr (Weighted)
        part[u][j] += load<V>(from + j * L) * values[k];
      else
        part[u][j] += load<V>(from + j * L);
    }
  };
  int64_t k = 0;
  for (; k + U <= n; k += U)
    for (int u = 0; u < U; ++u) add(k + u, u);
  for (; k < n; ++k) add(k, 0);
  for (int u = 0; u < U; ++u)
    for (int j = 0; j < N; ++j) sums[j] += part[u][j];
}

template <class Col, int Value, int L, int N>
Status panel_rows(const FrozenWeight& w, const FrozenPart& p, int64_t row0, int64_t row1) {
  using V = Vec<float, L>;
  constexpr bool kWeighted = Value != kFrozenTernary;
  constexpr int64_t kWidth = L * N;
  const int64_t each = segments<Value>();
  Pieces<Col, Value> pieces(w, each * row0, each * row1);
  Status status = kFine;
  const auto sum = [&](int64_t at, V* sums) {
    status = pieces.segment(at, [&](const Col* cols, const float* values, int64_t n, bool) {
      panel_run<kWeighted, L, N>(cols, values, n, p.x, sums);
    });
    return status == kFine;
  };
  float tile[kTile * kWidth];
  for (int64_t r = row0; r < row1; r += kTile) {
    const int rows = static_cast<int>(row1 - r < kTile ? row1 - r : kTile);
    for (int i = 0; i < rows; ++i) {
      V sums[N] = {};
      if (!sum(each * (r + i), sums)) return status;
      if constexpr (Value == kFrozenTernary) {
        V less[N] = {};
        if (!sum(each * (r + i) + 1, less)) return status;
        for (int j = 0; j < N; ++j) sums[j] -= less[j];
      }
      for (int j = 0; j < N; ++j) {
        if (w.scale != nullptr) sums[j] *= w.scale[r + i];
        if (w.bias != nullptr) sums[j] += w.bias[r + i];
        store(tile + i * kWidth + j * L, sums[j]);
      }
    }
    int i = 0;
    for (; i + L <= rows; i += L) {
      for (int64_t b0 = 0; b0 < p.batch; b0 += L) {
        V block[L];
        for (int l = 0; l < L; ++l) block[l] = load<V>(tile + (i + l) * kWidth + b0);
        transpose_steps<float, L, L / 2>(block);
        for (int l = 0; l < L && b0 + l < p.batch; ++l)
          store(p.y + (b0 + l) * p.y_step + r + i, block[l]);
      }
    }
    for (; i < rows; ++i)
      for (int64_t b = 0; b < p.batch; ++b) p.y[b * p.y_step + r + i] = tile[i * kWidth + b];
  }
  return kFine;
}

template <int L, int N>
constexpr FrozenPanel panel() {
  return {L * N,
          fill<L, N>,
          {{panel_rows<uint16_t, kFrozenFloat, L, N>, panel_rows<uint16_t, kFrozenInt8, L, N>,
            panel_rows<uint16_t, kFrozenTernary, L, N>},
           {panel_rows<int32_t, kFrozenFloat, L, N>, panel_rows<int32_t, kFrozenInt8, L, N>,
            panel_rows<int32_t, kFrozenTernary, L, N>}}};
}

}  // namespace

const FrozenKernels kFrozen = {
    {{one_rows<uint16_t, kFrozenFloat>, one_rows<uint16_t, kFrozenInt8>,
      one_rows<uint16_t, kFrozenTernary>},
     {one_rows<int32_t, kFrozenFloat>, one_rows<int32_t, kFrozenInt8>,
      one_rows<int32_t, kFrozenTernary>}},
#if REWIRE_VECTOR_BYTES == 64
    6,
    {panel<4, 1>(), panel<8, 1>(), panel<16, 1>(), panel<16, 2>(), panel<16, 3>(), panel<16, 4>()}};
#elif REWIRE_VECTOR_BYTES == 32
    7,
    {panel<4, 1>(), panel<8, 1>(), panel<8, 2>(), panel<8, 3>(), panel<8, 4>(), panel<8, 6>(),
     panel<8, 8>()}};
#else
    6,
    {panel<4, 1>(), panel<4, 2>(), panel<4, 3>(), panel<4, 4>(), panel<4, 6>(), panel<4, 8>()}};
#endif
