// Building and changing the index of a pool; see rewire/topology.py for the definition.
#include "pool/index.h"

#include <array>
#include <memory>
#include <new>

#include "pool/merge.h"
#include "pool/search.h"
#include "pool/weave.h"

namespace rewire {
namespace {

template <class I>
std::unique_ptr<I[]> uninitialized(int64_t n) {
  return std::unique_ptr<I[]>(new I[static_cast<size_t>(n)]);
}

// counts[m + 1] = how many -> counts[m] = where they begin.
template <class I>
void accumulate(std::vector<I>& counts) {
  for (size_t m = 1; m < counts.size(); ++m) counts[m] += counts[m - 1];
}

}  // namespace

// Three counting sorts: slots by column, those by row (so columns ascend within a row), those by
// column again. The pool is read once, into copies: another thread may write to it, and what was
// checked must be what is used.
template <class I>
Problem build(const Pool<I>& p) {
  std::vector<I> row_start(static_cast<size_t>(p.n_rows) + 1),
      col_start(static_cast<size_t>(p.n_cols) + 1);
  const auto rows = uninitialized<I>(p.capacity), cols = uninitialized<I>(p.capacity);
  for (int64_t k = 0; k < p.capacity; ++k) {
    const I row = read_once(p.rows + k), col = read_once(p.cols + k);
    if (!p.valid(row, col)) return {kRange, k, 0};
    rows[k] = row;
    cols[k] = col;
    if (row < 0) continue;
    ++row_start[static_cast<size_t>(row) + 1];
    ++col_start[static_cast<size_t>(col) + 1];
  }
  accumulate(row_start);
  accumulate(col_start);
  const int64_t count = row_start.back();

  auto by_row = uninitialized<I>(count);
  {
    auto by_col = uninitialized<I>(count);
    std::vector<I> next(col_start);
    for (int64_t k = 0; k < p.capacity; ++k)
      if (rows[k] >= 0) by_col[next[cols[k]]++] = static_cast<I>(k);
    next = row_start;
    for (int64_t i = 0; i < count; ++i) by_row[next[rows[by_col[i]]]++] = by_col[i];
  }
  for (int64_t i = 1; i < count; ++i) {
    const I a = by_row[i - 1], b = by_row[i];
    if (rows[a] == rows[b] && cols[a] == cols[b]) return {kDuplicate, rows[b], cols[b]};
  }

  std::memcpy(p.by_row.ptr, row_start.data(), row_start.size() * sizeof(I));
  std::memcpy(p.by_col.ptr, col_start.data(), col_start.size() * sizeof(I));
  for (int64_t i = 0; i < count; ++i) {
    const I slot = by_row[i], col = cols[slot];
    p.by_row.minor[i] = col;
    p.by_row.slots[i] = slot;
    const I place = col_start[col]++;
    p.by_col.minor[place] = rows[slot];
    p.by_col.slots[place] = slot;
  }
  for (I* list : {p.by_row.minor, p.by_row.slots, p.by_col.minor, p.by_col.slots})
    std::fill(list + count, list + p.capacity, I{0});
  return kNoProblem;
}

template Problem build(const Pool<int32_t>&);
template Problem build(const Pool<int64_t>&);

Problem check_slots(const int64_t* slots, int64_t n, int64_t capacity) {
  bool ascend = true;
  for (int64_t i = 0; i < n; ++i) {
    if (slots[i] < 0 || slots[i] >= capacity) return {kSlot, slots[i], 0};
    ascend &= i == 0 || slots[i - 1] < slots[i];
  }
  if (!ascend) {
    std::vector<uint64_t> seen(static_cast<size_t>(capacity / 64 + 1));
    int64_t twice = capacity;
    for (int64_t i = 0; i < n; ++i) {
      uint64_t& word = seen[static_cast<size_t>(slots[i] / 64)];
      const uint64_t bit = uint64_t{1} << (slots[i] % 64);
      if ((word & bit) != 0) twice = std::min(twice, slots[i]);
      word |= bit;
    }
    if (twice < capacity) return {kSlot, twice, 0};
  }
  return kNoProblem;
}

namespace {

template <class I>
Problem check_changes(const Pool<I>& p, const int64_t* slots, const int64_t* rows,
                      const int64_t* cols, int64_t n) {
  const Problem problem = check_slots(slots, n, p.capacity);
  if (problem != kNoProblem) return problem;
  for (int64_t i = 0; i < n; ++i)
    if (!p.valid(rows[i], cols[i])) return {kRange, i, 0};
  return kNoProblem;
}

template <class I>
void write_slots(const Pool<I>& p, const int64_t* slots, const int64_t* rows, const int64_t* cols,
                 int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    p.rows[slots[i]] = static_cast<I>(rows[i]);
    p.cols[slots[i]] = static_cast<I>(cols[i]);
  }
}

}  // namespace

