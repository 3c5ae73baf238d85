// What the drivers (merge.h, random/sampling.h) ask of the vector kernels that read and change
// index lists.
#pragma once

#include "simd/types.h"

namespace rewire {

// A connection that leaves or enters a list of the index.
template <class I>
struct Change {
  I major, minor, slot;
};

// A list of `capacity` entries by `majors` rows (or columns), and what leaves and enters it, each
// sorted by (major, minor) with majors in range. The result is false where the list is not what the
// changes say (one that leaves is not there, one that enters is there already or enters twice); the
// list may then be half changed. Without a room nothing is changed.
struct MergeArgs {
  void *ptr, *minor, *slots;
  int64_t majors, capacity;
  const void *removed, *added;  // Change<I>, and behind them one whose major is `majors`
  int64_t n_removed, n_added;
  void* room;  // merge_room(n_added) numbers, or null
};
constexpr int64_t kMergeChunk = 2048;  // entries that the room is there for, and more
REWIRE_STATIC int64_t merge_room(int64_t n_added) { return 2 * (2 * n_added + kMergeChunk + 64); }

// The list by row, whose pointers start at 0 and end at `length` at most, but may be anything in
// between. `dormant`: positions that are not in it.
struct DormantArgs {
  const void *ptr, *cols;
  int64_t rows, length, n_cols, dormant;
};

struct PoolKernels {
  bool (*merge[2])(const MergeArgs&);
  // topology.candidates for the ranks of dormant positions; of dropped ones, row and col are left
  // alone.
  Status (*dormant[2])(const DormantArgs&, const int64_t* ranks, int64_t n, int64_t* row,
                       int64_t* col);
};

// Of the instruction set in use.
const PoolKernels& pool_kernels();

}  // namespace rewire
