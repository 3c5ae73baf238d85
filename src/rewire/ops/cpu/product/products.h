// What the products share: index lists as they are checked, work cut into units, blocks of the
// batch and tiles of the columns.
#pragma once

#include <memory>
#include <thread>

#include "product/kernels.h"
#include "runtime.h"

namespace rewire {

// A tile of columns pays if a row has at least this many connections in it, and a column is read
// this often.
constexpr int64_t kConnectionsPerTile = 12;
constexpr int64_t kLine = 64;  // bytes

// The tensors of one index list, checked as a whole; single entries are checked by the kernels as
// they read them.
struct CheckedList {
  Tensor ptr, idx, slots;
  int type;
  int64_t rows, connections;
  List list;

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
    list = {ptr.const_data_ptr(), idx.const_data_ptr(), slots.const_data_ptr(), idx.numel()};
    require(at(0) == 0, op, "ptr must start at 0");
    connections = at(rows);
    require(connections >= 0 && connections <= list.length, op,
            "ptr must end at the number of connections, which is at most the length of idx");
  }

  int64_t at(int64_t row) const {
    return type == kInt32 ? static_cast<const int32_t*>(list.ptr)[row]
                          : static_cast<const int64_t*>(list.ptr)[row];
  }
  int64_t slot(int64_t i) const {
    return type == kInt32 ? static_cast<const int32_t*>(list.slots)[i]
                          : static_cast<const int64_t*>(list.slots)[i];
  }
};

// What one thread does at a time: some rows, or a part of the connections of a row too long for one
// thread.
struct Unit {
  int64_t row0, row1;  // row1 == row0 + 1 for a part
  int64_t begin, end;  // the connections of a part
  int64_t row, part;   // of all long rows, which; of all parts, which; -1 for rows
};

// The rows, shared out in units of about equal work (connections, plus one for the row itself).
// Unit c starts at the first row before which c / count of the work lies: it depends on topology
// and batch only, never on the number of threads. Whatever ptr holds, units follow each other from
// row 0 to the last, because a search begins where the one before ended: so the kernels see, and
// check, every row. A row that spans several units is cut into parts.
struct Plan {
  static constexpr int64_t kMost = 256, kShortest = 512;
  std::vector<Unit> units;
  std::vector<int64_t> first_part;  // of each long row, and one more: parts are numbered through
  std::vector<int64_t> long_rows;

  Plan(const CheckedList& list, int64_t batch) {
    const int64_t work = list.connections + list.rows,
                  count = std::clamp<int64_t>(work / 64, 1, kMost);
    const int64_t each = work / count, longest = std::max(2 * each, 2 * kShortest);
    const bool serial = work * batch < kSerialWork;
    units.reserve(static_cast<size_t>(count));
    first_part.push_back(0);
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
      if (serial || begin < 0 || end > list.list.length || end - begin <= longest) {
        units.push_back({start, low, 0, 0, -1, -1});
      } else {
        if (low - 1 > start) units.push_back({start, low - 1, 0, 0, -1, -1});
        const int64_t parts =
            std::clamp<int64_t>((end - begin) / std::max(each, kShortest), 2, kMost);
        const int64_t row = static_cast<int64_t>(long_rows.size());
        for (int64_t part = 0; part < parts; ++part)
          units.push_back({low - 1, low, begin + (end - begin) * part / parts,
                           begin + (end - begin) * (part + 1) / parts, row,
                           first_part.back() + part});
        long_rows.push_back(low - 1);
        first_part.push_back(first_part.back() + parts);
      }
      start = low;
    }
  }
};

// `ptr` of a list that has one row: a part of a long one.
struct OneRow {
  int32_t narrow[2];
  int64_t wide[2];
  List list;
  OneRow(const CheckedList& all, const Unit& unit)
      : narrow{static_cast<int32_t>(unit.begin), static_cast<int32_t>(unit.end)},
        wide{unit.begin, unit.end},
        list{all.list} {
    list.ptr = all.type == kInt32 ? static_cast<const void*>(narrow) : wide;
  }
  OneRow(const OneRow&) = delete;
};

// Whether a block of the batch is wide enough for its kernels to know tiles.
inline bool is_tiled(int64_t width, int type) {
  return width * 2 > kVectorsPerBlock * product_kernels().lanes[type];
}

