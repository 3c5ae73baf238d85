// The vector kernels of products; compiled once per instruction set by product/kernels_*.cpp.
//
// A batch is a contiguous run that is covered by vectors of W lanes; the last vector is moved back
// so that it ends where the run ends, and computes some elements a second time with the same
// result. So no batch size needs masks or a scalar tail. A batch shorter than the widest vector
// uses the widest one that fits.

namespace {

#include "simd/vectors-inl.h"

#include "simd/narrow-inl.h"

template <class I>
REWIRE_INLINE bool outside(I value, int64_t bound) {
  // One comparison for both ends: a negative number becomes a huge one.
  return static_cast<uint64_t>(static_cast<int64_t>(value)) >= static_cast<uint64_t>(bound);
}

template <class I>
REWIRE_INLINE bool bad_range(I begin, I end, int64_t length) {
  return begin < 0 || begin > end || static_cast<int64_t>(end) > length;
}

template <class T>
REWIRE_INLINE void prefetch_run(const T* run, int64_t count) {
  for (int64_t b = 0; b < count; b += 64 / sizeof(T)) __builtin_prefetch(run + b);
}

// Asks for the memory of `count` connections of a row that comes soon: tiles jump from row to row,
// where the processor's own prefetching loses them.
template <class I>
REWIRE_INLINE void prefetch_row(const List& list, int64_t begin, int64_t count) {
  if (begin < 0 || count > list.length || begin > list.length - count) return;
  const I* idx = static_cast<const I*>(list.idx) + begin;
  const I* slots = static_cast<const I*>(list.slots) + begin;
  for (int64_t k = 0; k < count; k += 64 / sizeof(I)) {
    __builtin_prefetch(idx + k);
    __builtin_prefetch(slots + k);
  }
}

// S: what x is stored as; T: what is computed with, and what values, bias and y are. For NV >= 5
// vectors. Scattered: values are prefetched, as SpmmArgs says.
template <class S, class I, int W, int NV, bool Tiled, bool Scattered>
Status spmm_long(const SpmmArgs& a, const Part& p) {
  using T = Compute<S>;
  using V = Vec<T, W>;
  constexpr int kAhead = 24;
  const I* ptr = static_cast<const I*>(a.list.ptr);
  const I* idx = static_cast<const I*>(a.list.idx);
  const I* slots = static_cast<const I*>(a.list.slots);
  const T* values = static_cast<const T*>(a.values);
  const T* bias = static_cast<const T*>(a.bias);
  const S* x = static_cast<const S*>(a.x) + p.b0;
  T* y = static_cast<T*>(a.y) + p.b0;
  const int64_t features = a.features, capacity = a.capacity, step = a.x_step, last = p.width - W;
  const int64_t until = Tiled && !p.tile->last ? p.tile->end : INT64_MAX,
                furthest = a.list.length - kAhead;
  for (int64_t r = p.row0; r < p.row1; ++r) {
    const bool go_on = Tiled && !p.tile->first;
    const int64_t begin = go_on ? p.tile->next[r] : static_cast<int64_t>(ptr[r]), end = ptr[r + 1];
    if (__builtin_expect(bad_range(begin, end, a.list.length), 0)) return kBadPointer;
    T* out = y + r * a.y_step;
    V acc[NV];
    if (go_on) {
      for (int j = 0; j + 1 < NV; ++j) acc[j] = load<V>(out + j * W);
      acc[NV - 1] = load<V>(out + last);
      if (r + 1 < p.row1) prefetch_run(out + a.y_step, p.width);
    } else {
      for (int j = 0; j < NV; ++j) acc[j] = V{};
      if (bias)
        for (int j = 0; j < NV; ++j) acc[j] += bias[r];
    }
    int64_t i = begin;
    for (; i < end; ++i) {
      const I c = idx[i], s = slots[i];
      if (Tiled && c >= until) break;
      if (__builtin_expect(outside(c, features), 0)) return kBadIndex;
      if (__builtin_expect(outside(s, capacity), 0)) return kBadSlot;
      if constexpr (Scattered) prefetch_value(values, slots[i < furthest ? i + kAhead : i]);
      const T value = values[s];
      const S* run = x + static_cast<int64_t>(c) * step;
      for (int j = 0; j + 1 < NV; ++j) acc[j] += value * load_as<S, W>(run + j * W);
      acc[NV - 1] += value * load_as<S, W>(run + last);
    }
    for (int j = 0; j + 1 < NV; ++j) store(out + j * W, acc[j]);
    store(out + last, acc[NV - 1]);
    if constexpr (Tiled) {
      p.tile->next[r] = i;
      const int64_t* next = p.tile->next;
      const auto start = [&](int64_t row) {
        return go_on ? next[row] : static_cast<int64_t>(ptr[row]);
      };
      if (r + 3 < p.row1) prefetch_row<I>(a.list, start(r + 3), i - begin + 8);
      if (r + 2 < p.row1) {
        const int64_t soon = start(r + 2);
        if (soon >= 0 && soon < a.list.length)
          for (int64_t k = 0; k < i - begin + 8; k += 64 / sizeof(T))
            prefetch_value(values, slots[soon] + k);
      }
    }
  }
  return kFine;
}

// The same for a short batch: enough independent chains of fused multiply-adds to hide their
// latency.
template <class S, class I, int W, int NV>
Status spmm_rows(const SpmmArgs& a, const Part& p) {
  using T = Compute<S>;
  using V = Vec<T, W>;
  constexpr int U = NV >= 3 ? 2 : 4;
  const I* ptr = static_cast<const I*>(a.list.ptr);
  const I* idx = static_cast<const I*>(a.list.idx);
  const I* slots = static_cast<const I*>(a.list.slots);
  const T* values = static_cast<const T*>(a.values);
  const T* bias = static_cast<const T*>(a.bias);
  const S* x = static_cast<const S*>(a.x) + p.b0;
  T* y = static_cast<T*>(a.y) + p.b0;
  const int64_t features = a.features, capacity = a.capacity, step = a.x_step, last = p.width - W;
  for (int64_t r = p.row0; r < p.row1; ++r) {
    const I begin = ptr[r], end = ptr[r + 1];
    if (__builtin_expect(bad_range(begin, end, a.list.length), 0)) return kBadPointer;
    V acc[U][NV];
    for (int u = 0; u < U; ++u)
      for (int j = 0; j < NV; ++j) acc[u][j] = V{};
    if (bias)
      for (int j = 0; j < NV; ++j) acc[0][j] += bias[r];
    int64_t i = begin;
    for (; i + U <= end; i += U) {
      T value[U];
      const S* run[U];
      for (int u = 0; u < U; ++u) {
        const I c = idx[i + u], s = slots[i + u];
        if (__builtin_expect(outside(c, features), 0)) return kBadIndex;
        if (__builtin_expect(outside(s, capacity), 0)) return kBadSlot;
        value[u] = values[s];
        run[u] = x + static_cast<int64_t>(c) * step;
      }
      for (int u = 0; u < U; ++u) {
        for (int j = 0; j + 1 < NV; ++j) acc[u][j] += value[u] * load_as<S, W>(run[u] + j * W);
        acc[u][NV - 1] += value[u] * load_as<S, W>(run[u] + last);
      }
    }
    for (; i < end; ++i) {
      const I c = idx[i], s = slots[i];
      if (__builtin_expect(outside(c, features), 0)) return kBadIndex;
      if (__builtin_expect(outside(s, capacity), 0)) return kBadSlot;
      const T value = values[s];
      const S* run = x + static_cast<int64_t>(c) * step;
      for (int j = 0; j + 1 < NV; ++j) acc[0][j] += value * load_as<S, W>(run + j * W);
      acc[0][NV - 1] += value * load_as<S, W>(run + last);
    }
    for (int half = U / 2; half > 0; half /= 2)
      for (int u = 0; u < half; ++u)
        for (int j = 0; j < NV; ++j) acc[u][j] += acc[u + half][j];
    T* out = y + r * a.y_step;
    for (int j = 0; j + 1 < NV; ++j) store(out + j * W, acc[0][j]);
    store(out + last, acc[0][NV - 1]);
  }
  return kFine;
}

template <class S, class I, int W>
Status spmm_narrow(const SpmmArgs& a, const Part& p) {
  if constexpr (W > 1) {
    if (p.width < W) return spmm_narrow<S, I, W / 2>(a, p);
    if (p.width > W) return spmm_rows<S, I, W, 2>(a, p);
  }
  return spmm_rows<S, I, W, 1>(a, p);
}

template <class S, class I, int W, int NV>
Status spmm_wide(const SpmmArgs& a, const Part& p) {
  if (p.tile)
    return a.scattered ? spmm_long<S, I, W, NV, true, true>(a, p)
                       : spmm_long<S, I, W, NV, true, false>(a, p);
  return a.scattered ? spmm_long<S, I, W, NV, false, true>(a, p)
                     : spmm_long<S, I, W, NV, false, false>(a, p);
}

template <class S, class I>
Status spmm(const SpmmArgs& a, const Part& p) {
  constexpr int W = REWIRE_VECTOR_BYTES / sizeof(Compute<S>);
  switch ((p.width + W - 1) / W) {
    case 1:
      return spmm_narrow<S, I, W>(a, p);
    case 2:
      return spmm_rows<S, I, W, 2>(a, p);
#if defined(__SANITIZE_ADDRESS__)
    case 3:
      return spmm_wide<S, I, W, 3>(a, p);  // tiles come with more than half of a block's vectors
#else
    case 3:
      return spmm_rows<S, I, W, 3>(a, p);
    case 4:
      return spmm_rows<S, I, W, 4>(a, p);
    case 5:
      return spmm_wide<S, I, W, 5>(a, p);
    case 6:
      return spmm_wide<S, I, W, 6>(a, p);
    case 7:
      return spmm_wide<S, I, W, 7>(a, p);
#endif
    default:
      return spmm_wide<S, I, W, kVectorsPerBlock>(a, p);
  }
}

// U connections of one row, whose gradient `g` is in registers. Shifted: the last vector was moved
// back, and its lanes outside `fresh` belong to the vector before it.
template <class S, class I, int W, int NV, bool Shifted, int U>
REWIRE_INLINE Status sddmm_group(const SddmmArgs& a, const Vec<Compute<S>, W>* g,
                                 Mask<Compute<S>, W> fresh, int64_t i, int64_t b0, int64_t last,
                                 bool add) {
  using T = Compute<S>;
  using V = Vec<T, W>;
  const I* idx = static_cast<const I*>(a.list.idx) + i;
  const I* slots = static_cast<const I*>(a.list.slots) + i;
  const S* x = static_cast<const S*>(a.x) + b0;
  T* out = static_cast<T*>(a.out);
  I slot[U];
  V acc[U];
  // Unrolled, for the sums to stay in registers.
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) {
    const I c = idx[u];
    slot[u] = slots[u];
    if (__builtin_expect(outside(c, a.features), 0)) return kBadIndex;
    if (__builtin_expect(outside(slot[u], a.capacity), 0)) return kBadSlot;
    const S* run = x + static_cast<int64_t>(c) * a.x_step;
    acc[u] = V{};
    for (int j = 0; j + 1 < NV; ++j) acc[u] += g[j] * load_as<S, W>(run + j * W);
    V end = load_as<S, W>(run + last);
    if constexpr (Shifted) end = only<T, W>(fresh, end);
    acc[u] += g[NV - 1] * end;
  }
  T sums[U];
  sum_lanes<T, W, U>(acc, sums);
  if (__builtin_expect(add, 0))
    for (int u = 0; u < U; ++u) sums[u] += out[slot[u]];
  for (int u = 0; u < U; ++u) out[slot[u]] = sums[u];
  return kFine;
}

