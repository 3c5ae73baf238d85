// DEEP R's exchange of connections: draw dormant ones, find their signs, replace; see
// rewire/ops/regrow.py.
#include <algorithm>
#include <atomic>
#include <optional>

#include "pool/merge.h"
#include "pool/search.h"
#include "random/sampling.h"
#include "random/walk.h"

namespace rewire {
namespace {

struct Streams {
  int64_t grow, sign;
  bool fixed;
};

// What is kept per slot beside the pool: values (and perhaps their gradient) of one type, and
// signs.
struct Kept {
  int type;
  void *values, *gradient;
  int8_t* signs;

  Kept(const Tensor& values_, const Tensor& signs_, const Tensor* gradient_, int64_t capacity,
       const char* op)
      : type(element_type(values_, op)),
        values(values_.mutable_data_ptr()),
        gradient(gradient_ == nullptr ? nullptr : gradient_->mutable_data_ptr()),
        signs(static_cast<int8_t*>(signs_.mutable_data_ptr())) {
    for (const Tensor* x : {&values_, &signs_, gradient_}) {
      if (x == nullptr) continue;
      require_cpu(*x, op);
      require(x->dim() == 1 && x->is_contiguous() && x->numel() == capacity, op,
              "values, signs and the gradient must be contiguous lists as long as rows");
    }
    require(signs_.scalar_type() == ScalarType::Char, op, "signs must be int8");
    require(gradient_ == nullptr || gradient_->scalar_type() == values_.scalar_type(), op,
            "values and their gradient must have one dtype");
  }

  template <class T>
  void write(const int64_t* slots, const int8_t* sign, int64_t n) const {
    T *to = static_cast<T*>(values), *slope = static_cast<T*>(gradient);
    for (int64_t i = 0; i < n; ++i) {
      if (i + kAhead < n) {
        const int64_t ahead = slots[i + kAhead];
        __builtin_prefetch(to + ahead, 1);
        __builtin_prefetch(signs + ahead, 1);
        if (slope != nullptr) __builtin_prefetch(slope + ahead, 1);
      }
      to[slots[i]] = sign[i] < 0 ? -T(0) : T(0);
      signs[slots[i]] = sign[i];
      if (slope != nullptr) slope[slots[i]] = T(0);
    }
  }
  void write(const int64_t* slots, const int8_t* sign, int64_t n) const {
    if (type == kFloat32)
      write<float>(slots, sign, n);
    else
      write<double>(slots, sign, n);
  }
};

// One exchange: new connections in `slots`, which have been checked.
template <class I>
class Exchange {
 public:
  Exchange(const Pool<I>& pool, const Complement<I>& list, const int64_t* slots, int64_t n)
      : pool_(pool),
        list_(list),
        slots_(slots),
        n_(n),
        serial_(pool.capacity < kSerialMerge || n < kSerialSort),
        numbers_(3 * n),
        ranks_(numbers_.data()),
        rows_(ranks_ + n),
        cols_(rows_ + n),
        sign_(n),
        leaves_(n),
        removed_(n),
        added_(n) {}

  Problem run(uint64_t seed, uint32_t step, const Streams& streams, const Kept& kept) {
    const Coordinates grow{seed, step, static_cast<uint32_t>(streams.grow)};
    removed_.count = added_.count = n_;
    const bool merges = !too_many_to_merge(n_, pool_.capacity);
    std::atomic<bool> active{true};
    pieces(
        1, [&](int64_t) { distinct_into(n_, list_.dormant + n_, grow, 0, ranks_); },
        [&](int64_t begin, int64_t count) {
          if (!gather(begin, count)) active = false;
        });
    require(active, list_.op, "a slot is empty, or the pool holds a position that is out of range");
    pieces(
        2, [&](int64_t item) { sort_removed(item); },
        [&](int64_t begin, int64_t count) {
          place(begin, count);
          sign(begin, count, {seed, step, static_cast<uint32_t>(streams.sign)}, streams.fixed);
        });
    // Now nothing can fail, where the index is that of the pool and is not built anew: all memory
    // is there.
    Fresh<Change<I>> other(merges ? n_ + 1 : 0);
    std::optional<Merge<I>> merge;
    if (merges) merge.emplace(pool_, removed_, added_, n_);
    pieces(
        1,
        [&](int64_t) {
          if (merges) sort_added(other);
        },
        [&](int64_t begin, int64_t count) {
          kept.write(slots_ + begin, sign_.data() + begin, count);
          if (merges) write(begin, count);
        });
    if (!merges) return rebuild(pool_, slots_, rows_, cols_, n_);
    if (merge->run(true, pool_.capacity < kSerialMerge)) return kNoProblem;
    for (int64_t i = 0; i < n_; ++i) {
      const Change<I>& c = removed_.by_row[i];
      pool_.rows[c.slot] = c.major;
      pool_.cols[c.slot] = c.minor;
    }
    return rebuild(pool_, slots_, rows_, cols_, n_);
  }

