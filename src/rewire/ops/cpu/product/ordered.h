// What a product is asked for, and its connections in the order of the list.
#pragma once

#include <memory>

#include "product/lists.h"
#include "product/panels.h"

namespace rewire {

// Memory whose contents do not matter yet.
class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(new char[static_cast<size_t>(bytes + kAligned)]) {
    start = bytes_.get();
    start += (kAligned - reinterpret_cast<uintptr_t>(start) % kAligned) % kAligned;
  }
  char* start;

 private:
  static constexpr int64_t kAligned = 64;
  std::unique_ptr<char[]> bytes_;
};

// What a product is asked for. Of the numbers that are computed with, values and bias have the
// type: float32 where those of x have 16 bits.
struct Task {
  const char* op;
  const CheckedList& list;
  const Matrix& x;    // read as the list says
  const Matrix* own;  // of the list's rows, for dots; else null
  const Matrix* out;  // of the list's rows, for sums; else null
  const void* values;
  const void* bias;  // may be null
  void* dots;        // by slot
  int64_t capacity;

  Wanted wanted() const { return !own ? kSums : !out ? kDots : kBoth; }
  bool wide() const { return x.type == kFloat64; }
  int64_t bytes() const { return number_bytes(x.type); }
};

template <class F>
void with_types(const Task& t, const F& f) {
  if (t.wide())
    t.list.type == kInt32 ? f(double{}, int32_t{}) : f(double{}, int64_t{});
  else
    t.list.type == kInt32 ? f(float{}, int32_t{}) : f(float{}, int64_t{});
}

// The list's connections with their values beside them, checked: worth its time where several
// panels walk it. Dot products come in this order too, one list per group of panels.
class Ordered {
 public:
  explicit Ordered(const Task& t, int64_t groups)
      : task_(t),
        k_(t.list.connections),
        groups_(groups),
        idx_(k_ * 4),
        values_(t.out ? k_ * t.bytes() : 0),
        dots_(t.own ? groups * k_ * t.bytes() : 0) {
    std::atomic<int> status{kFine};
    with_types(t, [&](auto number, auto index) {
      using T = decltype(number);
      using I = decltype(index);
      const I* idx = static_cast<const I*>(t.list.idx.const_data_ptr());
      const I* slots = static_cast<const I*>(t.list.slots.const_data_ptr());
      const T* values = static_cast<const T*>(t.values);
      int32_t* to = reinterpret_cast<int32_t*>(idx_.start);
      T* value = t.out ? reinterpret_cast<T*>(values_.start) : nullptr;
      in_pieces([&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const I c = read_once(idx + i), s = read_once(slots + i);
          if (c < 0 || c >= t.x.features) {
            status = kBadIndex;
            return;
          }
          if (s < 0 || s >= t.capacity) {
            status = kBadSlot;
            return;
          }
          to[i] = static_cast<int32_t>(c);
          if (value) value[i] = values[s];
        }
      });
    });
    raise(status, t.op);
  }

  const char* idx() const { return idx_.start; }
  const char* values() const { return values_.start; }
  char* dots(int64_t group) const { return dots_.start + group * k_ * task_.bytes(); }

  // The sums of all groups, to their slots.
  void deliver() const {
    std::atomic<int> status{kFine};
    with_types(task_, [&](auto number, auto index) {
      using T = decltype(number);
      using I = decltype(index);
      const I* slots = static_cast<const I*>(task_.list.slots.const_data_ptr());
      T* out = static_cast<T*>(task_.dots);
      in_pieces([&](int64_t begin, int64_t end) {
        T* sums = reinterpret_cast<T*>(dots(0));
        for (int64_t group = 1; group < groups_; ++group) {
          const T* more = reinterpret_cast<const T*>(dots(group));
          for (int64_t i = begin; i < end; ++i) sums[i] += more[i];
        }
        for (int64_t i = begin; i < end; ++i) {
          const I s = read_once(slots + i);
          if (s < 0 || s >= task_.capacity) {
            status = kBadSlot;
            return;
          }
          out[s] = sums[i];
        }
      });
    });
    raise(status, task_.op);
  }

 private:
  template <class F>
  void in_pieces(const F& f) const {
    constexpr int64_t kPiece = 1 << 14;
    const int64_t pieces = (k_ + kPiece - 1) / kPiece;
    for_each_item(pieces, pieces < 4,
                  [&](int64_t p) { f(p * kPiece, std::min(k_, (p + 1) * kPiece)); });
  }

  const Task& task_;
  const int64_t k_, groups_;
  const Memory idx_, values_, dots_;
};

}  // namespace rewire