template <class S, class I, int W, int NV, bool Shifted>
Status sddmm_shifted(const SddmmArgs& a, const Part& p, bool add) {
  using T = Compute<S>;
  using V = Vec<T, W>;
  const I* ptr = static_cast<const I*>(a.list.ptr);
  const I* idx = static_cast<const I*>(a.list.idx);
  const int64_t last = p.width - W;
  const Mask<T, W> fresh =
      mask_from<T, W>(static_cast<int>(NV * W - p.width), typename MakePositions<W>::type());
  const Tile* tile = p.tile;
  for (int64_t r = p.row0; r < p.row1; ++r) {
    const I begin = tile && !tile->first ? static_cast<I>(tile->next[r]) : ptr[r], end = ptr[r + 1];
    if (__builtin_expect(bad_range(begin, end, a.list.length), 0)) return kBadPointer;
    const S* row = static_cast<const S*>(a.g) + r * a.g_step + p.b0;
    V g[NV];
    for (int j = 0; j + 1 < NV; ++j) g[j] = load_as<S, W>(row + j * W);
    g[NV - 1] = load_as<S, W>(row + last);
    if (r + 1 < p.row1) prefetch_run(row + a.g_step, p.width);
    if constexpr (Shifted) g[NV - 1] = only<T, W>(fresh, g[NV - 1]);
    // How far a group reaches says whether it belongs to the tile; its sums do not depend on how
    // groups are cut.
    const int64_t until = tile && !tile->last ? tile->end : INT64_MAX;
    int64_t i = begin;
    Status status = kFine;
    if constexpr (W >= 8)
      for (; i + 8 <= end && idx[i + 7] < until && status == kFine; i += 8)
        status = sddmm_group<S, I, W, NV, Shifted, 8>(a, g, fresh, i, p.b0, last, add);
    if constexpr (W >= 4)
      for (; i + 4 <= end && idx[i + 3] < until && status == kFine; i += 4)
        status = sddmm_group<S, I, W, NV, Shifted, 4>(a, g, fresh, i, p.b0, last, add);
    if constexpr (W >= 2)
      for (; i + 2 <= end && idx[i + 1] < until && status == kFine; i += 2)
        status = sddmm_group<S, I, W, NV, Shifted, 2>(a, g, fresh, i, p.b0, last, add);
    for (; i < end && idx[i] < until && status == kFine; ++i)
      status = sddmm_group<S, I, W, NV, Shifted, 1>(a, g, fresh, i, p.b0, last, add);
    if (__builtin_expect(status != kFine, 0)) return status;
    if (tile) {
      tile->next[r] = i;
      if (r + 1 < p.row1)
        prefetch_row<I>(a.list, tile->first ? static_cast<int64_t>(ptr[r + 1]) : tile->next[r + 1],
                        i - begin + 8);
    }
  }
  return kFine;
}

