// What the driver (product.cpp) asks of the kernels for frozen weights (rewire/ops/frozen.py).
#pragma once

#include "simd/types.h"

namespace rewire {

enum FrozenValue : int { kFrozenFloat = 0, kFrozenInt8 = 1, kFrozenTernary = 2 };

// Connections in (row, column) order. Ternary weights have no values: 2 rows + 1 pointers part each
// row into the columns that are added and those that are subtracted.
struct FrozenWeight {
  const void* ptr;     // int32, or int64 if `wide`
  const void* cols;    // uint16, or int32
  const void* values;  // float32 or int8; null if ternary
  const float* scale;  // by row; null if values are float32
  const float* bias;   // by row; may be null
  int64_t connections, features;
  bool wide;
};

// Rows of the weight times some rows of x: y[b, r], b < batch.
struct FrozenPart {
  const float* x;  // one row of x, or a panel of it (features, width)
  float* y;        // rows y_step elements apart
  int64_t batch, y_step;
};

// panel[f, b] = x[b, f], and 0 for the b from `batch` on.
struct FrozenFill {
  const float* x;
  float* panel;
  int64_t batch, row_step, col_step;
};

using FrozenRows = Status (*)(const FrozenWeight&, const FrozenPart&, int64_t row0, int64_t row1);

struct FrozenPanel {
  int width;
  void (*fill)(const FrozenFill&, int64_t first, int64_t last);  // of features
  FrozenRows rows[2][3];  // index: columns of uint16 or int32; FrozenValue
};

constexpr int kMostPanels = 9;
struct FrozenKernels {
  FrozenRows one[2][3];  // for one row of x, without a panel
  int panels;
  FrozenPanel panel[kMostPanels];  // widths ascend
};

// Of the instruction set in use.
const FrozenKernels& frozen_kernels();

}  // namespace rewire
