// Both lists of a pool of which many slots change: the old entries that stay and the new ones woven
// into fresh lists.
//
// Cheaper than deriving them from the slots again, because what stays is in order already.
#pragma once

#include <cstring>
#include <memory>

#include "pool/index.h"

namespace rewire {

// The new entries of one list, in its order, and how many of the old ones leave.
template <class I>
struct Arrivals {
  std::vector<I> start, leave;  // by major
  std::vector<I> old;           // the pointers of the list there is, read once
  std::unique_ptr<I[]> minor, slot;
  int64_t active = 0;  // old entries as the pool has them
};

// What a list becomes, in memory of its own.
template <class I>
struct Woven {
  std::vector<I> ptr;
  std::unique_ptr<I[]> minor, slot;
};

template <class I>
class Weaver {
 public:
  Weaver(const Pool<I>& pool, const int64_t* slots, const int64_t* rows, const int64_t* cols,
         int64_t n)
      : p_(pool),
        slots_(slots),
        rows_(rows),
        cols_(cols),
        n_(n),
        gone_(static_cast<size_t>(pool.capacity / 64 + 1)) {
    for (auto [comes, majors] : {std::pair(&by_row_, p_.n_rows), std::pair(&by_col_, p_.n_cols)}) {
      comes->start.resize(static_cast<size_t>(majors) + 1);
      comes->leave.resize(static_cast<size_t>(majors));
      comes->minor.reset(new I[static_cast<size_t>(n)]);
      comes->slot.reset(new I[static_cast<size_t>(n)]);
    }
    order_.reset(new I[static_cast<size_t>(n)]);
    next_.resize(static_cast<size_t>(std::max(p_.n_rows, p_.n_cols)) + 1);
  }

  // At what comes and what goes.
  void look() {
    for_each_item(2, n_ < (1 << 12), [&](int64_t which) { which == 0 ? arrange() : depart(); });
  }

  // False where the list is not what the pool says (by its counts, its order and its bounds), or a
  // connection would occur twice.
  bool weave(bool by_row, Woven<I>& woven) {
    const Side<I>& side = by_row ? p_.by_row : p_.by_col;
    Arrivals<I>& comes = by_row ? by_row_ : by_col_;
    comes.old.assign(side.ptr, side.ptr + side.majors + 1);
    if (!measure(comes, woven.ptr)) return false;
    const int64_t total = woven.ptr.back();
    if (woven.minor == nullptr) {
      woven.minor.reset(new I[static_cast<size_t>(p_.capacity)]);
      woven.slot.reset(new I[static_cast<size_t>(p_.capacity)]);
    }
    const int64_t items = std::min<int64_t>(side.majors, 64),
                  each = items > 0 ? (side.majors + items - 1) / items : 0;
    std::atomic<bool> fine{true};
    std::vector<std::unique_ptr<I[]>> kept(static_cast<size_t>(2 * items));
    for (int64_t item = 0; item < items; ++item) {
      int64_t longest = 0;
      for (int64_t m = item * each; m < std::min(side.majors, (item + 1) * each); ++m)
        longest = std::max<int64_t>(
            longest, comes.old[static_cast<size_t>(m) + 1] - comes.old[static_cast<size_t>(m)]);
      for (size_t half : {0, 1})
        kept[2 * static_cast<size_t>(item) + half].reset(new I[static_cast<size_t>(longest + 1)]);
    }
    for_each_item(items, total < (1 << 15), [&](int64_t item) {
      I *minor = kept[2 * static_cast<size_t>(item)].get(),
        *slot = kept[2 * static_cast<size_t>(item) + 1].get();
      for (int64_t m = item * each; m < std::min(side.majors, (item + 1) * each); ++m)
        if (!weave_major(side, comes, m, woven, minor, slot)) fine = false;
    });
    return fine;
  }

  void carry_out(const Side<I>& side, const Woven<I>& woven) {
    const int64_t total = woven.ptr.back();
    for_each_item(2, total < (1 << 15), [&](int64_t which) {
      I* list = which == 0 ? side.minor : side.slots;
      std::copy(which == 0 ? woven.minor.get() : woven.slot.get(),
                (which == 0 ? woven.minor.get() : woven.slot.get()) + total, list);
      std::fill(list + total, list + p_.capacity, I{0});
    });
    std::copy(woven.ptr.begin(), woven.ptr.end(), side.ptr);
  }

 private:
  // The old entries that leave, in all and by major.
  void depart() {
    for (int64_t i = 0; i < n_; ++i)
      gone_[static_cast<size_t>(slots_[i] / 64)] |= uint64_t{1} << (slots_[i] % 64);
    for (auto [comes, major_of, majors] :
         {std::tuple(&by_row_, p_.rows, p_.n_rows), std::tuple(&by_col_, p_.cols, p_.n_cols)}) {
      for (int64_t k = 0; k < p_.capacity; ++k) comes->active += major_of[k] >= 0;
      for (int64_t i = 0; i < n_; ++i) {
        const int64_t major = read_once(major_of + slots_[i]);
        if (major >= 0 && major < majors) ++comes->leave[static_cast<size_t>(major)];
      }
    }
  }