template <class S, class I, int W, int NV>
Status sddmm_rows(const SddmmArgs& a, const Part& p, bool add) {
  if constexpr (NV > 1) {
    if (p.width < NV * W) return sddmm_shifted<S, I, W, NV, true>(a, p, add);
  }
  return sddmm_shifted<S, I, W, NV, false>(a, p, add);
}

template <class S, class I, int W>
Status sddmm_narrow(const SddmmArgs& a, const Part& p, bool add) {
  if constexpr (W > 1) {
    if (p.width < W) return sddmm_narrow<S, I, W / 2>(a, p, add);
    if (p.width > W) return sddmm_rows<S, I, W, 2>(a, p, add);
  }
  return sddmm_rows<S, I, W, 1>(a, p, add);
}

template <class S, class I>
Status sddmm(const SddmmArgs& a, const Part& p, bool add) {
  constexpr int W = REWIRE_VECTOR_BYTES / sizeof(Compute<S>);
  switch ((p.width + W - 1) / W) {
    case 1:
      return sddmm_narrow<S, I, W>(a, p, add);
    case 2:
      return sddmm_rows<S, I, W, 2>(a, p, add);
    case 3:
      return sddmm_rows<S, I, W, 3>(a, p, add);
#if !defined(__SANITIZE_ADDRESS__)
    case 4:
      return sddmm_rows<S, I, W, 4>(a, p, add);
    case 5:
      return sddmm_rows<S, I, W, 5>(a, p, add);
    case 6:
      return sddmm_rows<S, I, W, 6>(a, p, add);
    case 7:
      return sddmm_rows<S, I, W, 7>(a, p, add);
#endif
    default:
      return sddmm_rows<S, I, W, kVectorsPerBlock>(a, p, add);
  }
}

