// Connections that leave and enter the lists of an index: brought into the lists' orders, and
// merged into them.
#pragma once

#include <memory>

#include "pool/index.h"
#include "pool/kernels.h"
#include "pool/sort.h"

namespace rewire {

template <class I>
inline bool comes_first(const Change<I>& a, const Change<I>& b) {
  return a.major != b.major ? a.major < b.major : a.minor < b.minor;
}

constexpr int64_t kFewChanges = 48;  // so few are sorted by comparing them

// Sorts by (major, minor).
template <class I>
void sort_changes(Fresh<Change<I>>& changes, Fresh<Change<I>>& other, int64_t n, int64_t majors,
                  int64_t minors) {
  Change<I>* first = changes.data();
  if (std::is_sorted(first, first + n, comes_first<I>)) return;
  if (n < kFewChanges) {
    std::sort(first, first + n, comes_first<I>);
    return;
  }
  sort_by_key(changes, other, n, minors, [](const Change<I>& c) { return c.minor; });
  sort_by_key(changes, other, n, majors, [](const Change<I>& c) { return c.major; });
}

// What leaves or enters both lists of an index; at most `most`.
template <class I>
struct Moves {
  Fresh<Change<I>> by_row, by_col;
  int64_t count = 0;

  explicit Moves(int64_t most) : by_row(most + 1), by_col(most + 1) {}

  // One list in its order, and ended as kernels want it: `by_row` as it is filled in any order, or
  // `by_col` of the same changes as they are by row. Neither needs the other.
  void sort_rows(int64_t n_rows, int64_t n_cols) {
    Fresh<Change<I>> other(count + 1);
    sort_changes(by_row, other, count, n_rows, n_cols);
    end(by_row, n_rows);
  }
  void sort_cols(const Change<I>* changes, int64_t n_rows, int64_t n_cols) {
    Fresh<Change<I>> other(count + 1);
    for (int64_t i = 0; i < count; ++i)
      by_col[i] = {changes[i].minor, changes[i].major, changes[i].slot};
    sort_changes(by_col, other, count, n_cols, n_rows);
    end(by_col, n_cols);
  }

  // Where `by_row` is in order: ends it, and brings the same into the other order, in half the time
  // of a whole sort. other: as long as by_col, with which it may trade places.
  void from_rows(int64_t n_rows, int64_t n_cols, Fresh<Change<I>>& other) {
    for (int64_t i = 0; i < count; ++i)
      by_col[i] = {by_row[i].minor, by_row[i].major, by_row[i].slot};
    if (count < kFewChanges)
      std::sort(by_col.data(), by_col.data() + count, comes_first<I>);
    else
      sort_by_key(by_col, other, count, n_cols, [](const Change<I>& c) { return c.major; });
    end(by_row, n_rows);
    end(by_col, n_cols);
  }

 private:
  void end(const Fresh<Change<I>>& list, int64_t majors) const {
    list[count] = {static_cast<I>(majors), 0, 0};
  }
};

// Both lists of a pool and what leaves and enters them, sorted; at most `most` enter.
template <class I>
struct Merge {
  const Pool<I>& pool;
  const Moves<I>&removed, &added;
  std::unique_ptr<I[]> rooms[2];

  Merge(const Pool<I>& pool_, const Moves<I>& removed_, const Moves<I>& added_, int64_t most)
      : pool(pool_), removed(removed_), added(added_) {
    for (auto& room : rooms) room.reset(new I[static_cast<size_t>(merge_room(most))]);
  }

  // Whether both lists are what the changes say; `change` carries them out, too. Then false is the
  // end of the lists: build them again.
  bool run(bool change, bool serial) const {
    bool fine[2];
    for_each_item(2, serial, [&](int64_t s) {
      const Side<I>& side = s == 0 ? pool.by_row : pool.by_col;
      const Change<I>* out = (s == 0 ? removed.by_row : removed.by_col).data();
      const Change<I>* in = (s == 0 ? added.by_row : added.by_col).data();
      fine[s] = pool_kernels().merge[sizeof(I) == 4 ? kInt32 : kInt64](
          {side.ptr, side.minor, side.slots, side.majors, pool.capacity, out, in, removed.count,
           added.count, change ? rooms[s].get() : nullptr});
    });
    return fine[0] && fine[1];
  }
};

}  // namespace rewire
