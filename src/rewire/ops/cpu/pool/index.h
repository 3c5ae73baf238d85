// The pool and its index as native code sees them; see rewire/topology.py for the definition.
//
// Every function validates before it writes. Errors are returned as (code, a, b) and worded in
// Python.
#pragma once

#include <initializer_list>
#include <limits>
#include <tuple>

#include "runtime.h"

namespace rewire {

using Problem = std::tuple<int64_t, int64_t, int64_t>;
constexpr int64_t kOk = 0, kSlot = 1, kRange = 2, kDuplicate = 3;
const Problem kNoProblem{kOk, 0, 0};

// One of the two lists: by row (major = row, minor = column) or by column.
template <class I>
struct Side {
  I *ptr, *minor, *slots;
  int64_t majors, minors;
};

template <class I>
struct Pool {
  I *rows, *cols;
  int64_t capacity, n_rows, n_cols;
  Side<I> by_row, by_col;

  bool valid(int64_t row, int64_t col) const {
    return (row == -1 && col == -1) || (row >= 0 && row < n_rows && col >= 0 && col < n_cols);
  }
};

// Validates a pool and derives both lists.
template <class I>
Problem build(const Pool<I>& p);

// Overwrites n slots and brings both lists in line.
template <class I>
Problem replace(const Pool<I>& p, const int64_t* slots, const int64_t* rows, const int64_t* cols,
                int64_t n);

// As `replace` for changes that have been checked, by building the lists anew.
template <class I>
Problem rebuild(const Pool<I>& p, const int64_t* slots, const int64_t* rows, const int64_t* cols,
                int64_t n);

// The first slot that is not there, or else the lowest one that is given twice.
Problem check_slots(const int64_t* slots, int64_t n, int64_t capacity);

// So many changes that building the lists anew takes no longer.
inline bool too_many_to_merge(int64_t n, int64_t capacity) {
  return n > capacity / 8 + 8 || n > std::numeric_limits<int32_t>::max();
}

// Pools of fewer slots, and fewer changes than this, are worked on by the caller alone.
constexpr int64_t kSerialMerge = 1 << 15, kSerialSort = 512;

template <class I>
I* data_of(const Tensor& t) {
  return static_cast<I*>(t.mutable_data_ptr());
}

struct PoolTensors {
  const Tensor &rows, &cols, &row_ptr, &row_cols, &row_slots, &col_ptr, &col_rows, &col_slots;
  int64_t n_rows, n_cols;

  template <class I>
  Pool<I> pool() const {
    return {data_of<I>(rows),
            data_of<I>(cols),
            rows.numel(),
            n_rows,
            n_cols,
            {data_of<I>(row_ptr), data_of<I>(row_cols), data_of<I>(row_slots), n_rows, n_cols},
            {data_of<I>(col_ptr), data_of<I>(col_rows), data_of<I>(col_slots), n_cols, n_rows}};
  }

  // The index type; every tensor must fit it and the dimensions.
  int check(const char* op) const {
    const int type = index_type(rows, op);
    for (const Tensor* t :
         {&rows, &cols, &row_ptr, &row_cols, &row_slots, &col_ptr, &col_rows, &col_slots}) {
      require_cpu(*t, op);
      require(index_type(*t, op) == type, op, "rows, cols and the index must have one dtype");
      require(t->dim() == 1 && t->is_contiguous(), op,
              "rows, cols and the index must be contiguous lists");
    }
    const int64_t bound = type == kInt32 ? int64_t{1} << 31 : std::numeric_limits<int64_t>::max();
    require(n_rows >= 0 && n_cols >= 0 && n_rows < bound && n_cols < bound && rows.numel() < bound,
            op, "the dimensions do not fit the dtype of the index");
    require(row_ptr.numel() == n_rows + 1 && col_ptr.numel() == n_cols + 1, op,
            "row_ptr and col_ptr must have one entry more than there are rows and columns");
    for (const Tensor* t : {&cols, &row_cols, &row_slots, &col_rows, &col_slots})
      require(t->numel() == rows.numel(), op, "cols and the lists must be as long as rows");
    return type;
  }
};

// What is validated and then written must not change by being written.
void require_apart(const char* op, std::initializer_list<const Tensor*> written,
                   std::initializer_list<const Tensor*> read);

}  // namespace rewire
