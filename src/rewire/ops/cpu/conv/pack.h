// Activations of a convolution, and their packed rows.
#pragma once

#include <cstring>

#include "conv/plan.h"

namespace rewire {

// A (batch, channels, depth, height, width) view of a tensor, in elements.
struct View {
  Tensor kept;
  char* data;
  int64_t batch, channels, size[3], batch_step, channel_step, step[3], element;
  bool by_channel;  // channels follow each other in memory, else positions of the width do

  View(const Tensor& t, int64_t rank, int type, const char* op, const char* name)
      : kept(t), element(type ? 8 : 4) {
    require_cpu(t, op);
    if (t.dim() != rank + 2)
      fail(op, std::string(name) + " must have " + std::to_string(rank + 2) + " dimensions");
    require(element_type(t, op) == type, op, "values and activations must have one dtype");
    read();
    if (!by_channel && step[2] != 1 && size[2] > 1) {
      kept = torch::stable::contiguous(t);
      read();
    }
  }

  void read() {
    const int64_t rank = kept.dim() - 2;
    data = static_cast<char*>(const_cast<void*>(kept.const_data_ptr()));
    batch = kept.size(0), channels = kept.size(1), batch_step = kept.stride(0),
    channel_step = kept.stride(1);
    for (int64_t a = 0; a < 3; ++a) {
      const int64_t i = a - (3 - rank);
      size[a] = i < 0 ? 1 : kept.size(i + 2);
      step[a] = i < 0 ? 0 : kept.stride(i + 2);
    }
    by_channel = channel_step == 1 && (channels > 1 || step[2] != 1);
  }

  // How many whole rows to copy at a time: rows that follow each other in memory, if one alone is
  // short.
  int64_t together() const {
    constexpr int64_t kElements = 64;
    return !by_channel && step[1] == size[2] && size[2] > 0
               ? std::max<int64_t>(1, kElements / size[2])
               : 1;
  }
};

inline Tensor make(const Tensor& like, int64_t batch, int64_t channels, const Numbers& sizes,
                   bool channels_last) {
  Numbers shape{batch, channels}, steps(sizes.size() + 2);
  shape.insert(shape.end(), sizes.begin(), sizes.end());
  int64_t step = channels_last ? channels : 1;
  for (size_t i = shape.size(); i-- > 2; step *= shape[i]) steps[i] = step;
  steps[1] = channels_last ? 1 : step;
  steps[0] = channels_last ? step : step * channels;
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  steps.data(), dtype, aoti_torch_device_type_cpu(),
                                                  0, &handle));
  return Tensor(handle);
}

// Copies rows [y0, y1) of a tensor to or from their packed form. `columns` says where each position
// of [x0, x1) is, in one row after the other; several rows at a time only if they are whole and the
// tensor's rows go `together`.
inline void copy_rows(bool pack, int type, const View& t, const Item& item, int64_t z, int64_t y0,
                      int64_t y1, int64_t x0, int64_t x1, int64_t channel0, int64_t channel1,
                      char* packed, const int64_t* channels, const int64_t* columns) {
  const auto copy = pack ? conv_kernels().pack[type] : conv_kernels().unpack[type];
  char* plain = t.data + (item.b0 * t.batch_step + z * t.step[0] + y0 * t.step[1]) * t.element;
  if (t.by_channel) {
    for (int64_t x = x0; x < x1; ++x)
      copy({packed + columns[x - x0] * t.element,
            plain + (x * t.step[2] + channel0 * t.channel_step) * t.element, channels + channel0,
            channel1 - channel0, item.batch, t.batch_step});
  } else {
    for (int64_t c = channel0; c < channel1; ++c)
      copy({packed + channels[c] * t.element,
            plain + (c * t.channel_step + x0 * t.step[2]) * t.element, columns,
            (x1 - x0) * (y1 - y0), item.batch, t.batch_step});
  }
}

inline Numbers multiples(int64_t count, int64_t step) {
  Numbers result(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) result[static_cast<size_t>(i)] = i * step;
  return result;
}

// `numbers`, then the same `step` further on, and so on: `count` times in all.
inline void repeat(Numbers& numbers, int64_t count, int64_t step) {
  const size_t once = numbers.size();
  for (size_t i = 0; i < once * static_cast<size_t>(count - 1); ++i)
    numbers.push_back(numbers[i] + step);
}

// Packs the rows of a source window for one item, each once.
struct Packer {
  const ConvPlan& plan;
  const View& source;
  const Item& item;
  int type;
  char* buffer;
  Numbers planes;  // source plane of each packed one
  Numbers channels, columns;
  int64_t first, next, end, x0, x1, together;
  bool margins;

  Packer(const ConvPlan& p, const View& s, const Item& i, int type_, char* b)
      : plan(p), source(s), item(i), type(type_), buffer(b) {
    const Axis &z = plan.axis[0], &y = plan.axis[1], &x = plan.axis[2];
    const int64_t q = (item.z + z.shift) / z.phases, phase = (item.z + z.shift) % z.phases;
    for (size_t k = 0; k < z.phase.size(); ++k)
      if (z.phase[k] == phase) planes.push_back(q * z.step + z.low + z.at[k]);
    first = next = item.row0 * y.step + y.low;
    end = (item.row1 - 1) * y.step + y.low + y.window;
    const int64_t left = item.col0 * x.step + x.low;
    x0 = std::max<int64_t>(left, 0);
    x1 = std::max(x0, std::min((item.col1 - 1) * x.step + x.low + x.window, x.source));
    for (int64_t u = x0; u < x1; ++u) columns.push_back(plan.width_place(u - left) * item.batch);
    channels = multiples(plan.source_channels, plan.row_length * item.batch);
    margins = x1 - x0 < plan.row_length;
    together = x1 - x0 == x.source ? source.together() : 1;
    repeat(columns, together, plan.row_size * item.batch);
  }

  // The packed window of q; rows up to its end are there afterwards.
  char* window(int64_t q) {
    const Axis& y = plan.axis[1];
    const int64_t begin = q * y.step + y.low, row = plan.row_size * item.batch * source.element;
    const int64_t plane = plan.source_channels * plan.row_length * item.batch * source.element;
    next = std::max(next, begin);
    while (next < begin + y.window) {
      char* to = buffer + (next - first) * row;
      const bool outside = next < 0 || next >= y.source;
      const int64_t rows = outside ? 1 : std::min({together, end - next, y.source - next});
      for (const int64_t z : planes) {
        const bool empty = outside || z < 0 || z >= plan.axis[0].source;
        if (empty || margins)
          for (int64_t r = 0; r < rows; ++r)
            std::memset(to + r * row, 0, static_cast<size_t>(plane));
        if (!empty && x1 > x0)
          copy_rows(true, type, source, item, z, next, next + rows, x0, x1, 0, plan.source_channels,
                    to, channels.data(), columns.data());
        to += plane;
      }
      next += rows;
    }
    return buffer + (begin - first) * row;
  }
};

}  // namespace rewire
