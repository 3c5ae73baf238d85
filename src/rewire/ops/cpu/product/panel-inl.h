// Samples of a (batch, features) tensor to a panel (features, width), and back; see PanelCopy. Rows
// of a tensor are transposed in registers, W x W numbers at a time.

// The first n numbers of a row's end, and zeros.
template <class S, int W>
REWIRE_INLINE Vec<Compute<S>, W> load_some(const S* from, int64_t n) {
  if (n >= W) return load_as<S, W>(from);
  S all[W] = {};
  __builtin_memcpy(all, from, static_cast<uint64_t>(n) * sizeof(S));
  return load_as<S, W>(all);
}

// Computed numbers, as those of a tensor.
template <class S, int W>
REWIRE_INLINE void store_as(S* to, Vec<Compute<S>, W> v) {
  if constexpr (sizeof(S) > 2) {
    store(to, v);
  } else if constexpr (W > 1) {
    store(reinterpret_cast<uint16_t*>(to), narrowed<W>(S{}, (Vec<uint32_t, W>)v));
  } else {
    const Vec<float, 2> pair = {v, v};
    to->bits = narrowed<2>(S{}, (Vec<uint32_t, 2>)pair)[0];
  }
}

template <class S, int W>
REWIRE_INLINE void store_some_as(S* to, Vec<Compute<S>, W> v, int64_t n) {
  if (n >= W) return store_as<S, W>(to, v);
  S all[W];
  store_as<S, W>(all, v);
  __builtin_memcpy(to, all, static_cast<uint64_t>(n) * sizeof(S));
}

// Blocks of W x W numbers; in a panel that is narrower than a vector, of shorter ones. What lies
// beyond the samples are zeros.
template <class S, int W>
void pack_rows(const PanelCopy& a) {
  using T = Compute<S>;
  using V = Vec<T, W>;
  if constexpr (W > 1) {
    if (a.width < W) return pack_rows<S, W / 2>(a);
  }
  for (int64_t b = 0; b < a.width; b += W) {
    const S* rows = static_cast<const S*>(a.from) + b * a.sample_step;
    T* to = static_cast<T*>(a.to) + b;
    const int64_t here = a.samples - b < W ? a.samples - b : W;
    for (int64_t f = 0; f < a.features; f += W) {
      const int64_t wide = a.features - f < W ? a.features - f : W;
      V v[W];
      if (here == W && wide == W) {
        for (int k = 0; k < W; ++k) v[k] = load_as<S, W>(rows + k * a.sample_step + f);
      } else {
        for (int k = 0; k < W; ++k)
          v[k] = k >= here ? V{} : load_some<S, W>(rows + k * a.sample_step + f, wide);
      }
      if constexpr (W > 1) transpose_steps<T, W, W / 2>(v);
      for (int k = 0; k < W && k < wide; ++k) store(to + (f + k) * a.panel_step, v[k]);
    }
  }
}

template <class S, int W>
void unpack_rows(const PanelCopy& a) {
  using T = Compute<S>;
  using V = Vec<T, W>;
  if constexpr (W > 1) {
    if (a.width < W) return unpack_rows<S, W / 2>(a);
  }
  for (int64_t b = 0; b < a.samples; b += W) {
    const T* from = static_cast<const T*>(a.from) + b;
    S* rows = static_cast<S*>(a.to) + b * a.sample_step;
    const int64_t here = a.samples - b < W ? a.samples - b : W;
    for (int64_t f = 0; f < a.features; f += W) {
      const int64_t wide = a.features - f < W ? a.features - f : W;
      V v[W];
      for (int k = 0; k < W; ++k) v[k] = k < wide ? load<V>(from + (f + k) * a.panel_step) : V{};
      if constexpr (W > 1) transpose_steps<T, W, W / 2>(v);
      for (int k = 0; k < W && k < here; ++k)
        store_some_as<S, W>(rows + k * a.sample_step + f, v[k], wide);
    }
  }
}

template <class S>
void pack(const PanelCopy& a) {
  using T = Compute<S>;
  constexpr int W = REWIRE_VECTOR_BYTES / sizeof(T);
  if (a.feature_step == 1 && a.sample_step != 1) return pack_rows<S, W>(a);
  const S* from = static_cast<const S*>(a.from);
  T* to = static_cast<T*>(a.to);
  for (int64_t f = 0; f < a.features; ++f, from += a.feature_step, to += a.panel_step) {
    int64_t b = 0;
    if (a.sample_step == 1)
      for (; b + W <= a.samples; b += W) store(to + b, load_as<S, W>(from + b));
    for (; b < a.samples; ++b) to[b] = load_as<S, 1>(from + b * a.sample_step);
    for (; b < a.width; ++b) to[b] = T(0);
  }
}

// To rows, or to samples that follow each other.
template <class S>
void unpack(const PanelCopy& a) {
  using T = Compute<S>;
  constexpr int W = REWIRE_VECTOR_BYTES / sizeof(T);
  if (a.sample_step != 1) return unpack_rows<S, W>(a);
  const T* from = static_cast<const T*>(a.from);
  S* to = static_cast<S*>(a.to);
  for (int64_t f = 0; f < a.features; ++f, from += a.panel_step, to += a.feature_step) {
    int64_t b = 0;
    for (; b + W <= a.samples; b += W) store_as<S, W>(to + b, load<Vec<T, W>>(from + b));
    for (; b < a.samples; ++b) store_as<S, 1>(to + b, from[b]);
  }
}