  // The new entries, by row and by column.
  void arrange() {
    bool ascend = true;
    int64_t row = -1, col = -1;
    for (int64_t i = 0; i < n_; ++i) {
      if (rows_[i] < 0) continue;
      ++by_row_.start[static_cast<size_t>(rows_[i]) + 1];
      ++by_col_.start[static_cast<size_t>(cols_[i]) + 1];
      ascend &= rows_[i] > row || (rows_[i] == row && cols_[i] >= col);
      row = rows_[i];
      col = cols_[i];
    }
    for (auto* start : {&by_row_.start, &by_col_.start})
      for (size_t m = 1; m < start->size(); ++m) (*start)[m] += (*start)[m - 1];
    const int64_t count = by_row_.start.back();
    if (ascend) {
      for (int64_t i = 0, k = 0; i < n_; ++i) {
        if (rows_[i] < 0) continue;
        by_row_.minor[k] = static_cast<I>(cols_[i]);
        by_row_.slot[k++] = static_cast<I>(slots_[i]);
      }
    } else {
      begin_at(by_col_);
      for (int64_t i = 0; i < n_; ++i)
        if (rows_[i] >= 0) order_[next_[static_cast<size_t>(cols_[i])]++] = static_cast<I>(i);
      begin_at(by_row_);
      for (int64_t k = 0; k < count; ++k) {
        const I i = order_[k], place = next_[static_cast<size_t>(rows_[i])]++;
        by_row_.minor[place] = static_cast<I>(cols_[i]);
        by_row_.slot[place] = static_cast<I>(slots_[i]);
      }
    }
    begin_at(by_col_);
    for (int64_t m = 0; m < p_.n_rows; ++m)
      for (int64_t k = by_row_.start[static_cast<size_t>(m)];
           k < by_row_.start[static_cast<size_t>(m) + 1]; ++k) {
        const I place = next_[static_cast<size_t>(by_row_.minor[k])]++;
        by_col_.minor[place] = static_cast<I>(m);
        by_col_.slot[place] = by_row_.slot[k];
      }
  }

  // Where each major begins afterwards; false where the list cannot be that of the pool.
  bool measure(const Arrivals<I>& comes, std::vector<I>& ptr) {
    const std::vector<I>& old = comes.old;
    ptr.resize(old.size());
    if (old.front() != 0 || old.back() != comes.active) return false;
    int64_t place = ptr[0] = 0;
    for (size_t at = 0; at + 1 < old.size(); ++at) {
      // Before it is computed with: of any integers differences may overflow.
      if (old[at + 1] < old[at] || old[at + 1] > p_.capacity) return false;
      const int64_t here = static_cast<int64_t>(old[at + 1]) - old[at],
                    stays = here - comes.leave[at];
      if (stays < 0) return false;
      place += stays + comes.start[at + 1] - comes.start[at];
      if (place > p_.capacity) return false;
      ptr[at + 1] = static_cast<I>(place);
    }
    return true;
  }

  void begin_at(const Arrivals<I>& comes) {
    std::copy(comes.start.begin(), comes.start.end(), next_.begin());
  }

  // What stays goes into `kept` (as long as the longest major), then both are merged. No branch
  // depends on an entry.
  bool weave_major(const Side<I>& side, const Arrivals<I>& comes, int64_t m, Woven<I>& woven,
                   I* kept_minor, I* kept_slot) const {
    const size_t at = static_cast<size_t>(m);
    int64_t kept = 0;
    bool fine = true;
    for (int64_t i = comes.old[at]; i < comes.old[at + 1]; ++i) {
      const I slot = read_once(side.slots + i);
      const bool inside = slot >= 0 && slot < p_.capacity;
      const int64_t place = inside ? slot : 0;
      fine &= inside;
      kept_minor[kept] = side.minor[i];
      kept_slot[kept] = slot;
      kept += static_cast<int64_t>(~gone_[static_cast<size_t>(place / 64)] >> (place % 64) & 1);
    }
    int64_t a = comes.start[at], out = woven.ptr[at];
    const int64_t a_end = comes.start[at + 1], begin = out, end = woven.ptr[at + 1];
    if (!fine || end - begin != kept + a_end - a) return false;
    I *minor = woven.minor.get(), *slot = woven.slot.get();
    int64_t k = 0;
    while (a < a_end && k < kept) {
      const I new_minor = comes.minor[a], old_minor = kept_minor[k], new_slot = comes.slot[a],
              old_slot = kept_slot[k];
      const bool first = new_minor <= old_minor;
      minor[out] = first ? new_minor : old_minor;
      slot[out++] = first ? new_slot : old_slot;
      a += first;
      k += !first;
    }
    for (; a < a_end; ++a, ++out) {
      minor[out] = comes.minor[a];
      slot[out] = comes.slot[a];
    }
    for (; k < kept; ++k, ++out) {
      minor[out] = kept_minor[k];
      slot[out] = kept_slot[k];
    }
    bool rises = end == begin || (minor[begin] >= 0 && minor[end - 1] < side.minors);
    for (int64_t i = begin + 1; i < end; ++i) rises &= minor[i] > minor[i - 1];
    return rises;
  }

  const Pool<I>& p_;
  const int64_t *slots_, *rows_, *cols_;
  int64_t n_;
  std::vector<uint64_t> gone_;
  Arrivals<I> by_row_, by_col_;
  std::unique_ptr<I[]> order_;
  std::vector<I> next_;
};

}  // namespace rewire
