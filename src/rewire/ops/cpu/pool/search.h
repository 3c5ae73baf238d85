// Searching lists that are longer than the caches. Lines of memory that are read in order come
// faster than scattered ones, so everything between two places that are wanted is asked for as
// well.
#pragma once

#include <algorithm>
#include <cstdint>

namespace rewire {

constexpr int64_t kAhead = 16;  // searches between asking for memory and using it

// GCC takes a function that only asks for memory for one without effect, and leaves it out, unless
// it is inlined early.
#define REWIRE_ALWAYS __attribute__((always_inline))

// Asks for list[at], and for what lies between it and list[before] if that is not much.
template <class T>
inline REWIRE_ALWAYS void prefetch_from(const T* list, int64_t before, int64_t at) {
  constexpr int64_t kLine = 64 / sizeof(T), kMost = 16;
  if (at > before && at - before <= kMost * kLine)
    for (int64_t i = before + kLine; i < at; i += kLine) __builtin_prefetch(list + i);
  __builtin_prefetch(list + at);
}

// How many of the items 0 ... length - 1 come first; before(i) says so of item i, and is true for
// the first ones only.
template <class Before>
inline int64_t count_first(int64_t length, const Before& before) {
  int64_t low = 0;
  while (length > 1) {  // no branch to be guessed
    const int64_t half = length / 2;
    low += static_cast<int64_t>(before(low + half - 1)) * half;
    length -= half;
  }
  return length == 1 ? low + static_cast<int64_t>(before(low)) : low;
}

}  // namespace rewire
