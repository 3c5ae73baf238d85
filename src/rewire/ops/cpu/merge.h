// Connections that leave and enter the lists of an index: brought into the lists' orders, and merged into them.
#pragma once

#include <array>
#include <memory>

#include "index.h"

namespace rewire {

// Fresh memory that is not cleared: what goes there is written before it is read.
template <class T>
class Fresh {
 public:
  explicit Fresh(int64_t n) : data_(new T[static_cast<size_t>(n)]) {}
  T* data() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_[static_cast<size_t>(i)]; }
  void swap(Fresh& other) { data_.swap(other.data_); }

 private:
  std::unique_ptr<T[]> data_;
};

inline int bit_width(int64_t number) {
  int width = 0;
  for (; number > 0; number >>= 1) ++width;
  return width;
}

template <class I>
inline bool comes_first(const Change<I>& a, const Change<I>& b) {
  return a.major != b.major ? a.major < b.major : a.minor < b.minor;
}

constexpr int64_t kFewChanges = 48;  // so few are sorted by comparing them

// Sorts n items by key(item), in [0, bound), and leaves those with the same key in their order. `other` is as long.
template <class T, class Key>
void sort_by_key(Fresh<T>& items, Fresh<T>& other, int64_t n, int64_t bound, const Key& key) {
  constexpr int kMostBits = 12;
  const int width = bit_width(bound - 1);
  const int most = std::min(std::max(bit_width(n), 6), kMostBits);
  const int passes = (width + most - 1) / most, bits = passes == 0 ? 0 : (width + passes - 1) / passes;
  std::array<uint32_t, 1 << kMostBits> start;
  for (int pass = 0; pass < passes; ++pass) {
    const size_t mask = (size_t{1} << bits) - 1;
    const auto digit = [&](const T& item) { return static_cast<size_t>(key(item) >> (pass * bits)) & mask; };
    std::fill(start.begin(), start.begin() + static_cast<int64_t>(mask) + 1, 0u);
    for (int64_t i = 0; i < n; ++i) ++start[digit(items[i])];
    uint32_t before = 0;
    for (size_t d = 0; d <= mask; ++d) {
      const uint32_t here = start[d];
      start[d] = before;
      before += here;
    }
    for (int64_t i = 0; i < n; ++i) other[start[digit(items[i])]++] = items[i];
    items.swap(other);
  }
}

// Sorts by (major, minor).
template <class I>
void sort_changes(Fresh<Change<I>>& changes, Fresh<Change<I>>& other, int64_t n, int64_t majors, int64_t minors) {
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

  // One list in its order, and ended as kernels want it: `by_row` as it is filled in any order, or `by_col` of the same
  // changes as they are by row. Neither needs the other.
  void sort_rows(int64_t n_rows, int64_t n_cols) {
    Fresh<Change<I>> other(count + 1);
    sort_changes(by_row, other, count, n_rows, n_cols);
    end(by_row, n_rows);
  }
  void sort_cols(const Change<I>* changes, int64_t n_rows, int64_t n_cols) {
    Fresh<Change<I>> other(count + 1);
    for (int64_t i = 0; i < count; ++i) by_col[i] = {changes[i].minor, changes[i].major, changes[i].slot};
    sort_changes(by_col, other, count, n_cols, n_rows);
    end(by_col, n_cols);
  }

  // Where `by_row` is in order: ends it, and brings the same into the other order, in half the time of a whole sort.
  // other: as long as by_col, with which it may trade places.
  void from_rows(int64_t n_rows, int64_t n_cols, Fresh<Change<I>>& other) {
    for (int64_t i = 0; i < count; ++i) by_col[i] = {by_row[i].minor, by_row[i].major, by_row[i].slot};
    if (count < kFewChanges)
      std::sort(by_col.data(), by_col.data() + count, comes_first<I>);
    else
      sort_by_key(by_col, other, count, n_cols, [](const Change<I>& c) { return c.major; });
    end(by_row, n_rows);
    end(by_col, n_cols);
  }

 private:
  void end(const Fresh<Change<I>>& list, int64_t majors) const { list[count] = {static_cast<I>(majors), 0, 0}; }
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

  // Whether both lists are what the changes say; `change` carries them out, too. Then false is the end of the lists: build
  // them again.
  bool run(bool change, bool serial) const {
    bool fine[2];
    for_each_item(2, serial, [&](int64_t s) {
      const Side<I>& side = s == 0 ? pool.by_row : pool.by_col;
      const Change<I>* out = (s == 0 ? removed.by_row : removed.by_col).data();
      const Change<I>* in = (s == 0 ? added.by_row : added.by_col).data();
      fine[s] = kernels().merge[sizeof(I) == 4 ? kInt32 : kInt64](
          {side.ptr, side.minor, side.slots, side.majors, pool.capacity, out, in, removed.count, added.count,
           change ? rooms[s].get() : nullptr});
    });
    return fine[0] && fine[1];
  }
};

}  // namespace rewire
