// The best of many scores and the weakest of many values; see rewire/ops/top_scores.py, whose
// definitions these follow.
#include <limits>
#include <memory>

#include "random/philox.h"
#include "runtime.h"
#include "select/select.h"

namespace rewire {
namespace {

struct Draw {
  double least;
  uint64_t seed;
  uint32_t step, stream;
};

template <class T>
struct Survivors {
  int64_t* keys;
  T* scores;
  float* uniforms;  // only of a draw
};

template <class T>
struct Lowest {
  static constexpr T value = std::numeric_limits<T>::lowest();
};

// Looks at n scores of keys first, first + 1, ...; of kept ones (not 0) nothing is taken.
template <class T>
using Scan = int64_t (*)(const T* scores, const uint8_t* kept, int64_t n, int64_t first, T bar,
                         const Draw* draw, const Survivors<T>& out);

template <class T>
struct Scans {
  Scan<T> plain, absolute, drawn;
};
struct ScanTable {
  Scans<float> floats;
  Scans<double> doubles;
};

}  // namespace
}  // namespace rewire

#define REWIRE_KERNELS "select/scan-inl.h"
#include "simd/each_target.h"

namespace rewire {
namespace {

template <class T>
const Scans<T>& scans_of() {
  if constexpr (sizeof(T) == 4)
    return REWIRE_BEST(kScans).floats;
  else
    return REWIRE_BEST(kScans).doubles;
}

template <class T>
constexpr ScalarType kType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

// What one item found; grown by rows, so that the inner loop need not look.
template <class T>
struct Found {
  std::unique_ptr<int64_t[]> keys;
  std::unique_ptr<T[]> scores;
  std::unique_ptr<float[]> uniforms;
  int64_t count = 0, room = 0;