template <class I>
Problem rebuild(const Pool<I>& p, const int64_t* slots, const int64_t* rows, const int64_t* cols,
                int64_t n) {
  std::vector<int64_t> old_rows(static_cast<size_t>(n)), old_cols(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    old_rows[static_cast<size_t>(i)] = p.rows[slots[i]];
    old_cols[static_cast<size_t>(i)] = p.cols[slots[i]];
  }
  write_slots(p, slots, rows, cols, n);
  Problem problem = kNoProblem;
  try {
    problem = build(p);
  } catch (...) {
    write_slots(p, slots, old_rows.data(), old_cols.data(), n);
    throw;
  }
  if (problem != kNoProblem) write_slots(p, slots, old_rows.data(), old_cols.data(), n);
  // The changes were checked, so this one was there before.
  require(std::get<0>(problem) != kRange, "replace_",
          "the pool already held a position that is out of range");
  return problem;
}

template Problem rebuild(const Pool<int32_t>&, const int64_t*, const int64_t*, const int64_t*,
                         int64_t);
template Problem rebuild(const Pool<int64_t>&, const int64_t*, const int64_t*, const int64_t*,
                         int64_t);

namespace {

// As `rebuild`, of the lists there are; derived anew where they are not those of the pool.
template <class I>
Problem replace_many(const Pool<I>& p, const int64_t* slots, const int64_t* rows,
                     const int64_t* cols, int64_t n) {
  Weaver<I> weaver(p, slots, rows, cols, n);
  weaver.look();
  Woven<I> woven;
  if (!weaver.weave(true, woven))
    return rebuild(p, slots, rows, cols, n);  // which finds out what is wrong
  weaver.carry_out(p.by_row, woven);
  if (!weaver.weave(false, woven)) {
    const Problem problem = rebuild(p, slots, rows, cols, n);
    if (problem != kNoProblem) build(p);  // the pool is what it was, but its list by row is not
    return problem;
  }
  write_slots(p, slots, rows, cols, n);
  weaver.carry_out(p.by_col, woven);
  return kNoProblem;
}

}  // namespace

template <class I>
Problem replace(const Pool<I>& p, const int64_t* slots, const int64_t* rows, const int64_t* cols,
                int64_t n) {
  Problem problem = check_changes(p, slots, rows, cols, n);
  if (problem != kNoProblem || n == 0) return problem;
  if (too_many_to_merge(n, p.capacity)) return replace_many(p, slots, rows, cols, n);

  Moves<I> removed(n), added(n);
  for (int64_t i = 0; i < n; ++i) {
    if (const int64_t ahead = i + kAhead; ahead < n) {
      prefetch_from(p.rows, slots[ahead - 1], slots[ahead]);
      prefetch_from(p.cols, slots[ahead - 1], slots[ahead]);
    }
    const I slot = static_cast<I>(slots[i]), row = read_once(p.rows + slot),
            col = read_once(p.cols + slot);
    if (!p.valid(row, col)) return rebuild(p, slots, rows, cols, n);
    if (row >= 0) removed.by_row[removed.count++] = {row, col, slot};
    if (rows[i] >= 0)
      added.by_row[added.count++] = {static_cast<I>(rows[i]), static_cast<I>(cols[i]), slot};
  }
  const bool serial = p.capacity < kSerialMerge;
  for_each_item(2, serial || n < kSerialSort, [&](int64_t s) {
    Moves<I>& moves = s == 0 ? removed : added;
    moves.sort_rows(p.n_rows, p.n_cols);
    Fresh<Change<I>> other(moves.count + 1);
    moves.from_rows(p.n_rows, p.n_cols, other);
  });
  const Merge<I> merge(p, removed, added, n);
  if (!merge.run(false, serial) || !merge.run(true, serial))
    return rebuild(p, slots, rows, cols, n);
  write_slots(p, slots, rows, cols, n);
  return kNoProblem;
}

template Problem replace(const Pool<int32_t>&, const int64_t*, const int64_t*, const int64_t*,
                         int64_t);
