// How the entries of one list move when a few connections leave and others come: planned, checked, carried out.
#pragma once

#include <array>
#include <cstring>

#include "index.h"
#include "search.h"

namespace rewire {

// A connection that leaves or enters a list, and where: at or before which of the old entries.
template <class I>
struct Move {
  I major, minor, slot, at;
  bool operator<(const Move& o) const {
    return at != o.at ? at < o.at : major != o.major ? major < o.major : minor < o.minor;
  }
};

template <class I>
struct Plan {
  std::vector<Move<I>> removed, added;
  bool broken = false;  // the list is not what the pool says: derive it anew
  Problem problem = kNoProblem;
};

// By bands of rows: so that a search finds the memory that it wants beside that of the search before.
constexpr int64_t kBands = 4096;

inline int band_shift(int64_t majors) {
  int shift = 0;
  while ((majors - 1) >> shift >= kBands) ++shift;
  return shift;
}

template <class I>
void sort_into_bands(std::vector<Move<I>>& moves, int64_t majors) {
  const int shift = band_shift(majors);
  const auto by_band = [shift](const Move<I>& a, const Move<I>& b) { return a.major >> shift < b.major >> shift; };
  if (std::is_sorted(moves.begin(), moves.end(), by_band)) return;
  if (moves.size() < kBands / 8) {
    std::sort(moves.begin(), moves.end(), by_band);
    return;
  }
  std::vector<Move<I>> other(moves.size());
  std::array<size_t, kBands + 1> start{};
  for (const Move<I>& m : moves) ++start[static_cast<size_t>(m.major >> shift) + 1];
  for (size_t b = 1; b <= kBands; ++b) start[b] += start[b - 1];
  for (const Move<I>& m : moves) other[start[static_cast<size_t>(m.major >> shift)]++] = m;
  moves.swap(other);
}

// Within the bands, by place.
template <class I>
void sort_bands(std::vector<Move<I>>& moves, int64_t majors) {
  const int shift = band_shift(majors);
  for (auto first = moves.begin(), last = first; first != moves.end(); first = last) {
    while (last != moves.end() && last->major >> shift == first->major >> shift) ++last;
    if (!std::is_sorted(first, last)) std::sort(first, last);
  }
}

// Sets `at` of every move to the first entry of its row that is not before it.
template <class I>
void search(const Side<I>& side, int64_t capacity, Plan<I>& plan, std::vector<Move<I>>& moves) {
  for (size_t i = 0, ahead = kAhead; i < moves.size(); ++i, ++ahead) {
    if (ahead < moves.size() && (i == 0 || moves[ahead].major != moves[ahead - 1].major)) {
      const int64_t begin = std::clamp<int64_t>(side.ptr[moves[ahead].major], 0, capacity);
      prefetch_range(side.minor, begin, std::clamp<int64_t>(side.ptr[moves[ahead].major + 1], begin, capacity));
    }
    Move<I>& m = moves[i];
    const int64_t begin = side.ptr[m.major], end = side.ptr[m.major + 1];
    if (begin < 0 || begin > end || end > capacity) {
      plan.broken = true;
      return;
    }
    const I *row = side.minor + begin, minor = m.minor;
    m.at = static_cast<I>(begin + count_first(end - begin, [&](int64_t k) { return row[k] < minor; }));
  }
}

// Finds the places of all moves in one list and looks for connections that would occur twice.
template <class I>
void locate(const Side<I>& side, int64_t capacity, Plan<I>& plan) {
  const int64_t count = side.ptr[side.majors];
  const int64_t after = count - static_cast<int64_t>(plan.removed.size()) + static_cast<int64_t>(plan.added.size());
  plan.broken = count < 0 || count > capacity || after < 0 || after > capacity;
  for (auto* moves : {&plan.removed, &plan.added}) {
    if (plan.broken) return;
    sort_into_bands(*moves, side.majors);
    search(side, capacity, plan, *moves);
    sort_bands(*moves, side.majors);
  }
  if (plan.broken) return;
  plan.broken = true;  // until all is seen to be fine
  for (size_t i = 0; i < plan.removed.size(); ++i) {
    const Move<I>& m = plan.removed[i];
    if (const size_t ahead = i + kAhead; ahead < plan.removed.size())
      prefetch_from(side.slots, plan.removed[ahead - 1].at, plan.removed[ahead].at);
    if (m.at >= count || side.slots[m.at] != m.slot) return;
    if (i > 0 && (m.at <= plan.removed[i - 1].at || m.major < plan.removed[i - 1].major)) return;
  }
  size_t gone = 0;
  for (size_t i = 0; i < plan.added.size(); ++i) {
    const Move<I>& m = plan.added[i];
    if (m.at > count) return;
    while (gone < plan.removed.size() && plan.removed[gone].at < m.at) ++gone;
    const bool there = m.at < side.ptr[m.major + 1] && side.minor[m.at] == m.minor;
    const bool leaves = gone < plan.removed.size() && plan.removed[gone].at == m.at;
    bool twice = there && !leaves;
    if (i + 1 < plan.added.size()) {
      const Move<I>& next = plan.added[i + 1];
      if (next.at < m.at || next.major < m.major || (next.major == m.major && next.minor < m.minor)) return;
      twice |= next.major == m.major && next.minor == m.minor;
    }
    if (twice) {
      plan.broken = false;
      plan.problem = {kDuplicate, m.major, m.minor};
      return;
    }
  }
  plan.broken = false;
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

}  // namespace rewire
