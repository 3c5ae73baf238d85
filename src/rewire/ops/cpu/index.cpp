// Building and changing the index of a pool; see rewire/topology.py for the definition.
//
// Every function validates before it writes. Errors are returned as (code, a, b) and worded in Python.
#include <array>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "runtime.h"

namespace rewire {
namespace {

using Problem = std::tuple<int64_t, int64_t, int64_t>;
constexpr int64_t kOk = 0, kSlot = 1, kRange = 2, kDuplicate = 3;
const Problem kNoProblem{kOk, 0, 0};

// One of the two lists: by row (major = row, minor = column) or by column.
template <class I>
struct Side {
  I *ptr, *minor, *slots;
  int64_t majors;
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

template <class I>
std::unique_ptr<I[]> uninitialized(int64_t n) {
  return std::unique_ptr<I[]>(new I[static_cast<size_t>(n)]);
}

// counts[m + 1] = how many -> counts[m] = where they begin.
template <class I>
void accumulate(std::vector<I>& counts) {
  for (size_t m = 1; m < counts.size(); ++m) counts[m] += counts[m - 1];
}

// Three counting sorts: slots by column, those by row (so columns ascend within a row), those by column again.
template <class I>
Problem build(const Pool<I>& p) {
  std::vector<I> row_start(static_cast<size_t>(p.n_rows) + 1), col_start(static_cast<size_t>(p.n_cols) + 1);
  for (int64_t k = 0; k < p.capacity; ++k) {
    if (!p.valid(p.rows[k], p.cols[k])) return {kRange, k, 0};
    if (p.rows[k] < 0) continue;
    ++row_start[static_cast<size_t>(p.rows[k]) + 1];
    ++col_start[static_cast<size_t>(p.cols[k]) + 1];
  }
  accumulate(row_start);
  accumulate(col_start);
  const int64_t count = row_start.back();

  auto by_row = uninitialized<I>(count);
  {
    auto by_col = uninitialized<I>(count);
    std::vector<I> next(col_start);
    for (int64_t k = 0; k < p.capacity; ++k)
      if (p.rows[k] >= 0) by_col[next[p.cols[k]]++] = static_cast<I>(k);
    next = row_start;
    for (int64_t i = 0; i < count; ++i) by_row[next[p.rows[by_col[i]]]++] = by_col[i];
  }
  for (int64_t i = 1; i < count; ++i) {
    const I a = by_row[i - 1], b = by_row[i];
    if (p.rows[a] == p.rows[b] && p.cols[a] == p.cols[b]) return {kDuplicate, p.rows[b], p.cols[b]};
  }

  std::memcpy(p.by_row.ptr, row_start.data(), row_start.size() * sizeof(I));
  std::memcpy(p.by_col.ptr, col_start.data(), col_start.size() * sizeof(I));
  for (int64_t i = 0; i < count; ++i) {
    const I slot = by_row[i], col = p.cols[slot];
    p.by_row.minor[i] = col;
    p.by_row.slots[i] = slot;
    const I place = col_start[col]++;
    p.by_col.minor[place] = p.rows[slot];
    p.by_col.slots[place] = slot;
  }
  for (I* list : {p.by_row.minor, p.by_row.slots, p.by_col.minor, p.by_col.slots})
    std::fill(list + count, list + p.capacity, I{0});
  return kNoProblem;
}

// A connection that leaves or enters a list, and where: at or before which of the old entries.
template <class I>
struct Move {
  I major, minor, slot, at;
  bool operator<(const Move& o) const { return major != o.major ? major < o.major : minor < o.minor; }
};

template <class I>
struct Plan {
  std::vector<Move<I>> removed, added;
  bool broken = false;  // the list is not what the pool says: derive it anew
  Problem problem = kNoProblem;
};

// By (major, minor): a radix sort, digit by digit of 11 bits, unless there are few or they are in order.
template <class I>
void sort_moves(std::vector<Move<I>>& moves) {
  if (std::is_sorted(moves.begin(), moves.end())) return;
  if (moves.size() < 500) {
    std::sort(moves.begin(), moves.end());
    return;
  }
  constexpr int kBits = 11;
  std::vector<Move<I>> other(moves.size());
  for (I Move<I>::*key : {&Move<I>::minor, &Move<I>::major}) {
    I most = 0;
    for (const Move<I>& m : moves) most = std::max(most, m.*key);
    for (int shift = 0; shift < std::numeric_limits<I>::digits && most >> shift > 0; shift += kBits) {
      size_t start[(1 << kBits) + 1] = {};
      const auto digit = [&](const Move<I>& m) { return static_cast<size_t>(m.*key >> shift) & ((1 << kBits) - 1); };
      for (const Move<I>& m : moves) ++start[digit(m) + 1];
      for (int d = 0; d < 1 << kBits; ++d) start[d + 1] += start[d];
      for (const Move<I>& m : moves) other[start[digit(m)]++] = m;
      moves.swap(other);
    }
  }
}

// Sets `at` of every move to the first entry of its row that is not before it. The searches are far apart in memory:
// the entries of a row are asked for some searches ahead, and no step of a search is a branch to be guessed.
template <class I>
void search(const Side<I>& side, int64_t capacity, Plan<I>& plan, std::vector<Move<I>>& moves) {
  constexpr size_t kAhead = 8;
  constexpr int64_t kLine = 64 / sizeof(I), kMost = 16;
  for (size_t i = 0; i < moves.size(); ++i) {
    if (i + kAhead < moves.size()) {
      const int64_t major = moves[i + kAhead].major;
      const int64_t begin = std::clamp<int64_t>(side.ptr[major], 0, capacity);
      const int64_t end = std::clamp<int64_t>(side.ptr[major + 1], begin, capacity);
      const int64_t stride = std::max(kLine, (end - begin) / kMost);
      for (int64_t e = begin; e < end; e += stride) __builtin_prefetch(side.minor + e);
    }
    Move<I>& m = moves[i];
    const int64_t begin = side.ptr[m.major], end = side.ptr[m.major + 1];
    if (begin < 0 || begin > end || end > capacity) {
      plan.broken = true;
      return;
    }
    const I* base = side.minor + begin;
    int64_t length = end - begin;
    while (length > 1) {
      const int64_t half = length / 2;
      base += static_cast<int64_t>(base[half - 1] < m.minor) * half;
      length -= half;
    }
    if (length == 1) base += *base < m.minor;
    m.at = static_cast<I>(base - side.minor);
  }
}

// Finds the places of all moves in one list and looks for connections that would occur twice.
template <class I>
void locate(const Side<I>& side, int64_t capacity, Plan<I>& plan) {
  const int64_t count = side.ptr[side.majors];
  const int64_t after = count - static_cast<int64_t>(plan.removed.size()) + static_cast<int64_t>(plan.added.size());
  if (count < 0 || count > capacity || after < 0 || after > capacity) {
    plan.broken = true;
    return;
  }
  for (auto* moves : {&plan.removed, &plan.added}) {
    sort_moves(*moves);
    search(side, capacity, plan, *moves);
    if (plan.broken) return;
  }
  int64_t before = -1;
  for (const Move<I>& m : plan.removed) {
    if (m.at <= before || m.at >= count || side.slots[m.at] != m.slot) {
      plan.broken = true;
      return;
    }
    before = m.at;
  }
  size_t gone = 0;
  before = 0;
  for (size_t i = 0; i < plan.added.size(); ++i) {
    const Move<I>& m = plan.added[i];
    if (m.at < before || m.at > count) {
      plan.broken = true;
      return;
    }
    before = m.at;
    while (gone < plan.removed.size() && plan.removed[gone].at < m.at) ++gone;
    const bool there = m.at < side.ptr[m.major + 1] && side.minor[m.at] == m.minor;
    const bool leaves = gone < plan.removed.size() && plan.removed[gone].at == m.at;
    if ((there && !leaves) || (i + 1 < plan.added.size() && !(m < plan.added[i + 1]))) {
      plan.problem = {kDuplicate, m.major, m.minor};
      return;
    }
  }
}

// Carries a plan out, in place. The entries between two changes keep their order and move by the number of entries
// that came less those that left before them. Those that move left go first, from the left; those that move right
// after, from the right: so none is written over before it has moved.
template <class I>
void apply(const Side<I>& side, const Plan<I>& plan, std::vector<std::array<int64_t, 3>>& segments,
           std::vector<int64_t>& places) {
  const std::vector<Move<I>>&removed = plan.removed, &added = plan.added;
  const int64_t count = side.ptr[side.majors];
  int64_t begin = 0, shift = 0;
  for (size_t r = 0, a = 0; r < removed.size() || a < added.size();) {
    const bool adds = a < added.size() && (r == removed.size() || added[a].at <= removed[r].at);
    const int64_t at = adds ? added[a].at : removed[r].at;
    if (at > begin && shift != 0) segments.push_back({begin, at, shift});
    if (adds) {
      places.push_back(at + shift++);
      begin = at;
      ++a;
    } else {
      --shift;
      begin = at + 1;
      ++r;
    }
  }
  if (count > begin && shift != 0) segments.push_back({begin, count, shift});
  const auto move = [](I* list, const std::array<int64_t, 3>& s) {
    std::memmove(list + s[0] + s[2], list + s[0], static_cast<size_t>(s[1] - s[0]) * sizeof(I));
  };
  for (I* list : {side.minor, side.slots}) {
    for (auto s = segments.begin(); s != segments.end(); ++s)
      if ((*s)[2] < 0) move(list, *s);
    for (auto s = segments.rbegin(); s != segments.rend(); ++s)
      if ((*s)[2] > 0) move(list, *s);
    if (shift < 0) std::memset(list + count + shift, 0, static_cast<size_t>(-shift) * sizeof(I));
  }
  for (size_t a = 0; a < added.size(); ++a) {
    side.minor[places[a]] = static_cast<I>(added[a].minor);
    side.slots[places[a]] = static_cast<I>(added[a].slot);
  }
  int64_t change = 0;
  size_t r = 0, a = 0;
  for (int64_t m = 0; m < side.majors; ++m) {
    for (; r < removed.size() && removed[r].major == m; ++r) --change;
    for (; a < added.size() && added[a].major == m; ++a) ++change;
    side.ptr[m + 1] = static_cast<I>(side.ptr[m + 1] + change);
  }
}

template <class I>
Problem check_changes(const Pool<I>& p, const int64_t* slots, const int64_t* rows, const int64_t* cols, int64_t n) {
  std::vector<uint64_t> seen(static_cast<size_t>(p.capacity / 64 + 1));
  for (int64_t i = 0; i < n; ++i)
    if (slots[i] < 0 || slots[i] >= p.capacity) return {kSlot, slots[i], 0};
  int64_t twice = p.capacity;
  for (int64_t i = 0; i < n; ++i) {
    uint64_t& word = seen[static_cast<size_t>(slots[i] / 64)];
    const uint64_t bit = uint64_t{1} << (slots[i] % 64);
    if ((word & bit) != 0) twice = std::min(twice, slots[i]);
    word |= bit;
  }
  if (twice < p.capacity) return {kSlot, twice, 0};
  for (int64_t i = 0; i < n; ++i)
    if (!p.valid(rows[i], cols[i])) return {kRange, i, 0};
  return kNoProblem;
}

template <class I>
void write_slots(const Pool<I>& p, const int64_t* slots, const int64_t* rows, const int64_t* cols, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    p.rows[slots[i]] = static_cast<I>(rows[i]);
    p.cols[slots[i]] = static_cast<I>(cols[i]);
  }
}

template <class I>
Problem rebuild(const Pool<I>& p, const int64_t* slots, const int64_t* rows, const int64_t* cols, int64_t n) {
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
  require(std::get<0>(problem) != kRange, "replace_", "the pool already held a position that is out of range");
  return problem;
}

template <class I>
Problem replace(const Pool<I>& p, const int64_t* slots, const int64_t* rows, const int64_t* cols, int64_t n) {
  Problem problem = check_changes(p, slots, rows, cols, n);
  if (problem != kNoProblem || n == 0) return problem;
  if (n > p.capacity / 8 + 8) return rebuild(p, slots, rows, cols, n);

  Plan<I> plans[2];
  for (Plan<I>& plan : plans) {
    plan.removed.reserve(static_cast<size_t>(n));
    plan.added.reserve(static_cast<size_t>(n));
  }
  for (int64_t i = 0; i < n; ++i) {
    const I slot = static_cast<I>(slots[i]), row = p.rows[slot], col = p.cols[slot];
    if (!p.valid(row, col)) return rebuild(p, slots, rows, cols, n);
    if (row >= 0) {
      plans[0].removed.push_back({row, col, slot, 0});
      plans[1].removed.push_back({col, row, slot, 0});
    }
    if (rows[i] >= 0) {
      const I to_row = static_cast<I>(rows[i]), to_col = static_cast<I>(cols[i]);
      plans[0].added.push_back({to_row, to_col, slot, 0});
      plans[1].added.push_back({to_col, to_row, slot, 0});
    }
  }
  const Side<I> sides[2] = {p.by_row, p.by_col};
  const bool serial = p.capacity < (1 << 15);
  for_each_item(2, serial, [&](int64_t s) { locate(sides[s], p.capacity, plans[s]); });
  if (plans[0].broken || (plans[0].problem == kNoProblem && plans[1].broken))
    return rebuild(p, slots, rows, cols, n);
  if (plans[0].problem != kNoProblem) return plans[0].problem;
  if (plans[1].problem != kNoProblem) return rebuild(p, slots, rows, cols, n);
  // Nothing below can fail: what it allocates is allocated here.
  std::vector<std::array<int64_t, 3>> segments[2];
  std::vector<int64_t> places[2];
  for (int s = 0; s < 2; ++s) {
    segments[s].reserve(static_cast<size_t>(2 * n + 1));
    places[s].reserve(static_cast<size_t>(n));
  }
  for_each_item(2, serial, [&](int64_t s) { apply(sides[s], plans[s], segments[s], places[s]); });
  write_slots(p, slots, rows, cols, n);
  return kNoProblem;
}

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
            {data_of<I>(row_ptr), data_of<I>(row_cols), data_of<I>(row_slots), n_rows},
            {data_of<I>(col_ptr), data_of<I>(col_rows), data_of<I>(col_slots), n_cols}};
  }

  // The index type; every tensor must fit it and the dimensions.
  int check(const char* op) const {
    const int type = index_type(rows, op);
    for (const Tensor* t : {&rows, &cols, &row_ptr, &row_cols, &row_slots, &col_ptr, &col_rows, &col_slots}) {
      require_cpu(*t, op);
      require(index_type(*t, op) == type, op, "rows, cols and the index must have one dtype");
      require(t->dim() == 1 && t->is_contiguous(), op, "rows, cols and the index must be contiguous lists");
    }
    const int64_t bound = type == kInt32 ? int64_t{1} << 31 : std::numeric_limits<int64_t>::max();
    require(n_rows >= 0 && n_cols >= 0 && n_rows < bound && n_cols < bound && rows.numel() < bound, op,
            "the dimensions do not fit the dtype of the index");
    require(row_ptr.numel() == n_rows + 1 && col_ptr.numel() == n_cols + 1, op,
            "row_ptr and col_ptr must have one entry more than there are rows and columns");
    for (const Tensor* t : {&cols, &row_cols, &row_slots, &col_rows, &col_slots})
      require(t->numel() == rows.numel(), op, "cols and the lists must be as long as rows");
    return type;
  }
};

