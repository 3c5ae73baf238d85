// Random subsets and random dormant connections; see rewire/random.py and rewire/topology.py, whose
// definitions these follow to the letter.
#include "random/sampling.h"

#include "pool/sort.h"

namespace rewire {
namespace {

// x % bound for 0 <= x < 2^63, without a division.
class Remainder {
 public:
  explicit Remainder(int64_t bound)
      : bound_(static_cast<uint64_t>(bound)),
        inverse_(~uint64_t{0} / bound_),
        fast_(bound_ < uint64_t{1} << 62) {}

  int64_t of(int64_t number) const {
    const uint64_t x = static_cast<uint64_t>(number);
    if (!fast_) return static_cast<int64_t>(x % bound_);
    // The quotient is too small by two at most.
    uint64_t rest =
        x - static_cast<uint64_t>((static_cast<unsigned __int128>(x) * inverse_) >> 64) * bound_;
    rest -= rest >= bound_ ? bound_ : 0;
    rest -= rest >= bound_ ? bound_ : 0;
    return static_cast<int64_t>(rest);
  }

 private:
  uint64_t bound_, inverse_;
  bool fast_;
};

// out[0 ... n): the numbers t, t + 1, ... of the sequence of random.distinct.
void draw(const Coordinates& at, const Remainder& remainder, int64_t t, int64_t n, int64_t* out) {
  random_kernels().random_bits(at.seed, at.step, at.stream, t, n, out);
  for (int64_t k = 0; k < n; ++k) out[k] = remainder.of(out[k]);
}

// The sequence, some at a time.
struct Draws {
  static constexpr int kBlock = 64;
  const Coordinates& at;
  Remainder remainder;
  int64_t t;
  int used = kBlock;
  int64_t block[kBlock] = {};