#include "product/fused-inl.h"

// dst[r * dst_step + c] = src[r + c * col_step] for one block of W x W elements, through registers.
template <class T, int W>
REWIRE_INLINE void transpose_block(const CopyArgs& a, int64_t r, int64_t c) {
  using V = Vec<T, W>;
  const T* src = static_cast<const T*>(a.src) + r + c * a.col_step;
  T* dst = static_cast<T*>(a.dst) + r * a.dst_step + c;
  V v[W];
  for (int k = 0; k < W; ++k) v[k] = load<V>(src + k * a.col_step);
  if constexpr (W > 1) transpose_steps<T, W, W / 2>(v);
  for (int k = 0; k < W; ++k) store(dst + k * a.dst_step, v[k]);
}

// The last blocks are moved back. The order of blocks follows whichever of the two memories has the
// longer stride, so that its pages are visited once for all of the rows here, not once for every
// few of them.
template <class T, int W>
void transpose_rows(const CopyArgs& a, int64_t row0, int64_t row1) {
  if constexpr (W > 1) {
    if (row1 - row0 < W || a.cols < W) return transpose_rows<T, W / 2>(a, row0, row1);
  }
  const int64_t last_row = row1 - W, last_col = a.cols - W;
  if (a.col_step > a.dst_step) {
    for (int64_t c = 0; c < a.cols; c += W)
      for (int64_t r = row0; r < row1; r += W)
        transpose_block<T, W>(a, r < last_row ? r : last_row, c < last_col ? c : last_col);
  } else {
    for (int64_t r = row0; r < row1; r += W)
      for (int64_t c = 0; c < a.cols; c += W)
        transpose_block<T, W>(a, r < last_row ? r : last_row, c < last_col ? c : last_col);
  }
}

