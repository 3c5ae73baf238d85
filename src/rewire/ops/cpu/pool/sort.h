// Sorting by digits, for both the changes of an index and random numbers.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>

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

// Sorts n items by key(item), in [0, bound), and leaves those with the same key in their order.
// `other` is as long. Count: a type that n fits in.
template <class Count = uint32_t, class T, class Key>
void sort_by_key(Fresh<T>& items, Fresh<T>& other, int64_t n, int64_t bound, const Key& key) {
  constexpr int kMostBits = 12;
  const int width = bit_width(bound - 1);
  const int most = std::min(std::max(bit_width(n), 6), kMostBits);
  const int passes = (width + most - 1) / most,
            bits = passes == 0 ? 0 : (width + passes - 1) / passes;
  std::array<Count, 1 << kMostBits> start;
  for (int pass = 0; pass < passes; ++pass) {
    const size_t mask = (size_t{1} << bits) - 1;
    const auto digit = [&](const T& item) {
      return static_cast<size_t>(key(item) >> (pass * bits)) & mask;
    };
    std::fill(start.begin(), start.begin() + static_cast<int64_t>(mask) + 1, Count{0});
    for (int64_t i = 0; i < n; ++i) ++start[digit(items[i])];
    Count before = 0;
    for (size_t d = 0; d <= mask; ++d) {
      const Count here = start[d];
      start[d] = before;
      before += here;
    }
    for (int64_t i = 0; i < n; ++i) other[start[digit(items[i])]++] = items[i];
    items.swap(other);
  }
}

}  // namespace rewire