bool share_memory(const Tensor& a, const Tensor& b) {
  const auto begin = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()); };
  const auto bytes = [](const Tensor& t) {  // of a list, from its first element to its last
    return static_cast<uintptr_t>((t.numel() - 1) * t.stride(0) + 1) * (t.scalar_type() == ScalarType::Int ? 4 : 8);
  };
  return a.numel() > 0 && b.numel() > 0 && begin(a) < begin(b) + bytes(b) && begin(b) < begin(a) + bytes(a);
}

// What is validated and then written must not change by being written.
void require_apart(const char* op, std::initializer_list<const Tensor*> written,
                   std::initializer_list<const Tensor*> read) {
  for (auto a = written.begin(); a != written.end(); ++a) {
    for (auto b = written.begin(); b != a; ++b)
      require(!share_memory(**a, **b), op, "rows, cols and the lists of the index must not share memory");
    for (const Tensor* b : read)
      require(!share_memory(**a, *b), op, "rows, cols and the lists of the index must not share memory");
  }
}

// As as_integers, in memory of its own.
Integers own_integers(const Tensor& t, const char* op) {
  Integers result = as_integers(t, op);
  if (result.converted.empty()) result.converted.assign(result.data, result.data + result.count);
  result.data = result.converted.data();
  return result;
}

