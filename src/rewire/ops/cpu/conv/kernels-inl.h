// The vector kernels of convolutions; compiled once per instruction set by conv/kernels.cpp.
//
// They run over packed scratch that the driver owns: runs are contiguous over (width, batch),
// offsets were checked when they were made, and every run has a vector's length of slack behind it,
// so that the last vector may read and write past the end instead of needing a scalar tail.

namespace {

#include "simd/vectors-inl.h"

template <class T, int W, int NV>
void conv_sum_block(const ConvArgs& a, int64_t row0, int64_t row1, int64_t start) {
  using V = Vec<T, W>;
  // Enough independent chains of fused multiply-adds to hide their latency, also for a short run.
  constexpr int U = NV >= 5 ? 1 : NV >= 3 ? 2 : 4;
  const T* values = static_cast<const T*>(a.values);
  const T* bias = static_cast<const T*>(a.bias);
  const T* x = static_cast<const T*>(a.x) + start;
  T* y = static_cast<T*>(a.y) + start;
  for (int64_t r = row0; r < row1; ++r) {
    V acc[U][NV];
    for (int u = 0; u < U; ++u)
      for (int j = 0; j < NV; ++j) acc[u][j] = V{};
    if (bias)
      for (int j = 0; j < NV; ++j) acc[0][j] += bias[r];
    const int64_t end = a.ptr[r + 1];
    int64_t i = a.ptr[r];
    for (; i + U <= end; i += U)
      for (int u = 0; u < U; ++u) {
        const T* run = x + a.offsets[i + u] * a.scale;
        const T value = values[i + u];
        for (int j = 0; j < NV; ++j) acc[u][j] += value * load<V>(run + j * W);
      }
    if constexpr (U > 1) {
      for (; i < end; ++i) {
        const T* run = x + a.offsets[i] * a.scale;
        const T value = values[i];
        for (int j = 0; j < NV; ++j) acc[0][j] += value * load<V>(run + j * W);
      }
      for (int half = U / 2; half > 0; half /= 2)
        for (int u = 0; u < half; ++u)
          for (int j = 0; j < NV; ++j) acc[u][j] += acc[u + half][j];
    }
    for (int j = 0; j < NV; ++j) store(y + r * a.y_step + j * W, acc[0][j]);
  }
}

template <class T>
void conv_sum(const ConvArgs& a, int64_t row0, int64_t row1, int64_t n) {
  constexpr int W = REWIRE_VECTOR_BYTES / sizeof(T);
  const int64_t vectors = (n + W - 1) / W,
                blocks = (vectors + kVectorsPerBlock - 1) / kVectorsPerBlock;
  // Blocks are the outer loop: the part of the source that one of them reads stays in the cache for
  // all rows.
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = vectors * block / blocks, start = first * W;
    switch (vectors * (block + 1) / blocks - first) {
      case 1:
        conv_sum_block<T, W, 1>(a, row0, row1, start);
        break;
      case 2:
        conv_sum_block<T, W, 2>(a, row0, row1, start);
        break;
      case 3:
        conv_sum_block<T, W, 3>(a, row0, row1, start);
        break;
#if !defined(__SANITIZE_ADDRESS__)
      case 4:
        conv_sum_block<T, W, 4>(a, row0, row1, start);
        break;
      case 5:
        conv_sum_block<T, W, 5>(a, row0, row1, start);
        break;
      case 6:
        conv_sum_block<T, W, 6>(a, row0, row1, start);
        break;
      case 7:
        conv_sum_block<T, W, 7>(a, row0, row1, start);
        break;
#endif
      default:
        conv_sum_block<T, W, kVectorsPerBlock>(a, row0, row1, start);
        break;
    }
  }
}

// U connections of one row, whose gradient `g` is in registers. Masked: only some lanes of the last
// vector count.
template <class T, int W, int NV, bool Masked, int U>
REWIRE_INLINE void conv_dot_group(const ConvArgs& a, const T* x, const Vec<T, W>* g,
                                  Mask<T, W> counted, int64_t i) {
  using V = Vec<T, W>;
  T* out = static_cast<T*>(a.sums) + i;
  V acc[U];
  for (int u = 0; u < U; ++u) {
    const T* run = x + a.offsets[i + u] * a.scale;
    V end = load<V>(run + (NV - 1) * W);
    if constexpr (Masked) end = only<T, W>(counted, end);
    acc[u] = g[NV - 1] * end;
    for (int j = 0; j + 1 < NV; ++j) acc[u] += g[j] * load<V>(run + j * W);
  }
  T sums[U];
  sum_lanes<T, W, U>(acc, sums);
  for (int u = 0; u < U; ++u) out[u] += sums[u];
}

