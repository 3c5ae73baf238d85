// What the driver (conv.cpp) asks of the vector kernels of convolutions.
#pragma once

#include "simd/types.h"

namespace rewire {

// One packed row of a convolution: rows of y are output channels, x the source row (see conv.cpp
// for the layout).
struct ConvArgs {
  const int64_t* ptr;      // rows + 1, into offsets, values and sums
  const int32_t* offsets;  // of the connections, in positions of x
  const void* values;      // of the connections
  const void* bias;        // by row of y; may be null
  const void* x;
  void* y;                // rows y_step elements apart
  void* sums;             // of the connections; only for conv_dot
  int64_t scale, y_step;  // elements per position of x; elements per row of y
};

// A part of a packed row, and the same in a tensor whose elements r follow each other, `step` per
// batch.
struct ConvCopy {
  void* packed;
  void* plain;
  const int64_t* place;  // of element r in packed, where the batch is contiguous
  int64_t rows, batch, step;
};

struct ConvKernels {
  int lanes[2];  // numbers in the widest vector, by element type
  // Rows [row0, row1), n elements of each: y[r] = bias[r] + sum of value * x[offset]; sums (+)=
  // <y[r], x[offset]>.
  void (*sum[2])(const ConvArgs&, int64_t row0, int64_t row1, int64_t n);
  void (*dot[2])(const ConvArgs&, int64_t row0, int64_t row1, int64_t n);
  void (*pack[2])(const ConvCopy&);
  void (*unpack[2])(const ConvCopy&);
};

// Of the instruction set in use.
const ConvKernels& conv_kernels();

}  // namespace rewire