 private:
  static constexpr int64_t kPiece = 256;

  // first(0 ... firsts), and piece(begin, count) for all n connections, on all threads.
  template <class First, class Piece>
  void pieces(int64_t firsts, const First& first, const Piece& piece) const {
    try_each_item(firsts + (n_ + kPiece - 1) / kPiece, serial_, [&](int64_t item) {
      if (item < firsts)
        first(item);
      else
        piece((item - firsts) * kPiece, std::min(kPiece, n_ - (item - firsts) * kPiece));
    });
  }

  // What leaves; whether it can.
  bool gather(int64_t begin, int64_t count) {
    bool active = true;
    for (int64_t i = begin; i < begin + count; ++i) {
      if (i + kAhead < begin + count) {
        __builtin_prefetch(pool_.rows + slots_[i + kAhead]);
        __builtin_prefetch(pool_.cols + slots_[i + kAhead]);
      }
      const I slot = static_cast<I>(slots_[i]), row = read_once(pool_.rows + slot),
              col = read_once(pool_.cols + slot);
      active = active && row >= 0 && pool_.valid(row, col);
      leaves_[i] = {row, col, slot};
    }
    return active;
  }

  // What leaves, in the order of one list.
  void sort_removed(int64_t list) {
    if (list == 0) {
      std::copy(leaves_.data(), leaves_.data() + n_, removed_.by_row.data());
      removed_.sort_rows(pool_.n_rows, pool_.n_cols);
    } else {
      removed_.sort_cols(leaves_.data(), pool_.n_rows, pool_.n_cols);
    }
  }

  // The new connections of some ranks.
  void place(int64_t begin, int64_t count) {
    map_ranks(list_, ranks_ + begin, count, rows_ + begin, cols_ + begin, [&](int64_t i) {
      require(i < n_, list_.op, "a rank is out of range");
      return std::pair<int64_t, int64_t>(leaves_[i].major, leaves_[i].minor);
    });
    for (int64_t i = begin; i < begin + count; ++i) {
      require(rows_[i] < pool_.n_rows && cols_[i] >= 0 && cols_[i] < pool_.n_cols, list_.op,
              "the lists of the index are not sorted");
      added_.by_row[i] = {static_cast<I>(rows_[i]), static_cast<I>(cols_[i]),
                          static_cast<I>(slots_[i])};
    }
  }

  // Ranks ascend, and with them positions, but for the last few, those of connections that leave.
  void sort_added(Fresh<Change<I>>& other) {
    Change<I>* first = added_.by_row.data();
    Change<I>* left = first + (std::lower_bound(ranks_, ranks_ + n_, list_.dormant) - ranks_);
    std::sort(left, first + n_, comes_first<I>);
    std::inplace_merge(first, left, first + n_, comes_first<I>);
    added_.from_rows(pool_.n_rows, pool_.n_cols, other);
  }

  void sign(int64_t begin, int64_t count, const Coordinates& at, bool fixed) {
    int8_t* out = sign_.data() + begin;
    if (fixed) {
      random_kernels().position_signs(rows_ + begin, cols_ + begin, count, at.seed, at.stream, out);
      return;
    }
    int64_t bits[kPiece];
    random_kernels().random_bits(at.seed, at.step, at.stream, begin, count, bits);
    for (int64_t i = 0; i < count; ++i) out[i] = (bits[i] & 1) != 0 ? -1 : 1;
  }

  void write(int64_t begin, int64_t count) {
    for (int64_t i = begin; i < begin + count; ++i) {
      if (i + kAhead < begin + count) {
        __builtin_prefetch(pool_.rows + slots_[i + kAhead], 1);
        __builtin_prefetch(pool_.cols + slots_[i + kAhead], 1);
      }
      pool_.rows[slots_[i]] = static_cast<I>(rows_[i]);
      pool_.cols[slots_[i]] = static_cast<I>(cols_[i]);
    }
  }

