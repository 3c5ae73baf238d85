// Index lists as products take them, and how their rows are shared out.
#pragma once

#include <thread>

#include "product/kernels.h"
#include "runtime.h"

namespace rewire {

// The tensors of one index list, checked as a whole; single entries are checked as they are read.
struct CheckedList {
  Tensor ptr, idx, slots;
  int type;
  int64_t rows, length, connections;

  CheckedList(const Tensor& p, const Tensor& i, const Tensor& s, const char* op)
      : ptr(packed(p)), idx(packed(i)), slots(packed(s)), type(index_type(p, op)) {
    require(p.is_cpu() && i.is_cpu() && s.is_cpu(), op, "every tensor must be on the CPU");
    require(p.dim() == 1 && i.dim() == 1 && s.dim() == 1, op,
            "ptr, idx and slots must have one dimension");
    require(index_type(i, op) == type && index_type(s, op) == type, op,
            "ptr, idx and slots must have one dtype");
    require(ptr.numel() >= 1, op, "ptr must have one entry more than there are rows");
    require(idx.numel() == slots.numel(), op, "idx and slots must have the same length");
    rows = ptr.numel() - 1;
    length = idx.numel();
    require(at(0) == 0, op, "ptr must start at 0");
    connections = at(rows);
    require(connections >= 0 && connections <= length, op,
            "ptr must end at the number of connections, which is at most the length of idx");
  }

  int64_t at(int64_t row) const { return entry(ptr, row); }
  int64_t slot(int64_t i) const { return entry(slots, i); }

 private:
  int64_t entry(const Tensor& list, int64_t i) const {
    const void* data = list.const_data_ptr();
    return type == kInt32 ? read_once(static_cast<const int32_t*>(data) + i)
                          : read_once(static_cast<const int64_t*>(data) + i);
  }
};

inline void raise(int status, const char* op) {
  switch (status) {
    case kFine:
      return;
    case kBadPointer:
      fail(op, "ptr must never fall and stay within the length of idx");
    case kBadIndex:
      fail(op, "an entry of idx is outside the features of x");
    default:
      fail(op, "an entry of slots is outside the capacity");
  }
}

// What one thread does at a time: some rows, or one segment of a row too long for one thread.
struct Unit {
  int64_t row0, row1;  // row1 == row0 + 1 for a segment
  int64_t begin, end;  // the connections of a segment
  int64_t part;        // of all segments that are units, which; -1 for rows
};

// The rows, shared out in units of about equal work (connections, plus one for the row itself).
// Unit c starts at the first row before which c / count of the work lies. Whatever ptr holds, units
// follow each other from row 0 to the last, because a search begins where the one before ended: so
// the kernels see, and check, every row.
struct Plan {
  struct LongRow {
    int64_t row, first, parts;  // its segments are the units first ... first + parts - 1 of all
  };
  std::vector<Unit> units;
  std::vector<LongRow> long_rows;
  int64_t parts = 0;

  explicit Plan(const CheckedList& list) {
    constexpr int64_t kMost = 256;
    const int64_t work = list.connections + list.rows;
    const int64_t count = std::clamp<int64_t>(work / 64, 1, kMost), each = work / count;
    units.reserve(static_cast<size_t>(count));
    int64_t start = 0;
    for (int64_t chunk = 1; chunk <= count; ++chunk) {
      int64_t low = start, high = list.rows;
      if (chunk == count) {
        low = high;
      } else {
        const auto early = [&](int64_t row) { return list.at(row) < each * chunk - row; };
        for (int64_t step = 1; step < high - low && early(low + step); step *= 2) low += step;
        while (low < high) {
          const int64_t middle = low + (high - low) / 2;
          if (early(middle))
            low = middle + 1;
          else
            high = middle;
        }
      }
      if (low == start) continue;
      const int64_t begin = list.at(low - 1), end = list.at(low);
      if (begin < 0 || end > list.length || end - begin <= std::max(2 * each, 2 * kSegment)) {
        units.push_back({start, low, 0, 0, -1});
      } else {
        if (low - 1 > start) units.push_back({start, low - 1, 0, 0, -1});
        long_rows.push_back({low - 1, parts, 0});
        for (int64_t from = begin; from < end; from += kSegment)
          units.push_back({low - 1, low, from, std::min(from + kSegment, end), parts++});
        long_rows.back().parts = parts - long_rows.back().first;
      }
      start = low;
    }
  }
};

// `ptr` of a list that has one row: a segment of a long one.
struct OneRow {
  int32_t narrow[2];
  int64_t wide[2];
  explicit OneRow(const Unit& unit)
      : narrow{static_cast<int32_t>(unit.begin), static_cast<int32_t>(unit.end)},
        wide{unit.begin, unit.end} {}
  const void* ptr(int type) const {
    return type == kInt32 ? static_cast<const void*>(narrow) : wide;
  }
};

// Whether the values are too many for the cache and are read in an order that the processor cannot
// foresee: a sample of the list says. (By column they are, by row they are once slots have been
// used again and again.)
inline bool scattered(const CheckedList& list, int64_t value_bytes) {
  constexpr int64_t kSample = 64;
  constexpr uint64_t kNear = 64;
  if (value_bytes <= cache_bytes() || list.connections <= kSample) return false;
  int64_t far = 0;
  for (int64_t k = 0; k < kSample; ++k) {
    const int64_t i = (list.connections - 1) / kSample * k;
    const uint64_t jump =
        static_cast<uint64_t>(list.slot(i + 1)) - static_cast<uint64_t>(list.slot(i));
    far += jump + kNear > 2 * kNear;
  }
  return 4 * far > kSample;
}

// Passes over the same units; if `ordered`, work(pass, unit) waits for work(pass - 1, unit). Every
// thread has a stretch of units to itself, pass after pass, and helps the others when it is
// through: so what neighbouring units read and write stays in one core's cache. The items of a
// stretch are taken in order, so whoever is waited for is at work already.
template <class Work>
void in_passes(int64_t passes, int64_t units, bool ordered, const Work& work) {
  const int64_t threads = std::min<int64_t>(units, torch::stable::get_num_threads());
  struct alignas(64) Next {
    std::atomic<int64_t> item{0};
  };
  std::vector<Next> next(static_cast<size_t>(threads));
  std::vector<std::atomic<int64_t>> done(static_cast<size_t>(ordered && passes > 1 ? units : 0));
  const auto stretch = [&](int64_t number) {
    const int64_t first = units * number / threads, count = units * (number + 1) / threads - first;
    auto& item = next[static_cast<size_t>(number)].item;
    for (int64_t i = item.fetch_add(1, std::memory_order_relaxed); i < passes * count;
         i = item.fetch_add(1, std::memory_order_relaxed)) {
      const int64_t pass = i / count, unit = first + i % count;
      if (done.empty()) {
        work(pass, unit);
        continue;
      }
      auto& mine = done[static_cast<size_t>(unit)];
      while (mine.load(std::memory_order_acquire) < pass) std::this_thread::yield();
      work(pass, unit);
      mine.store(pass + 1, std::memory_order_release);
    }
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t own = begin; own < end; ++own)
      for (int64_t k = 0; k < threads; ++k) stretch((own + k) % threads);
  });
}

}  // namespace rewire
