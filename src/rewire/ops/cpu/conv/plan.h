// How a convolution is laid out: the arithmetic of positions, strides, dilations and phases,
// without any tensor data.
//
// Both products of a sparse convolution are the same sum over its connections,
//
//   target[t, q * phases + phase] = sum of value * source[s, q * step + low + at],
//
// along each of the axes depth, height, width (in this order, lower ranks have leading axes of one
// position):
//   forward:        target = output, phases = 1, step = stride, at = k * dilation;
//   input gradient: target = input, source = output gradient, phases = stride, step = 1; kernel
//   position k belongs to
//                   phase (k * dilation) % stride and looks (k * dilation) / stride positions back.
// So strides, dilations and groups cost nothing extra: a connection always is one multiply-add of a
// run of the source.
#pragma once

#include <vector>

#include "conv/kernels.h"
#include "runtime.h"

namespace rewire {

using Numbers = std::vector<int64_t>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Axis {
  int64_t source, target;       // positions of the two tensors
  int64_t step, phases, shift;  // target position = q * phases + phase - shift
  int64_t low, window;          // source positions [q * step + low, ... + window) matter for q
  int64_t first, count;         // q runs over [first, first + count)
  Numbers phase, at;            // by kernel position
};

// The layer's arguments, as three axes.
struct Geometry {
  int64_t rank, groups, positions = 1;  // positions of the kernel
  int64_t kernel[3], stride[3], before[3], after[3], dilation[3];

  Geometry(const char* op, const Numbers& k, const Numbers& s, const Numbers& p, const Numbers& d,
           int64_t groups_)
      : rank(static_cast<int64_t>(k.size())), groups(groups_) {
    const size_t n = k.size();
    require(n >= 1 && n <= 3 && s.size() == n && d.size() == n && p.size() == 2 * n, op,
            "kernel, stride and dilation must have 1 to 3 entries, padding two for each");
    require(groups >= 1, op, "groups must be at least 1");
    for (size_t a = 0; a < 3; ++a) {
      const bool absent = a < 3 - n;
      const size_t i = absent ? 0 : a - (3 - n);
      kernel[a] = absent ? 1 : k[i];
      stride[a] = absent ? 1 : s[i];
      dilation[a] = absent ? 1 : d[i];
      before[a] = absent ? 0 : p[2 * i];
      after[a] = absent ? 0 : p[2 * i + 1];
      constexpr int64_t kLargest = int64_t{1} << 31;  // keeps all sums and products below in range
      require(
          kernel[a] >= 1 && stride[a] >= 1 && dilation[a] >= 1 && before[a] >= 0 && after[a] >= 0,
          op, "kernel, stride and dilation must be at least 1, padding at least 0");
      require(kernel[a] < kLargest && stride[a] < kLargest && dilation[a] < kLargest &&
                  before[a] < kLargest && after[a] < kLargest && positions * kernel[a] < kLargest,
              op, "kernel, stride, padding or dilation are too large");
      positions *= kernel[a];
    }
  }

  int64_t output(int axis, int64_t input) const {
    const int64_t room =
        input + before[axis] + after[axis] - dilation[axis] * (kernel[axis] - 1) - 1;
    return room < 0 ? 0 : room / stride[axis] + 1;
  }

  Axis forward(int a, int64_t input) const {
    Axis axis{input,
              output(a, input),
              stride[a],
              1,
              0,
              -before[a],
              dilation[a] * (kernel[a] - 1) + 1,
              0,
              0,
              {},
              {}};
    axis.count = axis.target;
    for (int64_t k = 0; k < kernel[a]; ++k) {
      axis.phase.push_back(0);
      axis.at.push_back(k * dilation[a]);
    }
    return axis;
  }

  Axis backward(int a, int64_t input) const {
    const int64_t s = stride[a], back = dilation[a] * (kernel[a] - 1) / s;
    Axis axis{output(a, input), input, 1, s, before[a], -back, back + 1, before[a] / s, 0, {}, {}};
    axis.count = input > 0 ? (input - 1 + before[a]) / s - axis.first + 1 : 0;
    for (int64_t k = 0; k < kernel[a]; ++k) {
      axis.phase.push_back(k * dilation[a] % s);
      axis.at.push_back(back - k * dilation[a] / s);
    }
    return axis;
  }
};

// Tiles and packed layouts. A packed source is (row, plane x channel, width phase, width, batch): a
// window of rows is contiguous, and a row is packed right before it is first used. Sizes are in
// positions unless they say elements.
struct ConvPlan {
  Axis axis[3];
  int64_t batch, source_channels, target_channels, lanes;
  Numbers plane;       // by kernel position in depth: its place among those of the same phase
  int64_t planes = 0;  // at most so many in one phase
  int64_t tile_batch, tiles;   // the last tile takes the rest, up to twice as much
  int64_t tile_width, widths;  // in q
  int64_t tile_rows, chunks;   // in q
  int64_t phase_length, row_length,
      row_size;  // positions of a width phase, of a channel's row, of a packed row
  int64_t buffer_rows, y_rows, y_step;  // y: (target channel x width phase) rows of y_step elements

