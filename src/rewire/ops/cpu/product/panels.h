// Activations, and the panels of samples that products take them in.
#pragma once

#include "product/kernels.h"
#include "runtime.h"

namespace rewire {

inline int64_t element_bytes(int type) { return type == kFloat64 ? 8 : is_narrow(type) ? 2 : 4; }
inline int64_t number_bytes(int type) { return type == kFloat64 ? 8 : 4; }  // of computed numbers

inline int64_t lanes_of(int type) { return product_kernels().lanes[type]; }

// A (batch, features) tensor in any strides.
struct Matrix {
  Tensor kept;
  char* data;
  int type;
  int64_t batch, features, sample_step, feature_step;

  Matrix(const Tensor& t, const char* op, const char* name)
      : kept(t), type(any_element_type(t, op)) {
    require_cpu(t, op);
    if (t.dim() != 2) fail(op, std::string(name) + " must have two dimensions, batch and features");
    data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
    batch = t.size(0), features = t.size(1);
    // Of one sample or feature, the step means nothing.
    sample_step = batch == 1 ? 1 : t.stride(0);
    feature_step = features == 1 && batch != 1 ? 1 : t.stride(1);
  }

  char* at(int64_t sample, int64_t feature) const {
    return data + (sample * sample_step + feature * feature_step) * element_bytes(type);
  }
  // Whether the samples of a feature lie as in a panel.
  bool is_panel(int64_t samples, int64_t width) const {
    return sample_step == 1 && samples == width && !is_narrow(type);
  }
  PanelCopy copy(int64_t sample, int64_t samples, int64_t feature, int64_t count) const {
    return {at(sample, feature), nullptr, sample_step, feature_step, 0, count, samples, 0};
  }
};

// The batch in panels of a few vectors, as evenly as possible: where there are several, each has
// two vectors or more, and only the last ends within one. A panel of x, or a tile of it, should fit
// the second-level cache: without tiles wide layers get narrower panels, where none would fit runs
// are long again.
struct Panels {
  int64_t batch, lanes, vectors, count;

  Panels(int64_t batch_, int64_t features, int type, bool tiled)
      : batch(batch_), lanes(lanes_of(type)), vectors((batch + lanes - 1) / lanes) {
    const int64_t bytes = features * lanes * number_bytes(type), room = cache_bytes() / 4 * 3;
    int64_t most = product_kernels().vectors;
    while (!tiled && most > 2 && most * bytes > room) most /= 2;
    if (most * bytes > room) most = product_kernels().vectors;
    count = (vectors + most - 1) / most;
  }

  int64_t start(int64_t panel) const { return std::min(batch, vectors * panel / count * lanes); }
  int64_t samples(int64_t panel) const { return start(panel + 1) - start(panel); }
  // With what is added: to whole vectors, or to a power of two below one.
  int64_t width(int64_t panel) const {
    const int64_t n = samples(panel);
    if (n > lanes / 2) return (n + lanes - 1) / lanes * lanes;
    int64_t width = 1;
    while (width < n) width *= 2;
    return width;
  }
  int64_t widest() const { return count > 0 ? (vectors + count - 1) / count * lanes : 0; }
};

}  // namespace rewire