template Problem replace(const Pool<int64_t>&, const int64_t*, const int64_t*, const int64_t*,
                         int64_t);

namespace {

// The memory of a list, from its first element to its last. (Asked for once: every question to a
// tensor is a call.)
struct Extent {
  uintptr_t begin = 0, end = 0;
  Extent() = default;
  explicit Extent(const Tensor& t) {
    const int64_t count = t.numel();
    if (count == 0) return;
    begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    end = begin + static_cast<uintptr_t>((count - 1) * t.stride(0) + 1) *
                      (t.scalar_type() == ScalarType::Int ? 4 : 8);
  }
  bool meets(const Extent& o) const { return begin < o.end && o.begin < end; }
};

}  // namespace

void require_apart(const char* op, std::initializer_list<const Tensor*> written,
                   std::initializer_list<const Tensor*> read) {
  std::array<Extent, 16> all;
  size_t count = 0;
  for (const auto* list : {&written, &read})
    for (const Tensor* t : *list) all.at(count++) = Extent(*t);
  for (size_t a = 0; a < written.size(); ++a)
    for (size_t b = a + 1; b < count; ++b)
      require(!all[a].meets(all[b]), op,
              "rows, cols and the lists of the index must not share memory");
}

namespace {

Problem build_index_(const Tensor& rows_, const Tensor& cols_, int64_t n_rows, int64_t n_cols,
                     const Tensor& row_ptr, const Tensor& row_cols, const Tensor& row_slots,
                     const Tensor& col_ptr, const Tensor& col_rows, const Tensor& col_slots) {
  const Tensor rows = packed(rows_), cols = packed(cols_);
  const PoolTensors t{rows,    cols,     row_ptr,   row_cols, row_slots,
                      col_ptr, col_rows, col_slots, n_rows,   n_cols};
  const int type = t.check("build_index_");
  require_apart("build_index_", {&row_ptr, &row_cols, &row_slots, &col_ptr, &col_rows, &col_slots},
                {&rows_, &cols_});
  return type == kInt32 ? build(t.pool<int32_t>()) : build(t.pool<int64_t>());
}

Problem replace_(const Tensor& rows, const Tensor& cols, const Tensor& row_ptr,
                 const Tensor& row_cols, const Tensor& row_slots, const Tensor& col_ptr,
                 const Tensor& col_rows, const Tensor& col_slots, int64_t n_rows, int64_t n_cols,
                 const Tensor& slots_, const Tensor& new_rows_, const Tensor& new_cols_) {
  const char* op = "replace_";
  const PoolTensors t{rows,    cols,     row_ptr,   row_cols, row_slots,
                      col_ptr, col_rows, col_slots, n_rows,   n_cols};
  // Copies: the caller's may be parts of what is written below, and another thread may write to
  // them.
  const Integers slots = own_integers(slots_, op), new_rows = own_integers(new_rows_, op),
                 new_cols = own_integers(new_cols_, op);
  require(slots.count == new_rows.count && slots.count == new_cols.count, op,
          "slots, new rows and new columns must be equally many");
  const int type = t.check(op);
  require_apart(
      op, {&rows, &cols, &row_ptr, &row_cols, &row_slots, &col_ptr, &col_rows, &col_slots}, {});
  return type == kInt32
             ? replace(t.pool<int32_t>(), slots.data, new_rows.data, new_cols.data, slots.count)
             : replace(t.pool<int64_t>(), slots.data, new_rows.data, new_cols.data, slots.count);
}

}  // namespace

REWIRE_OPERATOR(build_index_,
                "(Tensor rows, Tensor cols, int n_rows, int n_cols, Tensor(a!) row_ptr, Tensor(b!) "
                "row_cols, Tensor(c!) row_slots, Tensor(d!) col_ptr, Tensor(e!) col_rows, "
                "Tensor(f!) col_slots) -> (int, int, int)")
REWIRE_OPERATOR(
    replace_,
    "(Tensor(a!) rows, Tensor(b!) cols, Tensor(c!) row_ptr, Tensor(d!) row_cols, Tensor(e!) "
    "row_slots, Tensor(f!) col_ptr, Tensor(g!) col_rows, Tensor(h!) col_slots, int n_rows, int "
    "n_cols, Tensor slots, Tensor new_rows, Tensor new_cols) -> (int, int, int)")

}  // namespace rewire
