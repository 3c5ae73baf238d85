// Random subsets and random dormant connections; see rewire/random.py and rewire/topology.py, whose definitions
// these follow to the letter.
#include <limits>

#include "runtime.h"

namespace rewire {
namespace {

struct Coordinates {
  uint64_t seed;
  uint32_t step, stream;
  int64_t below(int64_t index, int64_t bound) const { return philox_below(seed, step, stream, index, bound); }
};

// Sorts non-negative numbers below `bound` by their digits of 11 bits.
void radix_sort(std::vector<int64_t>& numbers, int64_t bound) {
  constexpr int kBits = 11;
  std::vector<int64_t> other(numbers.size());
  for (int shift = 0; shift < 63 && (bound - 1) >> shift > 0; shift += kBits) {
    size_t count[1 << kBits] = {};
    const auto digit = [shift](int64_t x) { return static_cast<size_t>(x >> shift) & ((1 << kBits) - 1); };
    for (int64_t x : numbers) ++count[digit(x)];
    size_t before = 0;
    for (size_t& c : count) {
      const size_t here = c;
      c = before;
      before += here;
    }
    for (int64_t x : numbers) other[count[digit(x)]++] = x;
    numbers.swap(other);
  }
}

// The first `n` distinct values of the sequence, ascending; 0 <= 2 n <= bound. O(n) expected time and memory.
std::vector<int64_t> first_distinct(int64_t n, int64_t bound, const Coordinates& at, int64_t offset) {
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
    std::vector<uint64_t> seen(static_cast<size_t>(bound / 64 + 1));
    int64_t left = n;
    for (int64_t t = offset; left > 0; ++t) {
      const int64_t value = at.below(t, bound);
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
  size_t size = 1;  // sparse: a hash table, at most half full
  while (size < 2 * static_cast<size_t>(n)) size *= 2;
  std::vector<int64_t> table(size, -1);
  for (int64_t t = offset; static_cast<int64_t>(found.size()) < n; ++t) {
    const int64_t value = at.below(t, bound);
    size_t place = static_cast<size_t>((static_cast<uint64_t>(value) * 0x9E3779B97F4A7C15ull) >> 20) & (size - 1);
    while (table[place] != -1 && table[place] != value) place = (place + 1) & (size - 1);
    if (table[place] == value) continue;
    table[place] = value;
    found.push_back(value);
  }
  std::vector<int64_t>().swap(table);
  radix_sort(found, bound);
  return found;
}

// random.distinct into out[0 ... n).
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

Tensor distinct(int64_t n, int64_t bound, int64_t seed, int64_t step, int64_t stream, int64_t offset) {
  require(n >= 0 && n <= bound, "distinct", "n must be between 0 and bound");
  Tensor result = empty_1d(n, ScalarType::Long);
  const Coordinates at{static_cast<uint64_t>(seed), static_cast<uint32_t>(step), static_cast<uint32_t>(stream)};
  distinct_into(n, bound, at, offset, static_cast<int64_t*>(result.mutable_data_ptr()));
  return result;
}

// The list by row, and what is not in it.
template <class I>
struct Complement {
  const char* op;
  const I *ptr, *cols;
  int64_t rows, length, n_cols;

  Complement(const Tensor& ptr_, const Tensor& cols_, int64_t n_cols_, const char* op_)
      : op(op_),
        ptr(static_cast<const I*>(ptr_.const_data_ptr())),
        cols(static_cast<const I*>(cols_.const_data_ptr())),
        rows(ptr_.numel() - 1),
        length(cols_.numel()),
        n_cols(n_cols_) {
    require(ptr[0] == 0 && ptr[rows] >= 0 && ptr[rows] <= length, op,
            "row_ptr must start at 0 and end at the number of connections, at most the length of row_cols");
  }

  int64_t dormant_before(int64_t row) const { return row * n_cols - ptr[row]; }
  int64_t dormant() const { return dormant_before(rows); }

  // The row of a dormant position: the last one with dormant_before(row) <= rank. Ranks mostly come in ascending
  // order, so the rows behind `guess` (0, or the row of the rank before) are tried first. Only with rank < dormant(),
  // so there is a row.
  int64_t row_of(int64_t rank, int64_t guess) const {
    int64_t low = dormant_before(guess) <= rank ? guess : 0, high = rows - 1;
    for (int tries = 0; tries < 8; ++tries, ++low)
      if (low == high || dormant_before(low + 1) > rank) return low;
    while (low < high) {
      const int64_t middle = high - (high - low) / 2;
      if (dormant_before(middle) <= rank)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }

  void require_range(int64_t row) const {
    const int64_t begin = ptr[row], end = ptr[row + 1];
    require(begin >= 0 && begin <= end && end <= length, op, "row_ptr must never fall and stay within row_cols");
  }

  // The nth dormant column of a row: nth + j, where j of its active columns c_i have c_i - i <= nth.
  int64_t col_of(int64_t row, int64_t nth) const {
    require_range(row);
    const I* active = cols + ptr[row];
    int64_t low = 0, length = ptr[row + 1] - ptr[row];
    while (length > 0) {  // without branches to be guessed
      const int64_t half = length / 2;
      const bool right = active[low + half] - (low + half) <= nth;
      low += right ? half + 1 : 0;
      length = right ? length - half - 1 : half;
    }
    return nth + low;
  }
};

// work(Complement<I>) for the index type of the lists.
template <class Work>
auto with_complement(const Tensor& ptr_, const Tensor& cols_, int64_t n_cols, const char* op, const Work& work) {
  const int type = index_type(ptr_, op);
  require(ptr_.is_cpu() && cols_.is_cpu(), op, "every tensor must be on the CPU");
  require(index_type(cols_, op) == type, op, "row_ptr and row_cols must have one dtype");
  require(ptr_.dim() == 1 && cols_.dim() == 1 && ptr_.numel() >= 1, op, "row_ptr and row_cols must be lists");
  require(n_cols >= 0, op, "n_cols must not be negative");
  require(ptr_.numel() - 1 <= std::numeric_limits<int64_t>::max() / std::max<int64_t>(n_cols, 1), op,
          "the matrix has too many positions");
  const Tensor ptr = packed(ptr_), cols = packed(cols_);
  return type == kInt32 ? work(Complement<int32_t>(ptr, cols, n_cols, op))
                        : work(Complement<int64_t>(ptr, cols, n_cols, op));
}

template <class I>
std::tuple<Tensor, Tensor> map_ranks(const Complement<I>& list, const int64_t* ranks, int64_t n,
                                     const Tensor& dropped_rows_, const Tensor& dropped_cols_) {
  const Integers dropped_rows = as_integers(dropped_rows_, list.op), dropped_cols = as_integers(dropped_cols_, list.op);
  require(dropped_rows.count == dropped_cols.count, list.op, "dropped rows and columns must be equally many");
  const int64_t dormant = list.dormant();
  Tensor rows = empty_1d(n, ScalarType::Long), cols = empty_1d(n, ScalarType::Long);
  int64_t* row = static_cast<int64_t*>(rows.mutable_data_ptr());
  int64_t* col = static_cast<int64_t*>(cols.mutable_data_ptr());
  for (int64_t i = 0, guess = 0; i < n; ++i) {
    const int64_t rank = ranks[i];
    require(rank >= 0 && rank < dormant + dropped_rows.count, list.op, "a rank is out of range");
    if (rank >= dormant) {
      row[i] = dropped_rows.data[rank - dormant];
      col[i] = dropped_cols.data[rank - dormant];
    } else {
      guess = row[i] = list.row_of(rank, guess);
      col[i] = list.col_of(row[i], rank - list.dormant_before(row[i]));
    }
  }
  return {rows, cols};
}

std::tuple<Tensor, Tensor> candidates(const Tensor& row_ptr, const Tensor& row_cols, int64_t n_cols,
                                      const Tensor& ranks_, const Tensor& dropped_rows, const Tensor& dropped_cols) {
  const Integers ranks = as_integers(ranks_, "candidates");
  return with_complement(row_ptr, row_cols, n_cols, "candidates", [&](const auto& list) {
    return map_ranks(list, ranks.data, ranks.count, dropped_rows, dropped_cols);
  });
}

std::tuple<Tensor, Tensor> sample_dormant(const Tensor& row_ptr, const Tensor& row_cols, int64_t n_cols, int64_t n,
                                          const Tensor& dropped_rows, const Tensor& dropped_cols, int64_t seed,
                                          int64_t step, int64_t stream) {
  return with_complement(row_ptr, row_cols, n_cols, "sample_dormant", [&](const auto& list) {
    const int64_t free = list.dormant() + dropped_rows.numel();
    if (n < 0 || n > free)
      fail("sample_dormant", "cannot draw " + std::to_string(n) + " of " + std::to_string(free) + " candidates");
    const Tensor ranks = distinct(n, free, seed, step, stream, 0);
    return map_ranks(list, static_cast<const int64_t*>(ranks.const_data_ptr()), n, dropped_rows, dropped_cols);
  });
}

Tensor sample_dormant_in_rows(const Tensor& row_ptr, const Tensor& row_cols, int64_t n_cols,
                              const Tensor& dropped_rows, const Tensor& dropped_cols, int64_t seed, int64_t step,
                              int64_t stream) {
  const char* op = "sample_dormant_in_rows";
  const Integers rows = as_integers(dropped_rows, op), cols = as_integers(dropped_cols, op);
  require(rows.count == cols.count, op, "dropped rows and columns must be equally many");
  const Coordinates at{static_cast<uint64_t>(seed), static_cast<uint32_t>(step), static_cast<uint32_t>(stream)};
  Tensor result = empty_1d(rows.count, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(result.mutable_data_ptr());
  with_complement(row_ptr, row_cols, n_cols, op, [&](const auto& list) {
    for (int64_t first = 0, last = 0; first < rows.count; first = last) {
      const int64_t row = rows.data[first];
      require(row >= 0 && row < list.rows, op, "a dropped row is out of range");
      for (last = first + 1; last < rows.count && rows.data[last] == row; ++last) {
      }
      require(last == rows.count || rows.data[last] > row, op, "dropped rows must be sorted");
      list.require_range(row);
      const int64_t count = last - first, dormant = n_cols - (list.ptr[row + 1] - list.ptr[row]);
      require(dormant >= 0, op, "a row has more connections than columns");
      distinct_into(count, dormant + count, at, row << 32, out + first);
      for (int64_t i = first; i < last; ++i)
        out[i] = out[i] < dormant ? list.col_of(row, out[i]) : cols.data[first + out[i] - dormant];
    }
    return 0;
  });
  return result;
}

Tensor position_signs(const Tensor& rows_, const Tensor& cols_, int64_t seed, int64_t stream) {
  const Integers rows = as_integers(rows_, "position_signs"), cols = as_integers(cols_, "position_signs");
  require(rows.count == cols.count, "position_signs", "rows and columns must be equally many");
  Tensor result = empty_1d(rows.count, ScalarType::Char);
  int8_t* out = static_cast<int8_t*>(result.mutable_data_ptr());
  for (int64_t i = 0; i < rows.count; ++i) {
    const uint64_t r = static_cast<uint64_t>(rows.data[i]), c = static_cast<uint64_t>(cols.data[i]);
    const uint32_t tag = 0x80000000u | (static_cast<uint32_t>(stream) & 0x7FFFu) << 16 |
                         (static_cast<uint32_t>(c >> 32) & 0xFFFFu);
    const Words w = philox(static_cast<uint64_t>(seed), static_cast<uint32_t>(r), static_cast<uint32_t>(c),
                           static_cast<uint32_t>(r >> 32), tag);
    out[i] = (w.w[0] & 1) != 0 ? -1 : 1;
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rewire, m) {
  m.def("distinct(int n, int bound, int seed, int step, int stream, int offset) -> Tensor");
  m.def(
      "candidates(Tensor row_ptr, Tensor row_cols, int n_cols, Tensor ranks, Tensor dropped_rows, "
      "Tensor dropped_cols) -> (Tensor, Tensor)");
  m.def(
      "sample_dormant(Tensor row_ptr, Tensor row_cols, int n_cols, int n, Tensor dropped_rows, Tensor dropped_cols, "
      "int seed, int step, int stream) -> (Tensor, Tensor)");
  m.def(
      "sample_dormant_in_rows(Tensor row_ptr, Tensor row_cols, int n_cols, Tensor dropped_rows, "
      "Tensor dropped_cols, int seed, int step, int stream) -> Tensor");
  m.def("position_signs(Tensor rows, Tensor cols, int seed, int stream) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rewire, CompositeExplicitAutograd, m) { m.impl("distinct", TORCH_BOX(&distinct)); }

STABLE_TORCH_LIBRARY_IMPL(rewire, CPU, m) {
  m.impl("candidates", TORCH_BOX(&candidates));
  m.impl("sample_dormant", TORCH_BOX(&sample_dormant));
  m.impl("sample_dormant_in_rows", TORCH_BOX(&sample_dormant_in_rows));
  m.impl("position_signs", TORCH_BOX(&position_signs));
}

}  // namespace rewire