Problem build_index_(const Tensor& rows_, const Tensor& cols_, int64_t n_rows, int64_t n_cols, const Tensor& row_ptr,
                     const Tensor& row_cols, const Tensor& row_slots, const Tensor& col_ptr, const Tensor& col_rows,
                     const Tensor& col_slots) {
  const Tensor rows = packed(rows_), cols = packed(cols_);
  const PoolTensors t{rows, cols, row_ptr, row_cols, row_slots, col_ptr, col_rows, col_slots, n_rows, n_cols};
  const int type = t.check("build_index_");
  require_apart("build_index_", {&row_ptr, &row_cols, &row_slots, &col_ptr, &col_rows, &col_slots}, {&rows_, &cols_});
  return type == kInt32 ? build(t.pool<int32_t>()) : build(t.pool<int64_t>());
}

Problem replace_(const Tensor& rows, const Tensor& cols, const Tensor& row_ptr, const Tensor& row_cols,
                 const Tensor& row_slots, const Tensor& col_ptr, const Tensor& col_rows, const Tensor& col_slots,
                 int64_t n_rows, int64_t n_cols, const Tensor& slots_, const Tensor& new_rows_,
                 const Tensor& new_cols_) {
  const char* op = "replace_";
  const PoolTensors t{rows, cols, row_ptr, row_cols, row_slots, col_ptr, col_rows, col_slots, n_rows, n_cols};
  // Copies, because the caller's may be parts of what is written below.
  const Integers slots = own_integers(slots_, op), new_rows = own_integers(new_rows_, op);
  const Integers new_cols = own_integers(new_cols_, op);
  require(slots.count == new_rows.count && slots.count == new_cols.count, op,
          "slots, new rows and new columns must be equally many");
  const int type = t.check(op);
  require_apart(op, {&rows, &cols, &row_ptr, &row_cols, &row_slots, &col_ptr, &col_rows, &col_slots}, {});
  return type == kInt32 ? replace(t.pool<int32_t>(), slots.data, new_rows.data, new_cols.data, slots.count)
                        : replace(t.pool<int64_t>(), slots.data, new_rows.data, new_cols.data, slots.count);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rewire, m) {
  m.def(
      "build_index_(Tensor rows, Tensor cols, int n_rows, int n_cols, Tensor(a!) row_ptr, Tensor(b!) row_cols, "
      "Tensor(c!) row_slots, Tensor(d!) col_ptr, Tensor(e!) col_rows, Tensor(f!) col_slots) -> (int, int, int)");
  m.def(
      "replace_(Tensor(a!) rows, Tensor(b!) cols, Tensor(c!) row_ptr, Tensor(d!) row_cols, Tensor(e!) row_slots, "
      "Tensor(f!) col_ptr, Tensor(g!) col_rows, Tensor(h!) col_slots, int n_rows, int n_cols, Tensor slots, "
      "Tensor new_rows, Tensor new_cols) -> (int, int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(rewire, CPU, m) {
  m.impl("build_index_", TORCH_BOX(&build_index_));
  m.impl("replace_", TORCH_BOX(&replace_));
}

}  // namespace rewire