// How many tiles of columns a block of x (features, width) is read in, so that a tile stays in a
// core's own cache, with `beside` bytes that go with each feature: one, unless every tile is read
// often enough to be worth another pass over the rows.
inline int64_t tiles_of(const CheckedList& list, int64_t features, int64_t width, int64_t size,
                        int type, int64_t beside = 0) {
  if (!is_tiled(width, type)) return 1;
  const int64_t bytes = features * (width * size + beside),
                most = std::max<int64_t>(cache_bytes() / 3 * 2, 1);
  if (bytes <= cache_bytes() / 4 * 3) return 1;
  const int64_t tiles = std::min((bytes + most - 1) / most, features);
  return list.connections / tiles >= kConnectionsPerTile * std::max(list.rows, features / tiles)
             ? tiles
             : 1;
}

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
void in_passes(int64_t passes, int64_t units, bool serial, bool ordered, const Work& work) {
  const int64_t threads = serial ? 1 : std::min<int64_t>(units, torch::stable::get_num_threads());
  if (threads < 2) {
    for (int64_t pass = 0; pass < passes; ++pass)
      for (int64_t unit = 0; unit < units; ++unit) work(pass, unit);
    return;
  }
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

// The batch in blocks of at most kVectorsPerBlock vectors, as evenly as possible: so only the last
// block ends within a vector, and where there are several it has at least two vectors, the last of
// which can be moved back.
struct Blocks {
  int64_t batch, lanes, vectors, count;
  Blocks(int64_t batch_, int type, int64_t most = kVectorsPerBlock)
      : batch(batch_), lanes(product_kernels().lanes[type]) {
    vectors = (batch + lanes - 1) / lanes;
    count = (vectors + most - 1) / most;
  }
  int64_t start(int64_t block) const { return std::min(batch, vectors * block / count * lanes); }
  int64_t width(int64_t block) const { return start(block + 1) - start(block); }
  int64_t widest() const {
    return std::min(batch, count > 0 ? (vectors + count - 1) / count * lanes : 0);
  }
};

inline int64_t element_bytes(int type) { return type == kFloat64 ? 8 : is_narrow(type) ? 2 : 4; }
inline int64_t number_bytes(int type) {
  return type == kFloat64 ? 8 : 4;
}  // of a number computed with

// The first error that a worker thread met; the others stop early.
struct Failure {
  std::atomic<int> status{kFine};
  void note(int s) {
    if (s != kFine) status.store(s, std::memory_order_relaxed);
  }
  bool seen() const { return status.load(std::memory_order_relaxed) != kFine; }
};

// Memory whose contents do not matter yet.
struct Scratch {
  std::unique_ptr<char[]> bytes;
  explicit Scratch(int64_t size)
      : bytes(size > 0 ? new char[static_cast<size_t>(size)] : nullptr) {}
  char* data() const { return bytes.get(); }
};

// A 1-D tensor as the kernels compute with it: numbers of 16 bits as float32.
struct Widened {
  Tensor kept;
  Scratch scratch;
  const void* data;
  Widened(const Tensor& t, int type)
      : kept(packed(t)),
        scratch(is_narrow(type) ? 4 * kept.numel() : 0),
        data(kept.const_data_ptr()) {
    if (!is_narrow(type)) return;
    product_kernels().widen[type - kBFloat16](data, scratch.data(), kept.numel());
    data = scratch.data();
  }
};

// Values and bias may be wider than x of 16 bits: both are computed with as float32.
inline void require_goes_with(int own, int type, const char* op, const char* what) {
  require(own == type || (is_narrow(type) && own == kFloat32), op, what);
}

// A product as it is carried out: blocks of the batch are the outer loop, tiles the next, so that
// one tile of one block fits the cache.
struct Walk {
  const CheckedList& list;
  const int64_t features;
  const int type;
  const int64_t tiles;
  const Blocks blocks;
  const Plan plan;
  const Scratch next;

  Walk(const CheckedList& list_, int64_t batch, int64_t features_, int type_, int64_t beside = 0)
      : list(list_),
        features(features_),
        type(type_),
        tiles(tiles_of(list_, features_, Blocks(batch, type).widest(), element_bytes(type), type,
                       beside)),
        blocks(batch, type),
        plan(list_, batch),
        next(tiles > 1 ? list_.rows * 8 : 0) {}

  // work(unit, block, b0, width, tile or null) -> Status, for every unit; raises the first error.
  // `ordered`: blocks share memory, so that they have to wait for each other.
  template <class Work>
  void run(const char* op, bool ordered, const Work& work) const {
    Failure failure;
    const bool serial = (list.connections + list.rows) * blocks.batch < kSerialWork;
    const auto one = [&](int64_t pass, int64_t number) {
      if (failure.seen()) return;
      const int64_t block = pass / tiles, b0 = blocks.start(block);
      const Tile tile{reinterpret_cast<int64_t*>(next.data()),
                      features * (pass % tiles + 1) / tiles, pass % tiles == 0,
                      pass % tiles == tiles - 1};
      const Unit& unit = plan.units[static_cast<size_t>(number)];
      // A part of a long row is walked at once, and so are all rows of a narrow block beside wider
      // ones.
      const bool tiled = tiles > 1 && unit.part < 0 && is_tiled(blocks.width(block), type);
      if (!tiled && !tile.first) return;
      failure.note(work(unit, block, b0, blocks.width(block), tiled ? &tile : nullptr));
    };
    in_passes(blocks.count * tiles, static_cast<int64_t>(plan.units.size()), serial,
              ordered || tiles > 1, one);
    raise(failure.status, op);
  }
};

// Where a kernel finds some rows and puts their sums, for one block of the batch.
struct Place {
  List list;
  int64_t row0, row1;  // of the list
  int64_t first;       // row of the whole list that is its row 0
  const void* bias;    // of its row 0; null for parts
  void* y;             // of its row 0, at the block
  int64_t y_step;
};

// The sums of a product's rows: parts of long rows put together in their order, numbers of 16 bits
// summed up as float32.
class Sums {
 public:
  // bias (may be null) is float32 where y has 16 bits a number.
  Sums(const Walk& walk, int type, const void* bias, Tensor& y)
      : walk_(walk),
        type_(type),
        narrow_(is_narrow(type)),
        size_(number_bytes(type)),
        bias_(static_cast<const char*>(bias)),
        y_(static_cast<char*>(y.mutable_data_ptr())),
        wide_(narrow_ ? walk.list.rows * walk.blocks.widest() * size_ : 0),
        partial_(walk.plan.first_part.back() * walk.blocks.batch * size_),
        finished_(walk.plan.long_rows.size() * static_cast<size_t>(walk.blocks.count)) {}

  bool ordered() const { return narrow_; }

  // kernel(place, tile or null) -> Status.
  template <class Kernel>
  Status operator()(const Unit& unit, int64_t block, int64_t b0, int64_t width, const Tile* tile,
                    const Kernel& kernel) {
    if (unit.part >= 0) return part(unit, block, b0, width, kernel);
    const Status status =
        kernel(Place{walk_.list.list, unit.row0, unit.row1, 0, bias_, rows(b0), row_step()}, tile);
    if (!tile || tile->last) deliver(unit, b0, width);
    return status;
  }

 private:
  char* rows(int64_t b0) const { return narrow_ ? wide_.data() : y_ + b0 * size_; }
  int64_t row_step() const { return narrow_ ? walk_.blocks.widest() : walk_.blocks.batch; }

  template <class Kernel>
  Status part(const Unit& unit, int64_t block, int64_t b0, int64_t width, const Kernel& kernel) {
    const OneRow one(walk_.list, unit);
    const int64_t batch = walk_.blocks.batch;
    const Status status = kernel(Place{one.list, 0, 1, unit.row0, nullptr,
                                       partial_.data() + (unit.part * batch + b0) * size_, batch},
                                 nullptr);
    // Whoever is last adds all of the row.
    const int64_t first = walk_.plan.first_part[unit.row],
                  count = walk_.plan.first_part[unit.row + 1] - first;
    auto& finished = finished_[static_cast<size_t>(unit.row * walk_.blocks.count + block)];
    if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 < count) return status;
    const char* sums = partial_.data() + (first * batch + b0) * size_;
    const char* bias = bias_ ? bias_ + unit.row0 * size_ : nullptr;
    char* row = rows(b0) + unit.row0 * row_step() * size_;
    if (type_ == kFloat64)
      add_parts<double>(sums, count, bias, row, width);
    else
      add_parts<float>(sums, count, bias, row, width);
    deliver(unit, b0, width);
    return status;
  }

  // y[b] = bias + sum of the parts in their order, for one row and some columns of the batch.
  template <class T>
  void add_parts(const void* parts_, int64_t count, const void* bias, void* y_,
                 int64_t width) const {
    const T* parts = static_cast<const T*>(parts_);
    T* y = static_cast<T*>(y_);
    for (int64_t b = 0; b < width; ++b)
      y[b] = (bias ? *static_cast<const T*>(bias) : T(0)) + parts[b];
    for (int64_t part = 1; part < count; ++part)
      for (int64_t b = 0; b < width; ++b) y[b] += parts[part * walk_.blocks.batch + b];
  }

  // Rows that are complete, to where they belong.
  void deliver(const Unit& unit, int64_t b0, int64_t width) const {
    if (!narrow_) return;
    for (int64_t row = unit.row0; row < unit.row1; ++row)
      product_kernels().narrow[type_ - kBFloat16](wide_.data() + row * row_step() * 4,
                                                  y_ + (row * walk_.blocks.batch + b0) * 2, width);
  }

  const Walk& walk_;
  const int type_;
  const bool narrow_;
  const int64_t size_;
  const char* bias_;
  char* const y_;
  const Scratch wide_, partial_;
  std::vector<std::atomic<int64_t>> finished_;
};

}  // namespace rewire
