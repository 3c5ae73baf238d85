// Scores above a bar; compiled once per instruction set by select/top_scores.cpp. Plain loops over
// short arrays, which the compiler turns into vectors of whatever length this instruction set has.

namespace {

constexpr int kPiece = 128, kQuads = kPiece / 4;  // scores that are looked at together

// Writes the places of the pieces that hit, and what was found there; returns how many there are by
// then.
template <class T, bool Drawn>
REWIRE_STATIC int64_t emit(const uint8_t* hit, const T* x, const float* u, int64_t first,
                           const Survivors<T>& out, int64_t count) {
  for (int w = 0; w < kPiece; w += 8) {
    uint64_t word;
    __builtin_memcpy(&word, hit + w, 8);
    for (; word != 0; word &= word - 1) {
      const int j = w + __builtin_ctzll(word) / 8;
      out.keys[count] = first + j;
      out.scores[count] = x[j];
      if constexpr (Drawn) out.uniforms[count] = u[j];
      ++count;
    }
  }
  return count;
}

// u[k] in (0, 1]: (word + 1/2) / 2^32 of the k-th position from 4 quad on.
REWIRE_STATIC void uniforms(const Draw& draw, int64_t quad, float* u) {
  uint32_t word[4][kQuads];
  for (int q = 0; q < kQuads; ++q) {
    const uint64_t counter = static_cast<uint64_t>(quad) + static_cast<uint64_t>(q);
    const Words w = philox(draw.seed, static_cast<uint32_t>(counter),
                           static_cast<uint32_t>(counter >> 32), draw.step, draw.stream);
    for (int k = 0; k < 4; ++k) word[k][q] = w.w[k];
  }
  for (int q = 0; q < kQuads; ++q)
    for (int k = 0; k < 4; ++k) u[4 * q + k] = (static_cast<float>(word[k][q]) + 0.5f) * 0x1p-32f;
}

template <class T, bool Absolute>
int64_t scan_plain(const T* scores, const uint8_t* kept, int64_t n, int64_t first, T bar,
                   const Draw*, const Survivors<T>& out) {
  constexpr T lowest = Lowest<T>::value;
  int64_t count = 0;
  for (int64_t at = 0; at < n; at += kPiece) {
    const int length = static_cast<int>(n - at < kPiece ? n - at : kPiece);
    T tail[kPiece];
    const T* s = scores + at;
    if (length < kPiece) {
      for (int j = 0; j < kPiece; ++j) tail[j] = j < length ? s[j] : T(0);
      s = tail;
    }
    T x[kPiece];
    uint8_t hit[kPiece];
    for (int j = 0; j < kPiece; ++j) {
      T v = s[j];
      if constexpr (Absolute) v = v < T(0) ? -v : v;
      x[j] = v > lowest ? v : lowest;  // of NaN as well
    }
    for (int j = 0; j < kPiece; ++j)
      hit[j] = static_cast<uint8_t>((x[j] > bar) & (kept[at + j] == 0));
    count = emit<T, false>(hit, x, nullptr, first + at, out, count);
  }
  return count;
}

template <class T>
int64_t scan_drawn(const T* scores, const uint8_t* kept, int64_t n, int64_t first, T bar,
                   const Draw* draw, const Survivors<T>& out) {
  const T least = static_cast<T>(draw->least);
  int64_t count = 0;
  for (int64_t at = 0; at < n;) {
    const int skip = static_cast<int>((first + at) % 4);
    const int length = static_cast<int>(n - at < kPiece - skip ? n - at : kPiece - skip);
    T edge[kPiece];
    uint8_t edge_kept[kPiece];
    const T* s = scores + at;
    const uint8_t* taken = kept + at;
    if (length < kPiece) {
      for (int j = 0; j < kPiece; ++j) {
        const bool inside = j >= skip && j < skip + length;
        edge[j] = inside ? s[j - skip] : T(0);
        edge_kept[j] = inside ? taken[j - skip] : 1;
      }
      s = edge;
      taken = edge_kept;
    }
    float u[kPiece];
    uniforms(*draw, (first + at) / 4, u);
    T x[kPiece];
    uint8_t hit[kPiece];
    for (int j = 0; j < kPiece; ++j) {
      const T v = s[j] < T(0) ? -s[j] : s[j];
      x[j] = v > least ? v : least;  // of NaN as well
    }
    for (int j = 0; j < kPiece; ++j)
      hit[j] = static_cast<uint8_t>((x[j] >= bar * static_cast<T>(u[j])) & (taken[j] == 0));
    count = emit<T, true>(hit, x, u, first + at - skip, out, count);
    at += length;
  }
  return count;
}

const ScanTable kScans = {
    {scan_plain<float, false>, scan_plain<float, true>, scan_drawn<float>},
    {scan_plain<double, false>, scan_plain<double, true>, scan_drawn<double>}};

}  // namespace
