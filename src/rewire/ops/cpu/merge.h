// Connections that leave and enter the lists of an index: brought into the lists' orders, and merged into them.
#pragma once

#include <array>
#include <memory>

#include "index.h"

namespace rewire {

inline int bit_width(int64_t number) {
  int width = 0;
  for (; number > 0; number >>= 1) ++width;
  return width;
}

template <class I>
using ChangeList = std::vector<Change<I>>;

template <class I>
inline bool comes_first(const Change<I>& a, const Change<I>& b) {
  return a.major != b.major ? a.major < b.major : a.minor < b.minor;
}

constexpr int64_t kFewChanges = 48;  // so few are sorted by comparing them

// Sorts by key(change), in [0, bound), and leaves those with the same key in their order. `other` is as long.
template <class I, class Key>
void sort_by_key(ChangeList<I>& changes, ChangeList<I>& other, int64_t bound, const Key& key) {
  constexpr int kMostBits = 12;
  const int width = bit_width(bound - 1);
  const int most = std::min(std::max(bit_width(static_cast<int64_t>(changes.size())), 6), kMostBits);
  const int passes = (width + most - 1) / most, bits = passes == 0 ? 0 : (width + passes - 1) / passes;
  std::array<uint32_t, 1 << kMostBits> start;
  for (int pass = 0; pass < passes; ++pass) {
    const size_t mask = (size_t{1} << bits) - 1;
    const auto digit = [&](const Change<I>& c) { return static_cast<size_t>(key(c) >> (pass * bits)) & mask; };
    std::fill(start.begin(), start.begin() + static_cast<int64_t>(mask) + 1, 0u);
    for (const Change<I>& c : changes) ++start[digit(c)];
    uint32_t before = 0;
    for (size_t d = 0; d <= mask; ++d) {
      const uint32_t here = start[d];
      start[d] = before;
      before += here;
    }
    for (const Change<I>& c : changes) other[start[digit(c)]++] = c;
    changes.swap(other);
  }
}

// Sorts by (major, minor).
template <class I>
void sort_changes(ChangeList<I>& changes, ChangeList<I>& other, int64_t majors, int64_t minors) {
  if (std::is_sorted(changes.begin(), changes.end(), comes_first<I>)) return;
  if (static_cast<int64_t>(changes.size()) < kFewChanges) {
    std::sort(changes.begin(), changes.end(), comes_first<I>);
    return;
  }
  sort_by_key(changes, other, minors, [](const Change<I>& c) { return c.minor; });
  sort_by_key(changes, other, majors, [](const Change<I>& c) { return c.major; });
}

// What leaves or enters both lists of an index.
template <class I>
struct Moves {
  ChangeList<I> by_row, by_col, other;

  explicit Moves(int64_t n) {
    for (ChangeList<I>* list : {&by_row, &by_col, &other}) list->reserve(static_cast<size_t>(n) + 1);
  }

  int64_t count() const { return static_cast<int64_t>(by_row.size()); }

  // Brings `by_row` into order, and into the order by column the same in `by_col`; ends both as kernels want it. Does not
  // throw.
  void sort(int64_t n_rows, int64_t n_cols) {
    by_col.resize(by_row.size());
    other.resize(by_row.size());
    sort_changes(by_row, other, n_rows, n_cols);
    for (size_t i = 0; i < by_row.size(); ++i) by_col[i] = {by_row[i].minor, by_row[i].major, by_row[i].slot};
    if (static_cast<int64_t>(by_col.size()) < kFewChanges)
      std::sort(by_col.begin(), by_col.end(), comes_first<I>);
    else
      sort_by_key(by_col, other, n_cols, [](const Change<I>& c) { return c.major; });
    by_row.push_back({static_cast<I>(n_rows), 0, 0});
    by_col.push_back({static_cast<I>(n_cols), 0, 0});
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

  // Whether both lists are what the changes say; `change` carries them out, too. Then false is the end of the lists: build
  // them again.
  bool run(bool change, bool serial) const {
    bool fine[2];
    for_each_item(2, serial, [&](int64_t s) {
      const Side<I>& side = s == 0 ? pool.by_row : pool.by_col;
      const ChangeList<I>&out = s == 0 ? removed.by_row : removed.by_col, &in = s == 0 ? added.by_row : added.by_col;
      fine[s] = kernels().merge[sizeof(I) == 4 ? kInt32 : kInt64](
          {side.ptr, side.minor, side.slots, side.majors, pool.capacity, out.data(), in.data(),
           static_cast<int64_t>(out.size()) - 1, static_cast<int64_t>(in.size()) - 1, change ? rooms[s].get() : nullptr});
    });
    return fine[0] && fine[1];
  }
};

}  // namespace rewire
