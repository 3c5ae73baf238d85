// Random subsets, random dormant connections and signs of positions; see rewire/random.py and
// rewire/topology.py, whose definitions these follow to the letter.
#pragma once

#include <limits>
#include <tuple>
#include <utility>

#include "pool/kernels.h"
#include "pool/search.h"
#include "random/kernels.h"
#include "random/philox.h"
#include "runtime.h"

namespace rewire {

struct Coordinates {
  uint64_t seed;
  uint32_t step, stream;
  int64_t below(int64_t index, int64_t bound) const {
    return philox_below(seed, step, stream, index, bound);
  }
};

// random.distinct into out[0 ... n).
void distinct_into(int64_t n, int64_t bound, const Coordinates& at, int64_t offset, int64_t* out);

// The list by row, and what is not in it.
template <class I>
struct Complement {
  const char* op;
  const I *ptr, *cols;
  int64_t rows, length, n_cols;
  int64_t dormant;  // positions that are not in the list

  Complement(const Tensor& ptr_, const Tensor& cols_, int64_t n_cols_, const char* op_)
      : op(op_),
        ptr(static_cast<const I*>(ptr_.const_data_ptr())),
        cols(static_cast<const I*>(cols_.const_data_ptr())),
        rows(ptr_.numel() - 1),
        length(cols_.numel()),
        n_cols(n_cols_) {
    const int64_t connections = read_once(ptr + rows);
    require(ptr[0] == 0 && connections >= 0 && connections <= length, op,
            "row_ptr must start at 0 and end at the number of connections, at most the length of "
            "row_cols");
    dormant = rows * n_cols - connections;
    require(dormant >= 0, op, "the index has more connections than there are positions");
  }

  // The active columns of a row.
  std::pair<const I*, int64_t> row(int64_t row) const {
    const int64_t begin = read_once(ptr + row), end = read_once(ptr + row + 1);
    require(begin >= 0 && begin <= end && end <= length, op,
            "row_ptr must never fall and stay within row_cols");
    return {cols + begin, end - begin};
  }

  DormantArgs args() const { return {ptr, cols, rows, length, n_cols, dormant}; }

  // topology.candidates of some ranks; those of dropped connections are left to the caller.
  void find(const int64_t* ranks, int64_t n, int64_t* row, int64_t* col) const {
    const Status status =
        pool_kernels().dormant[sizeof(I) == 4 ? kInt32 : kInt64](args(), ranks, n, row, col);
    require(status != kBadIndex, op, "a rank is out of range");
    require(status == kFine, op, "row_ptr must never fall and stay within row_cols");
  }
};

// work(Complement<I>) for the index type of the lists.
template <class Work>
auto with_complement(const Tensor& ptr_, const Tensor& cols_, int64_t n_cols, const char* op,
                     const Work& work) {
  const int type = index_type(ptr_, op);
  require(ptr_.is_cpu() && cols_.is_cpu(), op, "every tensor must be on the CPU");
  require(index_type(cols_, op) == type, op, "row_ptr and row_cols must have one dtype");
  require(ptr_.dim() == 1 && cols_.dim() == 1 && ptr_.numel() >= 1, op,
          "row_ptr and row_cols must be lists");
  require(n_cols >= 0, op, "n_cols must not be negative");
  require(ptr_.numel() - 1 <= std::numeric_limits<int64_t>::max() / std::max<int64_t>(n_cols, 1),
          op, "the matrix has too many positions");
  const Tensor ptr = packed(ptr_), cols = packed(cols_);
  return type == kInt32 ? work(Complement<int32_t>(ptr, cols, n_cols, op))
                        : work(Complement<int64_t>(ptr, cols, n_cols, op));
}

// topology.candidates: row[i] and col[i] of ranks[i]; dropped(i) is the i-th dropped connection, or
// an exception. Nobody else may write to `ranks` meanwhile.
template <class I, class Dropped>
void map_ranks(const Complement<I>& list, const int64_t* ranks, int64_t n, int64_t* row,
               int64_t* col, const Dropped& dropped) {
  list.find(ranks, n, row, col);
  for (int64_t i = 0; i < n; ++i)
    if (ranks[i] >= list.dormant) std::tie(row[i], col[i]) = dropped(ranks[i] - list.dormant);
}

}  // namespace rewire
