// The table of vector kernels: what the drivers (products.cpp, layout.cpp) ask of one instruction set.
//
// kernels.inc implements it once per instruction set, in translation units compiled for that set. Such a unit
// must not instantiate inline functions of the standard library (the linker might keep the AVX-512 copy for
// everybody), so this header holds plain data only.
#pragma once

#include <cstdint>

#include "philox.h"

namespace rewire {

enum Status : int { kFine = 0, kBadPointer = 1, kBadIndex = 2, kBadSlot = 3 };

// One index list, by row or by column. I (int32 or int64) is known to the function that is called.
struct List {
  const void* ptr;    // rows + 1
  const void* idx;    // length
  const void* slots;  // length
  int64_t length;
};

// A part of the product's columns, so that the runs of x it reads stay in the cache. A row goes on where the tile before
// stopped, up to the first column of the next tile; the last tile takes whatever is left, in order or not.
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
  bool scattered;  // values that follow each other in the list lie far apart in memory: fetch them early
};

// out[slot] (+)= sum over b of g[r, b] * x[c, b].
struct SddmmArgs {
  List list;
  const void* g;  // (rows, batch), rows g_step elements apart
  const void* x;  // (features, batch), features x_step elements apart
  void* out;      // capacity
  int64_t capacity, features, g_step, x_step;
};

// Both at once: y[r, b] = sum of values[slot] * x[c, b], and out[slot] (+)= sum over b of g[r, b] * x[c, b].
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

// Rows [row0, row1) and batch columns [b0, b0 + width) of a product; without a tile all connections of the rows.
struct Part {
  int64_t row0, row1, b0, width;
  const Tile* tile;
};

// dst[r, c] = src[r * row_step + c * col_step], dst contiguous with `cols` columns.
struct CopyArgs {
  const void* src;
  void* dst;
  int64_t cols, row_step, col_step;
};

// theta <- theta - shrink + noise * nu over slots; see rewire/ops/langevin.py.
struct LangevinArgs {
  void* values;
  const void* rows;  // null where no slot is empty
  const int8_t* signs;
  uint64_t* dropped;  // one bit per slot
  double shrink, noise;
  uint64_t seed;
  uint32_t step, stream;
};
constexpr int kBitsAtOnce = 2;
constexpr int64_t kLangevinGrain = 128;  // ranges of slots start at multiples of this

// A connection that leaves or enters a list of the index.
template <class I>
struct Change {
  I major, minor, slot;
};

// A list of `capacity` entries by `majors` rows (or columns), and what leaves and enters it, each sorted by (major, minor)
// with majors in range. The result is false where the list is not what the changes say (one that leaves is not there, one
// that enters is there already or enters twice); the list may then be half changed. Without a room nothing is changed.
struct MergeArgs {
  void *ptr, *minor, *slots;
  int64_t majors, capacity;
  const void *removed, *added;  // Change<I>, and behind them one whose major is `majors`
  int64_t n_removed, n_added;
  void* room;  // merge_room(n_added) numbers, or null
};
constexpr int64_t kMergeChunk = 2048;  // entries that the room is there for, and more
REWIRE_STATIC int64_t merge_room(int64_t n_added) { return 2 * (2 * n_added + kMergeChunk + 64); }

// The list by row, whose pointers start at 0 and end at `length` at most, but may be anything in between. `dormant`: positions
// that are not in it.
struct DormantArgs {
  const void *ptr, *cols;
  int64_t rows, length, n_cols, dormant;
};

// One packed row of a convolution: rows of y are output channels, x the source row (see conv.cpp for the layout).
struct ConvArgs {
  const int64_t* ptr;      // rows + 1, into offsets, values and sums
  const int32_t* offsets;  // of the connections, in positions of x
  const void* values;      // of the connections
  const void* bias;        // by row of y; may be null
  const void* x;
  void* y;     // rows y_step elements apart
  void* sums;  // of the connections; only for conv_dot
  int64_t scale, y_step;  // elements per position of x; elements per row of y
};

// A part of a packed row, and the same in a tensor whose elements r follow each other, `step` per batch.
struct ConvCopy {
  void* packed;
  void* plain;
  const int64_t* place;  // of element r in packed, where the batch is contiguous
  int64_t rows, batch, step;
};

constexpr int kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kInt32 = 0, kInt64 = 1;
// Accumulators held in registers by one pass over a row. (Under sanitizers half as many: the same code for fewer of them, of
// which a fraction has to be built.)
#if defined(__SANITIZE_ADDRESS__)
constexpr int kVectorsPerBlock = 4;
#else
constexpr int kVectorsPerBlock = 8;
#endif

struct Kernels {
  const char* name;
  int lanes[4];  // accumulators in the widest vector, by element type
  // First index: element type, second: index type.
  Status (*spmm[4][2])(const SpmmArgs&, const Part&);
  Status (*sddmm[4][2])(const SddmmArgs&, const Part&, bool add);
  Status (*fused[4][2])(const FusedArgs&, const Part&, bool add);
  // n numbers of bfloat16 or float16 to float32, and back to the nearest (ties to even).
  void (*widen[2])(const void* src, void* dst, int64_t n);
  void (*narrow[2])(const void* src, void* dst, int64_t n);
  void (*copy[4])(const CopyArgs&, int64_t row0, int64_t row1);
  void (*langevin[2][2])(const LangevinArgs&, int64_t begin, int64_t end);
  // Rows [row0, row1), n elements of each: y[r] = bias[r] + sum of value * x[offset]; sums (+)= <y[r], x[offset]>.
  void (*conv_sum[2])(const ConvArgs&, int64_t row0, int64_t row1, int64_t n);
  void (*conv_dot[2])(const ConvArgs&, int64_t row0, int64_t row1, int64_t n);
  void (*conv_pack[2])(const ConvCopy&);
  void (*conv_unpack[2])(const ConvCopy&);
  bool (*merge[2])(const MergeArgs&);
  // topology.candidates for the ranks of dormant positions; of dropped ones, row and col are left alone.
  Status (*dormant[2])(const DormantArgs&, const int64_t* ranks, int64_t n, int64_t* row, int64_t* col);
  // random.bits of the numbers first, first + 1, ... (the lower 63 of 64 bits); topology.position_signs.
  void (*random_bits)(uint64_t seed, uint32_t step, uint32_t stream, int64_t first, int64_t n, int64_t* out);
  void (*position_signs)(const int64_t* rows, const int64_t* cols, int64_t n, uint64_t seed, uint32_t stream,
                         int8_t* out);
  int64_t (*list_bits)(const uint64_t* words, int64_t n, int64_t* out);
  void (*add_normals[2])(void* values, double scale, uint64_t seed, uint32_t step, uint32_t stream, int64_t begin,
                         int64_t end);
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace rewire
