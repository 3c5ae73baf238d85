// The topology of a convolution, read and checked once a call, in the order that the kernels want.
#pragma once

#include <memory>

#include "conv/plan.h"

namespace rewire {

// The connections in the order of the kernels: by bucket (target phase in depth and height, target
// channel, target phase in width).
struct Stream {
  Numbers ptr;
  std::vector<int32_t> offsets;
  std::unique_ptr<char[]> values;

  ConvArgs args(int64_t bucket, const ConvPlan& plan, int64_t batch) const {
    return {ptr.data() + bucket,
            offsets.data(),
            values.get(),
            nullptr,
            nullptr,
            nullptr,
            nullptr,
            batch,
            plan.y_step};
  }
};

// One index list, read through accessors that check.
template <class I>
struct Lists {
  const char* op;
  Tensor ptr, idx, slots;
  const I *p, *i, *s;
  int64_t rows, length, bound, capacity;

  Lists(const char* o, const Tensor& a, const Tensor& b, const Tensor& c, int64_t index_bound,
        int64_t slot_bound)
      : op(o),
        ptr(packed(a)),
        idx(packed(b)),
        slots(packed(c)),
        bound(index_bound),
        capacity(slot_bound) {
    p = static_cast<const I*>(ptr.const_data_ptr());
    i = static_cast<const I*>(idx.const_data_ptr());
    s = static_cast<const I*>(slots.const_data_ptr());
    rows = ptr.numel() - 1;
    length = idx.numel();
  }
  // The connections of a row, after the `before` ones of the rows above it.
  int64_t end(int64_t row, int64_t before) const {
    const int64_t stop = p[row + 1];
    require(stop >= before && stop <= length && (row > 0 || p[0] == 0), op,
            "ptr must start at 0, never fall and stay within the length of idx");
    return stop;
  }
  int64_t index(int64_t at) const {
    const int64_t value = i[at];
    require(value >= 0 && value < bound, op, "an entry of idx is outside the weight");
    return value;
  }
  int64_t slot(int64_t at) const {
    const int64_t value = s[at];
    require(value >= 0 && value < capacity, op, "an entry of slots is outside the capacity");
    return value;
  }
};

inline void check_lists(const char* op, const Tensor& ptr, const Tensor& idx, const Tensor& slots) {
  for (const Tensor* t : {&ptr, &idx, &slots}) {
    require_cpu(*t, op);
    require(t->dim() == 1, op, "ptr, idx and slots must have one dimension");
    require(index_type(*t, op) == index_type(ptr, op), op,
            "ptr, idx and slots must have one dtype");
  }
  require(ptr.numel() >= 1, op, "ptr must have one entry more than there are rows");
  require(idx.numel() == slots.numel(), op, "idx and slots must have the same length");
}

// Offsets of the kernel positions, in the order of a weight's columns.
inline std::vector<int32_t> kernel_offsets(const Geometry& g, const ConvPlan& plan) {
  std::vector<int32_t> offsets;
  for (int64_t z = 0; z < g.kernel[0]; ++z)
    for (int64_t y = 0; y < g.kernel[1]; ++y)
      for (int64_t x = 0; x < g.kernel[2]; ++x)
        offsets.push_back(static_cast<int32_t>(plan.offset(z, y, x)));
  return offsets;
}

// By row: bucket = output channel. `values` may be null (the gradient of the values needs offsets
// only).
template <class T, class I>
Stream stream_by_row(const Geometry& g, const ConvPlan& plan, const Lists<I>& lists,
                     const T* values) {
  const std::vector<int32_t> kernel = kernel_offsets(g, plan);
  const int64_t per_group = plan.source_channels / g.groups, outputs = lists.rows / g.groups;
  std::vector<int32_t> table;
  for (int64_t c = 0; c < per_group; ++c)
    for (const int32_t k : kernel) table.push_back(static_cast<int32_t>(c * plan.row_length) + k);
  Stream stream;
  stream.ptr.assign(1, 0);
  for (int64_t r = 0; r < lists.rows; ++r) stream.ptr.push_back(lists.end(r, stream.ptr.back()));
  const int64_t connections = stream.ptr.back();
  stream.offsets.resize(static_cast<size_t>(connections));
  if (values) stream.values.reset(new char[static_cast<size_t>(connections) * sizeof(T)]);
  T* out = reinterpret_cast<T*>(stream.values.get());
  for (int64_t r = 0; r < lists.rows; ++r) {
    const int32_t group = static_cast<int32_t>(r / outputs * per_group * plan.row_length);
    for (int64_t i = stream.ptr[r]; i < stream.ptr[r + 1]; ++i) {
      stream.offsets[i] = table[lists.index(i)] + group;
      if (values) out[i] = values[lists.slot(i)];
    }
  }
  return stream;
}

// By column, for the gradient of the input: bucket = (phases, input channel, phase of the width).
template <class T, class I>
Stream stream_by_col(const Geometry& g, const ConvPlan& plan, const Lists<I>& lists,
                     const T* values) {
  const std::vector<int32_t> kernel = kernel_offsets(g, plan);
  const Axis* axis = plan.axis;
  const int64_t inputs = plan.target_channels, per_group = inputs / g.groups,
                outputs = plan.source_channels / g.groups;
  const int64_t buckets = axis[0].phases * axis[1].phases * inputs * axis[2].phases;
  Numbers first;  // bucket of each kernel position for input channel 0
  for (int64_t z = 0; z < g.kernel[0]; ++z)
    for (int64_t y = 0; y < g.kernel[1]; ++y)
      for (int64_t x = 0; x < g.kernel[2]; ++x)
        first.push_back((axis[0].phase[z] * axis[1].phases + axis[1].phase[y]) * inputs *
                            axis[2].phases +
                        axis[2].phase[x]);
  Numbers ends(static_cast<size_t>(lists.rows) + 1, 0);
  for (int64_t r = 0; r < lists.rows; ++r) ends[r + 1] = lists.end(r, ends[r]);
  const auto bucket = [&](int64_t col, int64_t output) {
    const int64_t channel = output / outputs * per_group + col / g.positions;
    return first[col % g.positions] + channel * axis[2].phases;
  };
  Stream stream;
  stream.ptr.assign(static_cast<size_t>(buckets) + 1, 0);
  for (int64_t col = 0; col < lists.rows; ++col) {
    if (g.groups == 1) {
      stream.ptr[bucket(col, 0) + 1] += ends[col + 1] - ends[col];
    } else {
      for (int64_t i = ends[col]; i < ends[col + 1]; ++i)
        ++stream.ptr[bucket(col, lists.index(i)) + 1];
    }
  }
  for (int64_t b = 0; b < buckets; ++b) stream.ptr[b + 1] += stream.ptr[b];
  stream.offsets.resize(static_cast<size_t>(ends.back()));
  stream.values.reset(new char[static_cast<size_t>(ends.back()) * sizeof(T)]);
  T* out = reinterpret_cast<T*>(stream.values.get());
  Numbers next(stream.ptr.begin(), stream.ptr.end() - 1);
  for (int64_t col = 0; col < lists.rows; ++col)
    for (int64_t i = ends[col]; i < ends[col + 1]; ++i) {
      const int64_t output = lists.index(i), to = bucket(col, output), at = next[to]++;
      require(at < stream.ptr[to + 1], lists.op, "idx was changed while it was read");
      stream.offsets[at] =
          kernel[col % g.positions] + static_cast<int32_t>(output * plan.row_length);
      out[at] = values[lists.slot(i)];
    }
  return stream;
}

}  // namespace rewire
