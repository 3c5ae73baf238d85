// Products of many rows, row-major in and row-major out: one panel of the batch after the other is
// brought into a core's own cache with the batch contiguous, goes through the kernels there, and
// what comes of it leaves as rows. So no copy of a whole activation is ever made.
#pragma once

#include "product/products.h"

namespace rewire {

// What a kernel works on: some rows of a list and one panel. Rows of x, g and y are `step` elements
// apart, and those of g and y are of these rows only.
struct Piece {
  List list;      // whose row 0 is the first of these
  int64_t first;  // which row of the whole list that is
  int64_t rows, width, step;
  const void *x, *g;
  void* y;
  int64_t group;
  bool add;  // to what the group's panels before have left

  Part part() const { return {0, rows, 0, width, nullptr}; }
};

// The batch in panels, and these in groups that one thread walks in order. Which panels are a group
// follows from shapes and topology alone. Where groups are fewer than threads, rows of the list are
// shared out too, which changes no sum.
class Panels {
 public:
  // g: read beside x, a feature for each row of the list. y: (batch, rows), written; row-major, or
  // with its batch contiguous. Null if a product has none.
  Panels(const CheckedList& list, int type, const Matrix& x, const Matrix* g, Tensor* y,
         int64_t groups)
      : list_(list),
        type_(type),
        x_(x),
        g_(g),
        y_(y == nullptr ? nullptr : static_cast<char*>(y->mutable_data_ptr())),
        runs_(y != nullptr && y->stride(0) == 1),
        blocks_(x.batch, type, vectors(x.features, type, g != nullptr)),
        groups_(groups > 0 ? std::min(groups, blocks_.count) : blocks_.count),
        step_((blocks_.widest() + blocks_.lanes - 1) / blocks_.lanes * blocks_.lanes),
        threads_((list.connections + list.rows) * x.batch < kSerialWork
                     ? 1
                     : torch::stable::get_num_threads()),
        stripes_(
            std::min(std::max<int64_t>(list.rows / kRows, 1), (threads_ + groups_ - 1) / groups_)),
        panel_(lines(x.features * step_ * element_bytes(type))),
        piece_(lines(2 * kRows * step_ * number_bytes(type))) {}

  int64_t groups() const { return groups_; }

  // kernel(piece) -> Status; raises the first error.
  template <class Kernel>
  void run(const char* op, const Kernel& kernel) const {
    Failure failure;
    const int64_t each = panel_ + 3 * piece_, items = groups_ * stripes_,
                  threads = std::min(threads_, items);
    const Tensor scratch = empty_1d(threads * each, ScalarType::Char);
    char* memory = static_cast<char*>(scratch.mutable_data_ptr());
    std::atomic<int64_t> next{0};
    const auto work = [&](int64_t thread) {
      for (int64_t item = next.fetch_add(1, std::memory_order_relaxed); item < items;
           item = next.fetch_add(1, std::memory_order_relaxed))
        failure.note(walk(item / stripes_, item % stripes_, memory + thread * each, kernel));
    };
    if (threads == 1) {
      work(0);
    } else {
      torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread) work(thread);
      });
    }
    raise(failure.status, op);
  }

 private:
  static constexpr int64_t kRows = 64;  // of the list in a piece: a multiple of every vector length

  // How many vectors of the batch a panel has. The less of a second-level cache it takes, the more
  // is left for what comes and goes; but a dot product for each connection has costs of its own,
  // which several vectors share. Measured with 2 MiB: 8 vectors are 1.1 to 1.2 times as fast as 4
  // with the gradient of values and 0.75 to 1 times without; from 4,096 columns of float32 on, 4
  // are always faster than 8, and from 8,192 on, 2. (It must not depend on the machine, as sums do
  // not.)
  static int64_t vectors(int64_t features, int type, bool dots) {
    const int64_t each = features * product_kernels().lanes[type] * element_bytes(type);
    constexpr int64_t kMany = int64_t{1} << 16, kSome = int64_t{1} << 18;
    return dots && each <= kMany ? kVectorsPerBlock : each <= kSome ? 4 : 2;
  }

  static int64_t lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

  template <class Kernel>
  Status walk(int64_t group, int64_t stripe, char* memory, const Kernel& kernel) const {
    const int64_t row0 = list_.rows * stripe / stripes_,
                  row1 = list_.rows * (stripe + 1) / stripes_,
                  pieces = std::max<int64_t>(1, (row1 - row0) / kRows),
                  first = blocks_.count * group / groups_,
                  last = blocks_.count * (group + 1) / groups_;
    for (int64_t block = first; block < last; ++block) {
      const int64_t b0 = blocks_.start(block), width = blocks_.width(block);
      bring(x_, b0, width, 0, x_.features, memory);
      for (int64_t k = 0; k < pieces; ++k) {
        // The last piece takes the rest too, so that none is narrower than a vector.
        const int64_t r0 = row0 + k * kRows, r1 = k + 1 == pieces ? row1 : r0 + kRows;
        char* g = memory + panel_;
        char* y = g + piece_;
        if (g_ != nullptr) bring(*g_, b0, width, r0, r1, g);
        List list = list_.list;
        list.ptr = static_cast<const char*>(list.ptr) + r0 * (list_.type == kInt32 ? 4 : 8);
        const Status status =
            kernel(Piece{list, r0, r1 - r0, width, step_, memory, g, y, group, block > first});
        if (status != kFine) return status;
        if (y_ != nullptr) deliver(y, y + piece_, b0, width, r0, r1 - r0);
      }
    }
    return kFine;
  }

  // Some features of a panel, to rows of a scratch.
  void bring(const Matrix& from, int64_t b0, int64_t width, int64_t f0, int64_t f1,
             char* to) const {
    const char* data =
        from.data + (b0 * from.batch_step + f0 * from.feature_step) * element_bytes(type_);
    product_kernels().copy[type_]({data, to, width, step_, from.feature_step, from.batch_step}, 0,
                                  f1 - f0);
  }

  // Sums of some rows of the list, to y; `narrow` is room for them in 16 bits.
  void deliver(const char* sums, char* narrow, int64_t b0, int64_t width, int64_t r0,
               int64_t rows) const {
    const auto& kernels = product_kernels();
    const int64_t size = element_bytes(type_);
    if (is_narrow(type_)) {
      kernels.narrow[type_ - kBFloat16](sums, narrow, rows * step_);
      sums = narrow;
    }
    const int64_t batch = x_.batch, features = list_.rows;
    if (runs_)
      kernels.copy[type_]({sums, y_ + (r0 * batch + b0) * size, width, batch, step_, 1}, 0, rows);
    else
      kernels.copy[type_]({sums, y_ + (b0 * features + r0) * size, rows, features, 1, step_}, 0,
                          width);
  }

  const CheckedList& list_;
  const int type_;
  const Matrix x_;
  const Matrix* const g_;
  char* const y_;
  const bool runs_;
  const Blocks blocks_;
  const int64_t groups_, step_, threads_, stripes_, panel_, piece_;
};