  int64_t next() {
    if (used == kBlock) {
      draw(at, remainder, t, kBlock, block);
      t += kBlock;
      used = 0;
    }
    return block[used++];
  }
};

// Sorts evenly spread non-negative numbers below `bound`: into buckets of about one, then by
// insertion.
void bucket_sort(std::vector<int64_t>& numbers, int64_t bound) {
  const int64_t n = static_cast<int64_t>(numbers.size());
  int shift = 0;
  while ((bound - 1) >> shift >= 2 * n) ++shift;
  std::vector<uint32_t> start(static_cast<size_t>(((bound - 1) >> shift) + 2));
  for (int64_t x : numbers) ++start[static_cast<size_t>(x >> shift) + 1];
  for (size_t b = 1; b < start.size(); ++b) start[b] += start[b - 1];
  std::vector<int64_t> other(numbers.size());
  for (int64_t x : numbers) other[start[static_cast<size_t>(x >> shift)]++] = x;
  for (size_t i = 1; i < other.size(); ++i) {
    const int64_t x = other[i];
    size_t to = i;
    for (; to > 0 && other[to - 1] > x; --to) other[to] = other[to - 1];
    other[to] = x;
  }
  numbers.swap(other);
}

// Sorts non-negative numbers below `bound`, which T holds, by their digits. With 32 bits some ten
// thousand of them stay in the first cache.
template <class T>
void digit_sort(std::vector<int64_t>& numbers, int64_t bound) {
  const int64_t n = static_cast<int64_t>(numbers.size());
  Fresh<T> items(n), other(n);
  for (int64_t i = 0; i < n; ++i) items[i] = static_cast<T>(numbers[static_cast<size_t>(i)]);
  sort_by_key<std::make_unsigned_t<T>>(items, other, n, bound, [](T x) { return x; });
  std::copy(items.data(), items.data() + n, numbers.begin());
}

constexpr int64_t kFewNumbers = 32, kSomeNumbers = 1 << 11, kManyNumbers = 1 << 15;

// The first `n` distinct values of the sequence, ascending; 0 <= 2 n <= bound. O(n) expected time
// and memory.
std::vector<int64_t> first_distinct(int64_t n, int64_t bound, const Coordinates& at,
                                    int64_t offset) {
  std::vector<int64_t> found;
  found.reserve(static_cast<size_t>(n));
  if (n <= 16) {  // a few: compare with all of them
    for (int64_t t = offset; static_cast<int64_t>(found.size()) < n; ++t) {
      const int64_t value = at.below(t, bound);
      if (std::find(found.begin(), found.end(), value) == found.end()) found.push_back(value);
    }
    std::sort(found.begin(), found.end());
    return found;
  }
  if (bound / 64 <= n) {  // dense: a bit per value, read off in order
    Draws draws{at, Remainder(bound), offset};
    std::vector<uint64_t> seen(static_cast<size_t>(bound / 64 + 1));
    int64_t left = n;
    while (left > 0) {
      const int64_t value = draws.next();
      uint64_t& word = seen[static_cast<size_t>(value / 64)];
      const uint64_t bit = uint64_t{1} << (value % 64);
      left -= (word & bit) == 0;
      word |= bit;
    }
    for (size_t w = 0; w < seen.size(); ++w)
      for (uint64_t word = seen[w]; word != 0; word &= word - 1)
        found.push_back(static_cast<int64_t>(w) * 64 + __builtin_ctzll(word));
    return found;
  }
  // Sparse: as many as are lacking are drawn and sorted, until none is; few occur twice.
  const Remainder remainder(bound);
  std::vector<int64_t> drawn;
  for (int64_t t = offset, lacking = n; lacking > 0;
       lacking = n - static_cast<int64_t>(found.size())) {
    drawn.resize(static_cast<size_t>(lacking));
    draw(at, remainder, t, lacking, drawn.data());
    t += lacking;
    if (lacking < kFewNumbers)
      std::sort(drawn.begin(), drawn.end());
    else if (lacking >= kSomeNumbers && bound <= int64_t{1} << 32)
      digit_sort<uint32_t>(drawn, bound);
    else if (lacking < kManyNumbers)
      bucket_sort(drawn, bound);
    else
      digit_sort<int64_t>(drawn, bound);
    const auto middle = found.insert(found.end(), drawn.begin(), drawn.end()) - found.begin();
    std::inplace_merge(found.begin(), found.begin() + middle, found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
  }
  return found;
}

}  // namespace

void distinct_into(int64_t n, int64_t bound, const Coordinates& at, int64_t offset, int64_t* out) {
  if (n > bound - n) {
    const std::vector<int64_t> left_out = first_distinct(bound - n, bound, at, offset);
    size_t next = 0;
    for (int64_t value = 0; value < bound; ++value) {
      if (next < left_out.size() && left_out[next] == value)
        ++next;
      else
        *out++ = value;
    }
  } else {
    const std::vector<int64_t> chosen = first_distinct(n, bound, at, offset);
    std::copy(chosen.begin(), chosen.end(), out);
  }
}

namespace {

Tensor distinct(int64_t n, int64_t bound, int64_t seed, int64_t step, int64_t stream,
                int64_t offset) {
  require(n >= 0 && n <= bound, "distinct", "n must be between 0 and bound");
  Tensor result = empty_1d(n, ScalarType::Long);
  const Coordinates at{static_cast<uint64_t>(seed), static_cast<uint32_t>(step),
                       static_cast<uint32_t>(stream)};
  distinct_into(n, bound, at, offset, static_cast<int64_t*>(result.mutable_data_ptr()));
  return result;
}

template <class I>
std::tuple<Tensor, Tensor> map_to_tensors(const Complement<I>& list, const int64_t* ranks,
                                          int64_t n, const Tensor& dropped_rows_,
                                          const Tensor& dropped_cols_) {
  const Integers dropped_rows = as_integers(dropped_rows_, list.op),
                 dropped_cols = as_integers(dropped_cols_, list.op);
  require(dropped_rows.count == dropped_cols.count, list.op,
          "dropped rows and columns must be equally many");
  Tensor rows = empty_1d(n, ScalarType::Long), cols = empty_1d(n, ScalarType::Long);
  int64_t* row = static_cast<int64_t*>(rows.mutable_data_ptr());
  int64_t* col = static_cast<int64_t*>(cols.mutable_data_ptr());
  map_ranks(list, ranks, n, row, col, [&](int64_t i) {
    require(i < dropped_rows.count, list.op, "a rank is out of range");
    return std::pair(dropped_rows.data[i], dropped_cols.data[i]);
  });
  return {rows, cols};
}

std::tuple<Tensor, Tensor> candidates(const Tensor& row_ptr, const Tensor& row_cols, int64_t n_cols,
                                      const Tensor& ranks_, const Tensor& dropped_rows,
                                      const Tensor& dropped_cols) {
  const Integers ranks = own_integers(ranks_, "candidates");
  return with_complement(row_ptr, row_cols, n_cols, "candidates", [&](const auto& list) {
    return map_to_tensors(list, ranks.data, ranks.count, dropped_rows, dropped_cols);
  });
}

std::tuple<Tensor, Tensor> sample_dormant(const Tensor& row_ptr, const Tensor& row_cols,
                                          int64_t n_cols, int64_t n, const Tensor& dropped_rows,
                                          const Tensor& dropped_cols, int64_t seed, int64_t step,
                                          int64_t stream) {
  return with_complement(row_ptr, row_cols, n_cols, "sample_dormant", [&](const auto& list) {
    const int64_t free = list.dormant + dropped_rows.numel();
    if (n < 0 || n > free)
      fail("sample_dormant",
           "cannot draw " + std::to_string(n) + " of " + std::to_string(free) + " candidates");
    const Tensor ranks = distinct(n, free, seed, step, stream, 0);
    return map_to_tensors(list, static_cast<const int64_t*>(ranks.const_data_ptr()), n,
                          dropped_rows, dropped_cols);
  });
}

Tensor sample_dormant_in_rows(const Tensor& row_ptr, const Tensor& row_cols, int64_t n_cols,
                              const Tensor& dropped_rows, const Tensor& dropped_cols, int64_t seed,
                              int64_t step, int64_t stream) {
  const char* op = "sample_dormant_in_rows";
  const Integers rows = as_integers(dropped_rows, op), cols = as_integers(dropped_cols, op);
  require(rows.count == cols.count, op, "dropped rows and columns must be equally many");
  const Coordinates at{static_cast<uint64_t>(seed), static_cast<uint32_t>(step),
                       static_cast<uint32_t>(stream)};
  Tensor result = empty_1d(rows.count, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(result.mutable_data_ptr());
  with_complement(row_ptr, row_cols, n_cols, op, [&](const auto& list) {
    using I = std::remove_const_t<std::remove_pointer_t<decltype(list.ptr)>>;
    for (int64_t first = 0, last = 0; first < rows.count; first = last) {
      const int64_t row = rows.data[first];
      require(row >= 0 && row < list.rows, op, "a dropped row is out of range");
      for (last = first + 1; last < rows.count && rows.data[last] == row; ++last) {
      }
      require(last == rows.count || rows.data[last] > row, op, "dropped rows must be sorted");
      const auto [active, fan_in] = list.row(row);
      const I* const columns = active;  // (a lambda cannot take a structured binding along)
      const int64_t count = last - first, dormant = n_cols - fan_in;
      require(dormant >= 0, op, "a row has more connections than columns");
      distinct_into(count, dormant + count, at, row << 32, out + first);
      for (int64_t i = first; i < last; ++i) {
        const int64_t nth = out[i];
        // The nth dormant column is nth + j, where j of the active columns c_k have c_k - k <= nth.
        out[i] = nth < dormant ? nth + count_first(
                                           fan_in, [&](int64_t k) { return columns[k] - k <= nth; })
                               : cols.data[first + nth - dormant];
      }
    }
    return 0;
  });
  return result;
}

Tensor position_signs(const Tensor& rows_, const Tensor& cols_, int64_t seed, int64_t stream) {
  const Integers rows = as_integers(rows_, "position_signs"),
                 cols = as_integers(cols_, "position_signs");
  require(rows.count == cols.count, "position_signs", "rows and columns must be equally many");
  Tensor result = empty_1d(rows.count, ScalarType::Char);
  int8_t* out = static_cast<int8_t*>(result.mutable_data_ptr());
  random_kernels().position_signs(rows.data, cols.data, rows.count, static_cast<uint64_t>(seed),
                                  static_cast<uint32_t>(stream), out);
  return result;
}

}  // namespace

REWIRE_OPERATOR_ANYWHERE(distinct,
                         "(int n, int bound, int seed, int step, int stream, int offset) -> Tensor")
REWIRE_OPERATOR(candidates,
                "(Tensor row_ptr, Tensor row_cols, int n_cols, Tensor ranks, Tensor dropped_rows, "
                "Tensor dropped_cols) -> (Tensor, Tensor)")
REWIRE_OPERATOR(sample_dormant,
                "(Tensor row_ptr, Tensor row_cols, int n_cols, int n, Tensor dropped_rows, Tensor "
                "dropped_cols, int seed, int step, int stream) -> (Tensor, Tensor)")
REWIRE_OPERATOR(sample_dormant_in_rows,
                "(Tensor row_ptr, Tensor row_cols, int n_cols, Tensor dropped_rows, Tensor "
                "dropped_cols, int seed, int step, int stream) -> Tensor")
REWIRE_OPERATOR(position_signs, "(Tensor rows, Tensor cols, int seed, int stream) -> Tensor")

}  // namespace rewire
