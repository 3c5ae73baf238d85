// The k smallest of many keys by radix: no sorting, and the same whatever the number of threads.
//
// No branch depends on a key, because keys of weights and scores cannot be guessed.
#pragma once

#include <array>
#include <cstring>
#include <type_traits>

#include "runtime.h"

namespace rewire {

// Unsigned integers of the same size, and their highest bit.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
template <class U>
constexpr U kTop = U{1} << (8 * sizeof(U) - 1);

// The bits of a number; the two zeros are equal, and NaN is the last of the positive ones.
template <class T>
inline Bits<T> bits_of(T x) {
  Bits<T> bits;
  const T canonical = x + T(0);
  std::memcpy(&bits, &canonical, sizeof(bits));
  return x != x ? kTop<Bits<T>> - 1 : bits;
}

// The same order as integers, and the opposite order; NaN comes last in both.
template <class T>
inline Bits<T> ascending(T x) {
  using U = Bits<T>;
  const U bits = bits_of(x), negative = U{0} - (bits >> (8 * sizeof(U) - 1));
  return bits ^ (negative | kTop<U>);
}
template <class T>
inline Bits<T> descending(T x) {
  const Bits<T> down = static_cast<Bits<T>>(~ascending(x));
  return x != x ? ~Bits<T>{0} : down;
}

// The numbers 0 ... n - 1 in pieces of whole words, which do not depend on the number of threads.
struct Ranges {
  int64_t n, items, each;
  explicit Ranges(int64_t length) : n(length), items(0), each(1 << 15) {
    while (n / each > 64) each *= 2;
    items = (n + each - 1) / each;
  }
  int64_t begin(int64_t item) const { return item * each; }
  int64_t end(int64_t item) const { return std::min(n, (item + 1) * each); }
};

// Bit i % 64 of word i / 64 is set for the `count` smallest of the keys key(i), 0 <= i < n; among
// equals the first. 0 <= count <= n. O(n) time; O(n / 64 + those whose first digits are those of
// the last one taken) memory. Keys are asked for twice. Where another thread changes them
// meanwhile, other bits are set, and other numbers of them.
template <class U, class Key>
std::vector<uint64_t> smallest_bits(int64_t n, int64_t count, const Key& key) {
  constexpr int kBits = 11, kBins = 1 << kBits,
                kCopies = 4;  // copies: equal digits in a row do not wait
  constexpr int kShift = 8 * sizeof(U) - kBits;
  std::vector<uint64_t> taken(static_cast<size_t>((n + 63) / 64));
  if (count <= 0) return taken;
  const Ranges ranges(n);
  const bool serial = ranges.items < 2;
  std::vector<uint32_t> bins(static_cast<size_t>(ranges.items) * kBins);
  for_each_item(ranges.items, serial, [&](int64_t item) {
    uint32_t own[kCopies][kBins] = {};
    const int64_t end = ranges.end(item);
    for (int64_t i = ranges.begin(item); i < end; ++i)
      ++own[i % kCopies][static_cast<size_t>(key(i) >> kShift)];
    uint32_t* sum = bins.data() + item * kBins;
    for (int b = 0; b < kBins; ++b) sum[b] = own[0][b] + own[1][b] + own[2][b] + own[3][b];
  });
  int64_t left = count;  // to be taken of those with `digit`
  size_t digit = 0;
  for (;; ++digit) {
    int64_t here = 0;
    for (int64_t item = 0; item < ranges.items; ++item)
      here += bins[static_cast<size_t>(item) * kBins + digit];
    if (here >= left || digit + 1 == kBins) break;
    left -= here;
  }

  struct Candidate {
    U key;
    int64_t at;
  };
  std::vector<int64_t> start(static_cast<size_t>(ranges.items) + 1);
  for (int64_t item = 0; item < ranges.items; ++item)
    start[static_cast<size_t>(item) + 1] =
        start[static_cast<size_t>(item)] + bins[static_cast<size_t>(item) * kBins + digit];
  std::vector<Candidate> level(static_cast<size_t>(start.back()));
  const U low = static_cast<U>(digit) << kShift, span = (U{1} << kShift) - 1;
  for_each_item(ranges.items, serial, [&](int64_t item) {
    Candidate* next = level.data() + start[static_cast<size_t>(item)];
    Candidate* const end = level.data() + start[static_cast<size_t>(item) + 1];
    for (int64_t first = ranges.begin(item); first < ranges.end(item); first += 64) {
      const int many = static_cast<int>(std::min<int64_t>(64, ranges.end(item) - first));
      uint64_t below = 0, same = 0;
      for (int j = 0; j < many; ++j) {
        const U k = key(first + j);
        below |= static_cast<uint64_t>(k < low) << j;
        same |= static_cast<uint64_t>(static_cast<U>(k - low) <= span) << j;
      }
      taken[static_cast<size_t>(first / 64)] = below;
      for (; same != 0 && next != end; same &= same - 1) {
        const int64_t at = first + __builtin_ctzll(same);
        *next++ = {key(at), at};
      }
    }
  });

  // The others are few, unless many keys are nearly equal.
  const auto set = [&](int64_t at) {
    taken[static_cast<size_t>(at / 64)] |= uint64_t{1} << (at % 64);
  };
  for (int high = kShift; high > 0 && left < static_cast<int64_t>(level.size());) {
    const int shift = std::max(0, high - kBits);
    const auto digit_of = [&](U k) { return static_cast<size_t>(k >> shift) & (kBins - 1); };
    uint32_t found[kBins] = {};
    for (const Candidate& c : level) ++found[digit_of(c.key)];
    size_t bar = 0;
    for (; found[bar] < left && bar + 1 < kBins; ++bar) left -= found[bar];
    size_t kept = 0;
    for (const Candidate& c : level) {
      const size_t d = digit_of(c.key);
      if (d < bar) set(c.at);
      level[kept] = c;
      kept += d == bar;
    }
    level.resize(kept);
    high = shift;
  }
  left = std::min(left, static_cast<int64_t>(level.size()));
  for (int64_t i = 0; i < left; ++i) set(level[static_cast<size_t>(i)].at);
  return taken;
}

// put(place, i) for every bit i that is set, places counting from 0; raises where they are not
// `count`.
template <class Put>
void for_each_bit(const std::vector<uint64_t>& bits, int64_t count, const char* op,
                  const Put& put) {
  const int64_t words = static_cast<int64_t>(bits.size());
  constexpr int64_t kWords = 512;
  const int64_t items = (words + kWords - 1) / kWords;
  std::vector<int64_t> start(static_cast<size_t>(items) + 1);
  for (int64_t w = 0; w < words; ++w)
    start[static_cast<size_t>(w / kWords) + 1] +=
        __builtin_popcountll(bits[static_cast<size_t>(w)]);
  for (size_t item = 0; item < static_cast<size_t>(items); ++item) start[item + 1] += start[item];
  require(start.back() == count, op, "the scores were changed while they were read");
  for_each_item(items, items < 2, [&](int64_t item) {
    int64_t place = start[static_cast<size_t>(item)];
    for (int64_t w = item * kWords; w < std::min(words, (item + 1) * kWords); ++w)
      for (uint64_t word = bits[static_cast<size_t>(w)]; word != 0; word &= word - 1)
        put(place++, 64 * w + __builtin_ctzll(word));
  });
}

}  // namespace rewire