template <class T>
void copy(const CopyArgs& a, int64_t row0, int64_t row1) {
  if (row0 >= row1 || a.cols == 0) return;
  const T* src = static_cast<const T*>(a.src);
  T* dst = static_cast<T*>(a.dst);
  if (a.col_step == 1) {
    for (int64_t r = row0; r < row1; ++r)
      __builtin_memcpy(dst + r * a.dst_step, src + r * a.row_step,
                       static_cast<uint64_t>(a.cols) * sizeof(T));
  } else if (a.col_step == 0) {
    for (int64_t r = row0; r < row1; ++r)
      for (int64_t c = 0; c < a.cols; ++c) dst[r * a.dst_step + c] = src[r * a.row_step];
  } else if (a.row_step == 1) {
    constexpr int W = REWIRE_VECTOR_BYTES / sizeof(T);
    transpose_rows<T, (W < 16 ? W : 16)>(a, row0, row1);
  } else {
    for (int64_t r = row0; r < row1; ++r)
      for (int64_t c = 0; c < a.cols; ++c)
        dst[r * a.dst_step + c] = src[r * a.row_step + c * a.col_step];
  }
}

}  // namespace

const ProductKernels kProducts = {
    {REWIRE_VECTOR_BYTES / 4, REWIRE_VECTOR_BYTES / 8, REWIRE_VECTOR_BYTES / 4,
     REWIRE_VECTOR_BYTES / 4},
    {{spmm<float, int32_t>, spmm<float, int64_t>},
     {spmm<double, int32_t>, spmm<double, int64_t>},
     {spmm<BFloat16, int32_t>, spmm<BFloat16, int64_t>},
     {spmm<Float16, int32_t>, spmm<Float16, int64_t>}},
    {{sddmm<float, int32_t>, sddmm<float, int64_t>},
     {sddmm<double, int32_t>, sddmm<double, int64_t>},
     {sddmm<BFloat16, int32_t>, sddmm<BFloat16, int64_t>},
     {sddmm<Float16, int32_t>, sddmm<Float16, int64_t>}},
    {{fused<float, int32_t>, fused<float, int64_t>},
     {fused<double, int32_t>, fused<double, int64_t>},
     {fused<BFloat16, int32_t>, fused<BFloat16, int64_t>},
     {fused<Float16, int32_t>, fused<Float16, int64_t>}},
    {widen<BFloat16>, widen<Float16>},
    {narrow<BFloat16>, narrow<Float16>},
    {copy<float>, copy<double>, copy<int16_t>, copy<int16_t>},
};