// Numbers of connections in the order of a list: there, they are read and written one after the
// other in every panel, and slots are read, checked and followed once.
class InOrder {
 public:
  // values: by slot, or null; sums: how many of each connection.
  InOrder(const CheckedList& list, int type, const void* values, int64_t capacity, int64_t sums,
          const char* op)
      : list_(list),
        wide_(type == kFloat64),
        capacity_(capacity),
        sums_(sums),
        slots_(list.connections * (list.type == kInt32 ? 4 : 8)),
        values_(values == nullptr ? 0 : list.connections * number_bytes(type)),
        gradient_(list.connections * sums * number_bytes(type)) {
    each(op, [&](auto number, auto index, int64_t begin, int64_t end) {
      using T = decltype(number);
      using I = decltype(index);
      const I* slots = static_cast<const I*>(list.list.slots);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t slot = read_once(slots + i);
        if (slot < 0 || slot >= capacity_) return kBadSlot;
        reinterpret_cast<I*>(slots_.data())[i] = I(i);
        if (values != nullptr)
          reinterpret_cast<T*>(values_.data())[i] = static_cast<const T*>(values)[slot];
      }
      return kFine;
    });
  }

  // `piece.list` with slots that count connections.
  List list(const Piece& piece) const {
    return {piece.list.ptr, piece.list.idx, slots_.data(), list_.connections};
  }
  const void* values() const { return values_.data(); }
  void* gradient(int64_t group) const {
    return gradient_.data() + group * list_.connections * (wide_ ? 8 : 4);
  }

  // The sums of all groups, in their order, to the slots of `out`.
  void deliver(void* out, const char* op) const {
    each(op, [&](auto number, auto index, int64_t begin, int64_t end) {
      using T = decltype(number);
      const auto* slots = static_cast<const decltype(index)*>(list_.list.slots);
      const T* sums = reinterpret_cast<const T*>(gradient_.data());
      for (int64_t i = begin; i < end; ++i) {
        T sum = sums[i];
        for (int64_t k = 1; k < sums_; ++k) sum += sums[k * list_.connections + i];
        const int64_t slot = read_once(slots + i);
        if (slot < 0 || slot >= capacity_) return kBadSlot;
        static_cast<T*>(out)[slot] = sum;
      }
      return kFine;
    });
  }

 private:
  // job(a number, an index, begin, end) -> Status for all connections, shared out.
  template <class Job>
  void each(const char* op, const Job& job) const {
    constexpr int64_t kMost = 1 << 14;
    Failure failure;
    const int64_t items = (list_.connections + kMost - 1) / kMost;
    for_each_item(items, list_.connections < kSerialWork / 4, [&](int64_t item) {
      const int64_t begin = item * kMost, end = std::min(begin + kMost, list_.connections);
      if (list_.type == kInt32)
        failure.note(wide_ ? job(double{}, int32_t{}, begin, end)
                           : job(float{}, int32_t{}, begin, end));
      else
        failure.note(wide_ ? job(double{}, int64_t{}, begin, end)
                           : job(float{}, int64_t{}, begin, end));
    });
    raise(failure.status, op);
  }

  const CheckedList& list_;
  const bool wide_;
  const int64_t capacity_, sums_;
  const Scratch slots_, values_, gradient_;
};

// In how many groups of panels the gradient of values is summed: enough for a few threads, of not
// too few rows each, and so few that their sums take a fraction of the memory of x and g.
inline int64_t groups_of(const CheckedList& list, const Matrix& x, const Matrix& g) {
  constexpr int64_t kMost = 16, kRows = 128, kFraction = 16;
  const int64_t fit =
      x.batch * (x.features + g.features) / (kFraction * std::max<int64_t>(list.connections, 1));
  return std::max<int64_t>(1, std::min({kMost, x.batch / kRows, fit}));
}

}  // namespace rewire