template <class T, int W, int NV, bool Masked>
void conv_dot_block(const ConvArgs& a, int64_t row0, int64_t row1, int64_t start, int64_t width) {
  using V = Vec<T, W>;
  const T* x = static_cast<const T*>(a.x) + start;
  const Mask<T, W> skipped =
      mask_from<T, W>(static_cast<int>(width - (NV - 1) * W), typename MakePositions<W>::type());
  const Mask<T, W> counted = ~skipped;
  for (int64_t r = row0; r < row1; ++r) {
    const T* row = static_cast<const T*>(a.y) + r * a.y_step + start;
    V g[NV];
    for (int j = 0; j < NV; ++j) g[j] = load<V>(row + j * W);
    if constexpr (Masked) g[NV - 1] = only<T, W>(counted, g[NV - 1]);
    const int64_t end = a.ptr[r + 1];
    int64_t i = a.ptr[r];
    if constexpr (W >= 8)
      for (; i + 8 <= end; i += 8) conv_dot_group<T, W, NV, Masked, 8>(a, x, g, counted, i);
    if constexpr (W >= 4)
      for (; i + 4 <= end; i += 4) conv_dot_group<T, W, NV, Masked, 4>(a, x, g, counted, i);
    for (; i + 2 <= end; i += 2) conv_dot_group<T, W, NV, Masked, 2>(a, x, g, counted, i);
    for (; i < end; ++i) conv_dot_group<T, W, NV, Masked, 1>(a, x, g, counted, i);
  }
}

template <class T, int NV>
void conv_dot_either(const ConvArgs& a, int64_t row0, int64_t row1, int64_t start, int64_t width) {
  constexpr int W = REWIRE_VECTOR_BYTES / sizeof(T);
  if (width < NV * W)
    conv_dot_block<T, W, NV, true>(a, row0, row1, start, width);
  else
    conv_dot_block<T, W, NV, false>(a, row0, row1, start, NV * W);
}

template <class T>
void conv_dot(const ConvArgs& a, int64_t row0, int64_t row1, int64_t n) {
  constexpr int W = REWIRE_VECTOR_BYTES / sizeof(T);
  const int64_t vectors = (n + W - 1) / W,
                blocks = (vectors + kVectorsPerBlock - 1) / kVectorsPerBlock;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = vectors * block / blocks, start = first * W, width = n - start;
    switch (vectors * (block + 1) / blocks - first) {
      case 1:
        conv_dot_either<T, 1>(a, row0, row1, start, width);
        break;
      case 2:
        conv_dot_either<T, 2>(a, row0, row1, start, width);
        break;
      case 3:
        conv_dot_either<T, 3>(a, row0, row1, start, width);
        break;
#if !defined(__SANITIZE_ADDRESS__)
      case 4:
        conv_dot_either<T, 4>(a, row0, row1, start, width);
        break;
      case 5:
        conv_dot_either<T, 5>(a, row0, row1, start, width);
        break;
      case 6:
        conv_dot_either<T, 6>(a, row0, row1, start, width);
        break;
      case 7:
        conv_dot_either<T, 7>(a, row0, row1, start, width);
        break;
#endif
      default:
        conv_dot_either<T, kVectorsPerBlock>(a, row0, row1, start, width);
        break;
    }
  }
}

// Pack: packed[place[r] + b] = plain[r + b * step]; unpack: the other way round. Blocks of W x W
// elements go through registers; the last ones are moved back.
template <class T, int W, bool Pack>
void conv_transpose(const ConvCopy& a) {
  using V = Vec<T, W>;
  if constexpr (W > 1) {
    if (a.rows < W || a.batch < W) return conv_transpose<T, W / 2, Pack>(a);
  }
  T* packed = static_cast<T*>(a.packed);
  T* plain = static_cast<T*>(a.plain);
  for (int64_t r = 0; r < a.rows; r += W) {
    if (r > a.rows - W) r = a.rows - W;
    for (int64_t b = 0; b < a.batch; b += W) {
      if (b > a.batch - W) b = a.batch - W;
      V v[W];
      for (int k = 0; k < W; ++k)
        v[k] = load<V>(Pack ? plain + r + (b + k) * a.step : packed + a.place[r + k] + b);
      if constexpr (W > 1) transpose_steps<T, W, W / 2>(v);
      for (int k = 0; k < W; ++k)
        store(Pack ? packed + a.place[r + k] + b : plain + r + (b + k) * a.step, v[k]);
    }
  }
}

template <class T>
void conv_pack(const ConvCopy& a) {
  if (a.rows > 0 && a.batch > 0) conv_transpose<T, REWIRE_VECTOR_BYTES / sizeof(T), true>(a);
}

template <class T>
void conv_unpack(const ConvCopy& a) {
  if (a.rows > 0 && a.batch > 0) conv_transpose<T, REWIRE_VECTOR_BYTES / sizeof(T), false>(a);
}

}  // namespace

const ConvKernels kConvolutions = {
    {REWIRE_VECTOR_BYTES / 4, REWIRE_VECTOR_BYTES / 8},
    {conv_sum<float>, conv_sum<double>},
    {conv_dot<float>, conv_dot<double>},
    {conv_pack<float>, conv_pack<double>},
    {conv_unpack<float>, conv_unpack<double>},
};