  ConvPlan(const char* op, const Axis (&axes)[3], int64_t batch_, int64_t from, int64_t to,
           int type, int64_t items)
      : axis{axes[0], axes[1], axes[2]},
        batch(batch_),
        source_channels(from),
        target_channels(to),
        lanes(conv_kernels().lanes[type]) {
    const Axis &z = axis[0], &y = axis[1], &x = axis[2];
    Numbers in_phase(static_cast<size_t>(z.phases), 0);
    for (const int64_t phase : z.phase) {
      plane.push_back(in_phase[static_cast<size_t>(phase)]++);
      planes = std::max(planes, plane.back() + 1);
    }
    // A run of (width, batch) should fill the accumulators of a kernel.
    const int64_t full = kVectorsPerBlock * lanes;
    tile_batch = std::min(
        batch,
        lanes * std::max<int64_t>(1, ceil_div(kVectorsPerBlock, std::max<int64_t>(x.count, 1))));
    tiles = tile_batch ? batch / tile_batch : 0;
    const int64_t most = largest_tile(), element = type == kFloat32 ? 4 : 8;

    constexpr int64_t kWindowBytes = 2 << 20, kBufferBytes = 4 << 20;
    // In double, because a forged geometry must not overflow.
    const double per_position = std::max(static_cast<double>(y.window) * planes * from * x.step,
                                         static_cast<double>(to) * x.phases) *
                                most * element;
    const int64_t fits =
        static_cast<int64_t>(kWindowBytes / std::max(per_position, 1.0)) - x.window / x.step;
    const int64_t least = ceil_div(full, std::max<int64_t>(most, 1));
    widths = std::max<int64_t>(1, ceil_div(x.count, std::max(fits, least)));
    tile_width = ceil_div(x.count, widths);
    phase_length = ceil_div((tile_width - 1) * x.step + x.window, x.step);
    row_length = phase_length * x.step;
    const double size = static_cast<double>(planes) * from * row_length;
    require(size * y.window < 1u << 31, op, "the kernel's window over the input is too large");
    row_size = planes * from * row_length;

    const int64_t row_bytes = std::max<int64_t>(1, row_size * most * element);
    tile_rows = std::max<int64_t>(1, (kBufferBytes / row_bytes - y.window) / y.step + 1);
    const int64_t others = std::max<int64_t>(1, tiles * z.target * widths);
    tile_rows =
        std::clamp<int64_t>(tile_rows, 1, std::max<int64_t>(1, y.count / ceil_div(items, others)));
    chunks = ceil_div(y.count, tile_rows);
    buffer_rows = (tile_rows - 1) * y.step + y.window;
    y_rows = to * x.phases;
    y_step = ceil_div(tile_width * most, lanes) * lanes;
  }

  int64_t largest_tile() const { return tiles ? batch - (tiles - 1) * tile_batch : 0; }
  int64_t buffer_elements() const { return buffer_rows * row_size * largest_tile() + lanes; }
  int64_t y_elements() const { return y_rows * y_step; }
  int64_t items() const { return tiles * axis[0].target * chunks * widths; }

  // Where a kernel position is read, from the first position of the window on, for source channel
  // 0.
  int64_t offset(int64_t kz, int64_t ky, int64_t kx) const {
    const int64_t at = axis[2].at[static_cast<size_t>(kx)], step = axis[2].step;
    return axis[1].at[static_cast<size_t>(ky)] * row_size +
           plane[static_cast<size_t>(kz)] * source_channels * row_length +
           at % step * phase_length + at / step;
  }
  int64_t width_place(int64_t v) const {
    return v % axis[2].step * phase_length + v / axis[2].step;
  }
};

// One piece of work: a batch tile, a target plane, some rows, some columns.
struct Item {
  int64_t b0, batch, z, row0, row1, col0, col1;  // z: target position; rows and columns: q

  Item(const ConvPlan& p, int64_t number) {
    const int64_t width = number % p.widths, chunk = number / p.widths % p.chunks;
    const int64_t rest = number / p.widths / p.chunks, tile = rest / p.axis[0].target;
    z = rest % p.axis[0].target;
    b0 = tile * p.tile_batch;
    batch = tile + 1 == p.tiles ? p.batch - b0 : p.tile_batch;
    row0 = p.axis[1].first + chunk * p.tile_rows;
    row1 = std::min(row0 + p.tile_rows, p.axis[1].first + p.axis[1].count);
    col0 = p.axis[2].first + width * p.tile_width;
    col1 = std::min(col0 + p.tile_width, p.axis[2].first + p.axis[2].count);
  }
};

}  // namespace rewire
