// What the driver (products.cpp) asks of the vector kernels of products.
#pragma once

#include "simd/types.h"

namespace rewire {

// Bytes of the samples of a feature in a panel, at most.
constexpr int64_t kWidestPanel = 512;
// The sum of a row is made of sums over so many connections, added in order: so a long row may be
// shared out at these places without changing a bit.
constexpr int64_t kSegment = 4096;

enum Wanted : int { kSums = 0, kDots = 1, kBoth = 2 };

// Rows of an index list times one panel of samples. Numbers have the type that is computed in.
//   sums[r, b] = bias[r] + sum of value * x[c, b];  dots (+)= sum over b of own[r, b] * x[c, b]
// over the connections of row r. Without `slots`, values and dots are in the order of the list, and
// `idx` (int32) has been checked.
struct WalkArgs {
  const void *ptr, *idx, *slots;
  int64_t length;      // of the list
  const void* values;  // only for sums
  const void* bias;    // by row; may be null
  const void* x;       // (features, width), features x_step elements apart: read as the list says
  const void* own;     // (rows, width), only for dots
  void* sums;          // (rows, width)
  void* dots;
  int64_t capacity, features, x_step, own_step, sums_step;
  // Where features come in tiles: by row, the connection to go on with. Rows of more than kSegment
  // connections are walked at once, in the first tile.
  int64_t* next;  // null without tiles
  int64_t until;  // first feature of the next tile
  bool go_on;     // behind the first tile: sums are added to what is there
  bool add;       // dots are added to what is there
  bool far;  // values that follow each other in the list lie far apart in memory: fetch them early
};

// A part of a (batch, features) tensor and a panel (features, width) of the type computed in.
struct PanelCopy {
  const void* from;
  void* to;
  int64_t sample_step, feature_step;  // of the tensor, in elements
  int64_t panel_step;                 // between features of the panel
  int64_t features, samples;
  int64_t width;  // samples of the panel: those without a counterpart are zeros
};

struct ProductKernels {
  int lanes[4];  // accumulators in the widest vector, by element type
  int vectors;   // of samples in a panel, at most: as many sums of a row as stay in registers
  // First index: whether numbers are float64; then the index type; then what is wanted. `width` is
  // a whole number of vectors, or a smaller power of two. own and sums begin with row0.
  Status (*walk[2][2][3])(const WalkArgs&, int64_t row0, int64_t row1, int64_t width);
  Status (*walk_ordered[2][2][3])(const WalkArgs&, int64_t row0, int64_t row1, int64_t width);
  // By element type of the tensor.
  void (*pack[4])(const PanelCopy&);
  void (*unpack[4])(const PanelCopy&);
  // n numbers of bfloat16 or float16 to float32.
  void (*widen[2])(const void* src, void* dst, int64_t n);
};

// Of the instruction set in use.
const ProductKernels& product_kernels();

}  // namespace rewire