  void reserve(int64_t more, bool drawn) {
    if (count + more <= room) return;
    room = std::max(2 * room, count + more);
    const auto grown = [&](auto& list) {
      using E = std::remove_reference_t<decltype(list[0])>;
      std::unique_ptr<E[]> wider(new E[static_cast<size_t>(room)]);
      std::copy(list.get(), list.get() + count, wider.get());
      list = std::move(wider);
    };
    grown(keys);
    grown(scores);
    if (drawn) grown(uniforms);
  }
};

template <class T, class I>
std::tuple<Tensor, Tensor, Tensor> survivors(const char* op, const Tensor& scores_,
                                             int64_t first_row, const Tensor& row_ptr_,
                                             const Tensor& row_cols_, const Tensor& row_slots_,
                                             const Tensor& kept_, double bar, bool absolute,
                                             const Draw* draw) {
  const Tensor scores = packed(scores_), row_ptr = packed(row_ptr_), row_cols = packed(row_cols_);
  const Tensor row_slots = packed(row_slots_), kept = packed(kept_);
  const int64_t rows = scores.size(0), cols = scores.size(1), length = row_cols.numel(),
                capacity = kept.numel();
  const T* score = static_cast<const T*>(scores.const_data_ptr());
  const I* ptr = static_cast<const I*>(row_ptr.const_data_ptr()) + first_row;
  const I* col = static_cast<const I*>(row_cols.const_data_ptr());
  const I* slot = static_cast<const I*>(row_slots.const_data_ptr());
  const uint8_t* keeps = static_cast<const uint8_t*>(kept.const_data_ptr());
  const Scans<T>& table = scans_of<T>();
  const Scan<T> scan = draw != nullptr ? table.drawn : absolute ? table.absolute : table.plain;

  constexpr int64_t kScores = 1 << 15;  // in an item
  const int64_t each = std::max<int64_t>(1, kScores / std::max<int64_t>(cols, 1));
  const int64_t items = (rows + each - 1) / each;
  std::vector<Found<T>> found(static_cast<size_t>(items));
  std::atomic<int> trouble{kFine};
  for_each_item(items, rows * cols < kSerialWork, [&](int64_t item) {
    try {
      Found<T>& own = found[static_cast<size_t>(item)];
      std::vector<uint8_t> taken(static_cast<size_t>(cols) + 128);
      for (int64_t r = item * each; r < std::min(rows, (item + 1) * each); ++r) {
        const int64_t begin = read_once(ptr + r), end = read_once(ptr + r + 1);
        if (begin < 0 || begin > end || end > length) {
          trouble = kBadPointer;
          return;
        }
        for (int64_t i = begin; i < end; ++i) {
          const int64_t c = read_once(col + i), s = read_once(slot + i);
          if (c < 0 || c >= cols || s < 0 || s >= capacity) {
            trouble = kBadIndex;
            return;
          }
          taken[static_cast<size_t>(c)] = keeps[s];
        }
        for (int j = 0; j < 128; ++j) taken[static_cast<size_t>(cols + j)] = 1;
        own.reserve(cols, draw != nullptr);
        const Survivors<T> out{own.keys.get() + own.count, own.scores.get() + own.count,
                               draw != nullptr ? own.uniforms.get() + own.count : nullptr};
        own.count += scan(score + r * cols, taken.data(), cols, (first_row + r) * cols,
                          static_cast<T>(bar), draw, out);
        for (int64_t i = begin; i < end; ++i)
          if (const int64_t c = read_once(col + i); c >= 0 && c < cols)
            taken[static_cast<size_t>(c)] = 0;
      }
    } catch (const std::bad_alloc&) {
      trouble = kBadSlot;
    }
  });
  require(trouble != kBadPointer, op, "row_ptr must never fall and stay within the lists");
  require(trouble != kBadIndex, op, "a column or slot of the index is out of range");
  if (trouble != kFine) throw std::bad_alloc();

  std::vector<int64_t> start(found.size() + 1);
  for (size_t i = 0; i < found.size(); ++i) start[i + 1] = start[i] + found[i].count;
  Tensor keys = empty_1d(start.back(), ScalarType::Long), values = empty_1d(start.back(), kType<T>);
  Tensor uniforms = empty_1d(draw != nullptr ? start.back() : 0, ScalarType::Float);
  int64_t* key = static_cast<int64_t*>(keys.mutable_data_ptr());
  T* value = static_cast<T*>(values.mutable_data_ptr());
  float* uniform = static_cast<float*>(uniforms.mutable_data_ptr());
  for_each_item(items, start.back() < (1 << 14), [&](int64_t item) {
    Found<T>& own = found[static_cast<size_t>(item)];
    const int64_t at = start[static_cast<size_t>(item)];
    std::copy(own.keys.get(), own.keys.get() + own.count, key + at);
    std::copy(own.scores.get(), own.scores.get() + own.count, value + at);
    if (draw != nullptr)
      std::copy(own.uniforms.get(), own.uniforms.get() + own.count, uniform + at);
  });
  return {keys, values, uniforms};
}

std::tuple<Tensor, Tensor, Tensor> checked_survivors(const char* op, const Tensor& scores,
                                                     int64_t first_row, const Tensor& row_ptr,
                                                     const Tensor& row_cols,
                                                     const Tensor& row_slots, const Tensor& kept,
                                                     double bar, bool absolute, const Draw* draw) {
  for (const Tensor* t : {&scores, &row_ptr, &row_cols, &row_slots, &kept}) require_cpu(*t, op);
  require(scores.dim() == 2, op, "scores must have two dimensions");
  require(kept.dim() == 1 && kept.scalar_type() == ScalarType::Bool, op,
          "kept must be a list of booleans");
  const int type = index_type(row_ptr, op);
  require(index_type(row_cols, op) == type && index_type(row_slots, op) == type, op,
          "the index must have one dtype");
  require(row_ptr.dim() == 1 && row_cols.dim() == 1 && row_slots.dim() == 1 &&
              row_cols.numel() == row_slots.numel(),
          op, "the index must be lists, row_cols and row_slots of one length");
  const int64_t rows = scores.size(0), cols = scores.size(1);
  require(first_row >= 0 && rows <= row_ptr.numel() - 1 && first_row <= row_ptr.numel() - 1 - rows,
          op, "the index does not have these rows");
  require(row_ptr.numel() <= std::numeric_limits<int64_t>::max() / std::max<int64_t>(cols, 1), op,
          "the matrix has too many positions");
  const bool wide = element_type(scores, op) == kFloat64;
  const auto run = type == kInt32 ? (wide ? survivors<double, int32_t> : survivors<float, int32_t>)
                                  : (wide ? survivors<double, int64_t> : survivors<float, int64_t>);
  return run(op, scores, first_row, row_ptr, row_cols, row_slots, kept, bar, absolute, draw);
}

std::tuple<Tensor, Tensor> above(const Tensor& scores, int64_t first_row, const Tensor& row_ptr,
                                 const Tensor& row_cols, const Tensor& row_slots,
                                 const Tensor& kept, double bar, bool absolute) {
  auto [keys, found, none] = checked_survivors("above", scores, first_row, row_ptr, row_cols,
                                               row_slots, kept, bar, absolute, nullptr);
  return {keys, found};
}

std::tuple<Tensor, Tensor, Tensor> above_drawn(const Tensor& scores, int64_t first_row,
                                               const Tensor& row_ptr, const Tensor& row_cols,
                                               const Tensor& row_slots, const Tensor& kept,
                                               double bar, double least, int64_t seed, int64_t step,
                                               int64_t stream) {
  const Draw draw{least, static_cast<uint64_t>(seed), static_cast<uint32_t>(step),
                  static_cast<uint32_t>(stream)};
  return checked_survivors("above_drawn", scores, first_row, row_ptr, row_cols, row_slots, kept,
                           bar, true, &draw);
}

Tensor uniforms(const Tensor& positions_, int64_t seed, int64_t step, int64_t stream) {
  const char* op = "uniforms";
  const Integers positions = as_integers(positions_, op);
  Tensor result = empty_1d(positions.count, ScalarType::Float);
  float* out = static_cast<float*>(result.mutable_data_ptr());
  const Ranges ranges(positions.count);
  for_each_item(ranges.items, ranges.items < 2, [&](int64_t item) {
    for (int64_t i = ranges.begin(item); i < ranges.end(item); ++i) {
      const uint64_t quad = static_cast<uint64_t>(positions.data[i] >> 2);
      const Words words = philox(static_cast<uint64_t>(seed), static_cast<uint32_t>(quad),
                                 static_cast<uint32_t>(quad >> 32), static_cast<uint32_t>(step),
                                 static_cast<uint32_t>(stream));
      out[i] = (static_cast<float>(words.w[positions.data[i] & 3]) + 0.5f) * 0x1p-32f;
    }
  });
  return result;
}

template <class T>
Tensor extremes_of(const Tensor& scores_, int64_t count, bool largest) {
  using U = Bits<T>;
  const Tensor scores = packed(scores_);
  const T* score = static_cast<const T*>(scores.const_data_ptr());
  const int64_t n = scores.numel();
  Tensor result = empty_1d(count, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(result.mutable_data_ptr());
  const auto bits =
      largest ? smallest_bits<U>(n, count, [score](int64_t i) { return descending(score[i]); })
              : smallest_bits<U>(n, count, [score](int64_t i) { return ascending(score[i]); });
  for_each_bit(bits, count, "extremes", [out](int64_t place, int64_t i) { out[place] = i; });
  return result;
}

Tensor extremes(const Tensor& scores, int64_t count, bool largest) {
  const char* op = "extremes";
  require_cpu(scores, op);
  require(scores.dim() == 1, op, "scores must have one dimension");
  require(count >= 0 && count <= scores.numel(), op,
          "count must be between 0 and the number of scores");
  return element_type(scores, op) == kFloat32 ? extremes_of<float>(scores, count, largest)
                                              : extremes_of<double>(scores, count, largest);
}

template <class T, class I>
Tensor weakest_of(const Tensor& values_, const std::optional<Tensor>& factors_,
                  const Tensor& slots_, double fraction, bool by_sign) {
  using U = Bits<T>;
  const Tensor values = packed(values_), slots = packed(slots_);
  const Tensor factors = factors_.has_value() ? packed(*factors_) : values;
  const bool weighted = factors_.has_value();
  const T* value = static_cast<const T*>(values.const_data_ptr());
  const T* factor = static_cast<const T*>(factors.const_data_ptr());
  const I* slot = static_cast<const I*>(slots.const_data_ptr());
  const int64_t n = slots.numel(), capacity = values.numel();
  std::unique_ptr<U[]> bits(new U[static_cast<size_t>(n)]);
  const Ranges ranges(n);
  std::vector<std::array<int64_t, 2>> sides(static_cast<size_t>(ranges.items));
  std::atomic<bool> fine{true};
  for_each_item(ranges.items, ranges.items < 2, [&](int64_t item) {
    int64_t up = 0, down = 0;
    for (int64_t i = ranges.begin(item); i < ranges.end(item); ++i) {
      const int64_t s = read_once(slot + i);
      if (s < 0 || s >= capacity) {
        fine = false;
        return;
      }
      const T v = weighted ? value[s] * factor[s] : value[s];
      bits[i] = bits_of(v);
      up += v >= T(0);
      down += v < T(0);
    }
    sides[static_cast<size_t>(item)] = {up, down};
  });
  require(fine, "weakest", "a slot is out of range");

  int64_t count[2] = {0, 0};
  const auto share = [fraction](int64_t k) {
    return static_cast<int64_t>(fraction * static_cast<double>(k));
  };
  for (const auto& side : sides) {
    count[0] += side[0];
    count[1] += side[1];
  }
  count[0] = share(by_sign ? count[0] : n);
  count[1] = by_sign ? share(count[1]) : 0;
  Tensor result = empty_1d(count[0] + count[1], ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(result.mutable_data_ptr());
  const auto choose = [&](int64_t most, int64_t* to, const auto& key) {
    for_each_bit(smallest_bits<U>(n, most, key), most, "weakest",
                 [&](int64_t place, int64_t i) { to[place] = slot[i]; });
  };
  // As integers, positive numbers come in order of magnitude and before the negative ones; with the
  // sign bit turned, after them. Those of the other side are never reached, and neither is NaN.
  const U* own = bits.get();
  if (!by_sign) {
    choose(count[0], out, [own](int64_t i) { return own[i] & (kTop<U> - 1); });
  } else {
    choose(count[0], out, [own](int64_t i) { return own[i]; });
    choose(count[1], out + count[0], [own](int64_t i) { return own[i] ^ kTop<U>; });
  }
  return result;
}

Tensor weakest(const Tensor& values, std::optional<Tensor> factors, const Tensor& slots,
               double fraction, bool by_sign) {
  const char* op = "weakest";
  require_cpu(values, op);
  require_cpu(slots, op);
  require(values.dim() == 1 && slots.dim() == 1, op, "values and slots must have one dimension");
  require(fraction >= 0.0 && fraction <= 1.0, op, "fraction must be between 0 and 1");
  const bool wide = element_type(values, op) == kFloat64;
  if (factors.has_value()) {
    require_cpu(*factors, op);
    require(factors->dim() == 1 && factors->numel() == values.numel() &&
                factors->scalar_type() == values.scalar_type(),
            op, "factors must be as values are");
  }
  const bool narrow = index_type(slots, op) == kInt32;
  const auto run = narrow ? (wide ? weakest_of<double, int32_t> : weakest_of<float, int32_t>)
                          : (wide ? weakest_of<double, int64_t> : weakest_of<float, int64_t>);
  return run(values, factors, slots, fraction, by_sign);
}

}  // namespace

REWIRE_OPERATOR(above,
                "(Tensor scores, int first_row, Tensor row_ptr, Tensor row_cols, Tensor row_slots, "
                "Tensor kept, float bar, bool absolute) -> (Tensor, Tensor)")
REWIRE_OPERATOR(
    above_drawn,
    "(Tensor scores, int first_row, Tensor row_ptr, Tensor row_cols, Tensor row_slots, Tensor "
    "kept, float bar, float least, int seed, int step, int stream) -> (Tensor, Tensor, Tensor)")
REWIRE_OPERATOR(uniforms, "(Tensor positions, int seed, int step, int stream) -> Tensor")
REWIRE_OPERATOR(extremes, "(Tensor scores, int count, bool largest) -> Tensor")
REWIRE_OPERATOR(
    weakest,
    "(Tensor values, Tensor? factors, Tensor slots, float fraction, bool by_sign) -> Tensor")

}  // namespace rewire