  const Pool<I>& pool_;
  const Complement<I>& list_;
  const int64_t* slots_;
  int64_t n_;
  bool serial_;
  Fresh<int64_t> numbers_;
  int64_t *ranks_, *rows_, *cols_;
  Fresh<int8_t> sign_;
  Fresh<Change<I>> leaves_;  // in the order of the slots
  Moves<I> removed_, added_;
};

Problem exchange(const PoolTensors& t, const int64_t* slots, int64_t n, const Kept& kept,
                 uint64_t seed, uint32_t step, const Streams& streams, const char* op) {
  const Problem problem = check_slots(slots, n, t.rows.numel());
  if (problem != kNoProblem || n == 0) return problem;
  return with_complement(t.row_ptr, t.row_cols, t.n_cols, op, [&](const auto& list) {
    using I = std::remove_const_t<std::remove_pointer_t<decltype(list.ptr)>>;
    const Pool<I> pool = t.pool<I>();
    return Exchange<I>(pool, list, slots, n).run(seed, step, streams, kept);
  });
}

int64_t connections(const Tensor& ptr, int type) {
  const int64_t last = ptr.numel() - 1;
  return type == kInt32 ? data_of<int32_t>(ptr)[last] : data_of<int64_t>(ptr)[last];
}

PoolTensors pool_of(const Tensor& rows, const Tensor& cols, const Tensor& row_ptr,
                    const Tensor& row_cols, const Tensor& row_slots, const Tensor& col_ptr,
                    const Tensor& col_rows, const Tensor& col_slots) {
  return {rows,
          cols,
          row_ptr,
          row_cols,
          row_slots,
          col_ptr,
          col_rows,
          col_slots,
          row_ptr.numel() - 1,
          col_ptr.numel() - 1};
}

// The index type of a pool whose tensors fit each other and share no memory.
int check_apart(const PoolTensors& t, const char* op) {
  const int type = t.check(op);
  require_apart(op,
                {&t.rows, &t.cols, &t.row_ptr, &t.row_cols, &t.row_slots, &t.col_ptr, &t.col_rows,
                 &t.col_slots},
                {});
  return type;
}

Problem regrow_(const Tensor& values, const Tensor& signs, const Tensor& rows, const Tensor& cols,
                const Tensor& row_ptr, const Tensor& row_cols, const Tensor& row_slots,
                const Tensor& col_ptr, const Tensor& col_rows, const Tensor& col_slots,
                const Tensor& slots_, int64_t seed, int64_t step, int64_t grow_stream,
                int64_t sign_stream, bool fixed) {
  const char* op = "regrow_";
  const PoolTensors t =
      pool_of(rows, cols, row_ptr, row_cols, row_slots, col_ptr, col_rows, col_slots);
  const int type = check_apart(t, op);
  const Kept kept(values, signs, nullptr, rows.numel(), op);
  const Integers slots = own_integers(slots_, op);
  const Problem problem =
      exchange(t, slots.data, slots.count, kept, static_cast<uint64_t>(seed),
               static_cast<uint32_t>(step), {grow_stream, sign_stream, fixed}, op);
  if (problem != kNoProblem) return problem;
  return {kOk, connections(row_ptr, type), 0};
}

// The slots that crossed zero, and what went wrong.
std::tuple<Tensor, int64_t, int64_t, int64_t> walk_and_regrow_(
    const Tensor& values, const Tensor& signs, const Tensor& rows, const Tensor& cols,
    const Tensor& row_ptr, const Tensor& row_cols, const Tensor& row_slots, const Tensor& col_ptr,
    const Tensor& col_rows, const Tensor& col_slots, const std::optional<Tensor>& gradient,
    double shrink, double noise, int64_t seed, int64_t step, int64_t noise_stream,
    int64_t grow_stream, int64_t sign_stream, bool fixed) {
  const char* op = "walk_and_regrow_";
  const PoolTensors t =
      pool_of(rows, cols, row_ptr, row_cols, row_slots, col_ptr, col_rows, col_slots);
  const int type = check_apart(t, op);
  const Kept kept(values, signs, gradient.has_value() ? &*gradient : nullptr, rows.numel(), op);
  const bool full = connections(row_ptr, type) == rows.numel();
  const Diffusion by{shrink, noise, static_cast<uint64_t>(seed), static_cast<uint32_t>(step),
                     static_cast<uint32_t>(noise_stream)};
  const Tensor slots = walk(values, rows, signs, full, by, op);
  const auto [code, a, b] =
      exchange(t, static_cast<const int64_t*>(slots.const_data_ptr()), slots.numel(), kept, by.seed,
               by.step, {grow_stream, sign_stream, fixed}, op);
  return {slots, code, a, b};
}

}  // namespace

REWIRE_OPERATOR(regrow_,
                "(Tensor(a!) values, Tensor(b!) signs, Tensor(c!) rows, Tensor(d!) cols, "
                "Tensor(e!) row_ptr, Tensor(f!) row_cols, Tensor(g!) row_slots, Tensor(h!) "
                "col_ptr, Tensor(i!) col_rows, Tensor(j!) col_slots, Tensor slots, int seed, int "
                "step, int grow_stream, int sign_stream, bool fixed) -> (int, int, int)")
REWIRE_OPERATOR(
    walk_and_regrow_,
    "(Tensor(a!) values, Tensor(b!) signs, Tensor(c!) rows, Tensor(d!) cols, Tensor(e!) row_ptr, "
    "Tensor(f!) row_cols, Tensor(g!) row_slots, Tensor(h!) col_ptr, Tensor(i!) col_rows, "
    "Tensor(j!) col_slots, Tensor(k!)? gradient, float shrink, float noise, int seed, int step, "
    "int noise_stream, int grow_stream, int sign_stream, bool fixed) -> (Tensor, int, int, int)")

}  // namespace rewire
