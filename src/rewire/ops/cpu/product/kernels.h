// What the drivers (products.cpp, layout.cpp) ask of the vector kernels of products.
#pragma once

#include "simd/target.h"
#include "simd/types.h"

namespace rewire {

// One index list, by row or by column. I (int32 or int64) is known to the function that is called.
struct List {
  const void* ptr;    // rows + 1
  const void* idx;    // length
  const void* slots;  // length
  int64_t length;
};

// A part of the product's columns, so that the runs of x it reads stay in the cache. A row goes on
// where the tile before stopped, up to the first column of the next tile; the last tile takes
// whatever is left, in order or not.
struct Tile {
  int64_t* next;  // by row: the connection to go on with
  int64_t end;    // first column of the next tile
  bool first, last;
};

// Sums, values and bias have the accumulator's type: float32 for x of 16 bits, else that of x.

// y[r, b] = bias[r] + sum of values[slot] * x[c, b]; the batch is contiguous.
struct SpmmArgs {
  List list;
  const void* values;
  const void* bias;  // may be null
  const void* x;     // (features, batch), features x_step elements apart
  void* y;           // (rows, batch), rows y_step elements apart
  int64_t capacity, features, x_step, y_step;
  bool scattered;  // values that follow each other in the list lie far apart in memory: fetch them
                   // early
};

// out[slot] (+)= sum over b of g[r, b] * x[c, b].
struct SddmmArgs {
  List list;
  const void* g;  // (rows, batch), rows g_step elements apart
  const void* x;  // (features, batch), features x_step elements apart
  void* out;      // capacity
  int64_t capacity, features, g_step, x_step;
};

// Both at once: y[r, b] = sum of values[slot] * x[c, b], and out[slot] (+)= sum over b of g[r, b] *
// x[c, b].
struct FusedArgs {
  List list;
  const void* values;
  const void* g;  // (rows, batch), rows g_step elements apart
  const void* x;  // (features, batch), features x_step elements apart
  void* y;        // (rows, batch), rows y_step elements apart
  void* out;      // capacity
  int64_t capacity, features, g_step, x_step, y_step;
  bool scattered;  // as in SpmmArgs
};

// Rows [row0, row1) and batch columns [b0, b0 + width) of a product; without a tile all connections
// of the rows.
struct Part {
  int64_t row0, row1, b0, width;
  const Tile* tile;
};

// dst[r * dst_step + c] = src[r * row_step + c * col_step], for `cols` columns.
struct CopyArgs {
  const void* src;
  void* dst;
  int64_t cols, dst_step, row_step, col_step;
};

struct ProductKernels {
  int lanes[4];  // accumulators in the widest vector, by element type
  // First index: element type, second: index type.
  Status (*spmm[4][2])(const SpmmArgs&, const Part&);
  Status (*sddmm[4][2])(const SddmmArgs&, const Part&, bool add);
  Status (*fused[4][2])(const FusedArgs&, const Part&, bool add);
  // n numbers of bfloat16 or float16 to float32, and back to the nearest (ties to even).
  void (*widen[2])(const void* src, void* dst, int64_t n);
  void (*narrow[2])(const void* src, void* dst, int64_t n);
  void (*copy[4])(const CopyArgs&, int64_t row0, int64_t row1);
};

}  // namespace rewire

REWIRE_EACH_TARGET(ProductKernels, kProducts)

namespace rewire {

// Of the instruction set in use.
inline const ProductKernels& product_kernels() { return REWIRE_BEST(kProducts); }

}  // namespace rewire
