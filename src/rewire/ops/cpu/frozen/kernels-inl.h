// The kernels for frozen weights; compiled once per instruction set by frozen/kernels.cpp.

namespace {

#include "simd/vectors-inl.h"

// Rows of the weight whose results are kept, to be written as rows of y.
constexpr int kTile = 16;
// Connections of an int8 weight that are widened at once.
constexpr int64_t kWidened = 1024;

REWIRE_INLINE int64_t pointer(const FrozenWeight& w, int64_t at) {
  return w.wide ? static_cast<const int64_t*>(w.ptr)[at] : static_cast<const int32_t*>(w.ptr)[at];
}

// Whether the pointers from `first` to `last` ascend within the connections, and their columns are
// features.
template <class Col>
Status check(const FrozenWeight& w, int64_t first, int64_t last) {
  const int64_t begin = pointer(w, first), end = pointer(w, last);
  if (begin < 0 || end > w.connections) return kBadPointer;
  int64_t before = begin;
  for (int64_t at = first + 1; at <= last; ++at) {
    const int64_t now = pointer(w, at);
    if (now < before) return kBadPointer;
    before = now;
  }
  const Col* cols = static_cast<const Col*>(w.cols);
  // A negative column is a large number here.
  if constexpr (sizeof(Col) == 2) {
    uint16_t most = 0;
    for (int64_t k = begin; k < end; ++k) most = cols[k] > most ? cols[k] : most;
    return begin < end && most >= w.features ? kBadIndex : kFine;
  } else {
    uint32_t most = 0;
    for (int64_t k = begin; k < end; ++k) {
      const uint32_t col = static_cast<uint32_t>(cols[k]);
      most = col > most ? col : most;
    }
    return begin < end && static_cast<int64_t>(most) >= w.features ? kBadIndex : kFine;
  }
}

REWIRE_INLINE void widen(const int8_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// --- one row of x
// ---------------------------------------------------------------------------------------------------

// Lanes of a sum over one row of x.
constexpr int kOne = 8;
using One = Vec<float, kOne>;
using Lanes8 = MakePositions<kOne>::type;

// Single numbers are loaded: instructions that gather are no faster on many processors, and several
// times slower where microcode guards them against data sampling.
template <class Col, int... P>
REWIRE_INLINE One found(const Col* cols, const float* x, Positions<P...>) {
  return One{x[cols[P]]...};
}

// The sum of values[k] * x[cols[k]], or of x[cols[k]] without values, spread over lanes. Rows are
// short, and a loop over the rest would be guessed wrong for most of them: the last lanes are taken
// again from `first` on, the first column that has been checked, and what is in the sum already or
// belongs to the row before is cleared.
template <bool Weighted, class Col>
REWIRE_INLINE One one_run(const Col* first, const Col* cols, const float* values, int64_t n,
                          const float* x) {
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
  if (cols + n - first >= kOne)
    return sum +
           only<float, kOne>(mask_from<float, kOne>(static_cast<int>(kOne - (n - k)), Lanes8()),
                             part(n - kOne));
  float rest[kOne] = {};
  for (int u = 0; k < n; ++k, ++u) rest[u] = Weighted ? values[k] * x[cols[k]] : x[cols[k]];
  return sum + load<One>(rest);
}

// Calls add(columns, values, n) for the connections from begin to end, int8 values widened in
// pieces.
template <int Value, class Col, class Add>
REWIRE_INLINE void in_pieces(const FrozenWeight& w, int64_t begin, int64_t end, const Add& add) {
  const Col* cols = static_cast<const Col*>(w.cols);
  if constexpr (Value == kFrozenInt8) {
    float room[kOne + kWidened];
    for (int u = 0; u < kOne; ++u) room[u] = 0.0f;  // read before the first, and cleared then
    float* const wide = room + kOne;
    for (int64_t k = begin; k < end; k += kWidened) {
      const int64_t n = end - k < kWidened ? end - k : kWidened;
      widen(static_cast<const int8_t*>(w.values) + k, wide, n);
      add(cols + k, static_cast<const float*>(wide), n);
    }
  } else {
    const float* values =
        Value == kFrozenTernary ? nullptr : static_cast<const float*>(w.values) + begin;
    add(cols + begin, values, end - begin);
  }
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
  const Status status = check<Col>(w, each * row0, each * row1);
  if (status != kFine) return status;
  const Col* first = static_cast<const Col*>(w.cols) + pointer(w, each * row0);
  const auto sum = [&](int64_t at) {
    One total = {};
    in_pieces<Value, Col>(w, pointer(w, at), pointer(w, at + 1),
                          [&](const Col* cols, const float* values, int64_t n) {
                            total += one_run<kWeighted>(first, cols, values, n, p.x);
                          });
    return total;
  };
  for (int64_t r = row0; r < row1; r += W) {
    const int n = static_cast<int>(row1 - r < W ? row1 - r : W);
    One found[W] = {};
    for (int i = 0; i < n; ++i) {
      found[i] = sum(each * (r + i));
      if constexpr (Value == kFrozenTernary) found[i] -= sum(each * (r + i) + 1);
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
  const Status status = check<Col>(w, each * row0, each * row1);
  if (status != kFine) return status;
  const auto sum = [&](int64_t at, V* sums) {
    in_pieces<Value, Col>(w, pointer(w, at), pointer(w, at + 1),
                          [&](const Col* cols, const float* values, int64_t n) {
                            panel_run<kWeighted, L, N>(cols, values, n, p.x, sums);
                          });
  };
  float tile[kTile * kWidth];
  for (int64_t r = row0; r < row1; r += kTile) {
    const int rows = static_cast<int>(row1 - r < kTile ? row1 - r : kTile);
    for (int i = 0; i < rows; ++i) {
      V sums[N] = {};
      sum(each * (r + i), sums);
      if constexpr (Value == kFrozenTernary) {
        V less[N] = {};
        sum(each * (r + i) + 1, less);
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
