// The two products: y = x W^T + bias, and the gradient with respect to the values.
#include <cstring>
#include <memory>
#include <thread>

#include "runtime.h"

namespace rewire {
namespace {

// A tile of columns pays if a row has at least this many connections in it, and a column is read this often.
constexpr int64_t kConnectionsPerTile = 12;

// The tensors of one index list, checked as a whole; single entries are checked by the kernels as they read them.
struct CheckedList {
  Tensor ptr, idx, slots;
  int type;
  int64_t rows, connections;
  List list;

  CheckedList(const Tensor& p, const Tensor& i, const Tensor& s, const char* op)
      : ptr(packed(p)), idx(packed(i)), slots(packed(s)), type(index_type(p, op)) {
    require(p.is_cpu() && i.is_cpu() && s.is_cpu(), op, "every tensor must be on the CPU");
    require(p.dim() == 1 && i.dim() == 1 && s.dim() == 1, op, "ptr, idx and slots must have one dimension");
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
    return type == kInt32 ? static_cast<const int32_t*>(list.ptr)[row] : static_cast<const int64_t*>(list.ptr)[row];
  }
  int64_t slot(int64_t i) const {
    return type == kInt32 ? static_cast<const int32_t*>(list.slots)[i] : static_cast<const int64_t*>(list.slots)[i];
  }

};

// What one thread does at a time: some rows, or a part of the connections of a row too long for one thread.
struct Unit {
  int64_t row0, row1;    // row1 == row0 + 1 for a part
  int64_t begin, end;    // the connections of a part
  int64_t row, part;     // of all long rows, which; of all parts, which; -1 for rows
};

// The rows, shared out in units of about equal work (connections, plus one for the row itself). Unit c starts at the
// first row before which c / count of the work lies: it depends on topology and batch only, never on the number of
// threads. Whatever ptr holds, units follow each other from row 0 to the last, because a search begins where the one
// before ended: so the kernels see, and check, every row. A row that spans several units is cut into parts.
struct Plan {
  static constexpr int64_t kMost = 256, kShortest = 512;
  std::vector<Unit> units;
  std::vector<int64_t> first_part;  // of each long row, and one more: parts are numbered through
  std::vector<int64_t> long_rows;

  Plan(const CheckedList& list, int64_t batch) {
    const int64_t work = list.connections + list.rows, count = std::clamp<int64_t>(work / 64, 1, kMost);
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
        const int64_t parts = std::clamp<int64_t>((end - begin) / std::max(each, kShortest), 2, kMost);
        const int64_t row = static_cast<int64_t>(long_rows.size());
        for (int64_t part = 0; part < parts; ++part)
          units.push_back({low - 1, low, begin + (end - begin) * part / parts,
                           begin + (end - begin) * (part + 1) / parts, row, first_part.back() + part});
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

// How many tiles of columns a block of x (features, width) is read in, so that a tile stays in a core's own cache:
// one, unless every tile is read often enough to be worth another pass over the rows.
int64_t tiles_of(const CheckedList& list, int64_t features, int64_t width, int64_t size, int type) {
  if (width * 2 <= kVectorsPerBlock * kernels().lanes[type]) return 1;
  const int64_t bytes = features * width * size, most = std::max<int64_t>(cache_bytes() / 3 * 2, 1);
  if (bytes <= cache_bytes() / 4 * 3) return 1;
  const int64_t tiles = std::min((bytes + most - 1) / most, features);
  return list.connections / tiles >= kConnectionsPerTile * std::max(list.rows, features / tiles) ? tiles : 1;
}

// Whether the values are too many for the cache and are read in an order that the processor cannot foresee: a sample of
// the list says. (By column they are, by row they are once slots have been used again and again.)
bool scattered(const CheckedList& list, int64_t value_bytes) {
  constexpr int64_t kSample = 64;
  constexpr uint64_t kNear = 64;
  if (value_bytes <= cache_bytes() || list.connections <= kSample) return false;
  int64_t far = 0;
  for (int64_t k = 0; k < kSample; ++k) {
    const int64_t i = (list.connections - 1) / kSample * k;
    const uint64_t jump = static_cast<uint64_t>(list.slot(i + 1)) - static_cast<uint64_t>(list.slot(i));
    far += jump + kNear > 2 * kNear;
  }
  return 4 * far > kSample;
}

// Passes over the same units, one after the other for every unit: work(pass, unit) waits for work(pass - 1, unit) only.
// Items are taken in order, so whoever it waits for is at work already.
template <class Work>
void in_passes(int64_t passes, int64_t units, bool serial, const Work& work) {
  if (passes == 1) return for_each_item(units, serial, [&](int64_t unit) { work(0, unit); });
  std::vector<std::atomic<int64_t>> done(static_cast<size_t>(units));
  for_each_item(passes * units, serial, [&](int64_t item) {
    const int64_t pass = item / units, unit = item % units;
    auto& mine = done[static_cast<size_t>(unit)];
    while (mine.load(std::memory_order_acquire) < pass) std::this_thread::yield();
    work(pass, unit);
    mine.store(pass + 1, std::memory_order_release);
  });
}

void raise(int status, const char* op) {
  switch (status) {
    case kFine: return;
    case kBadPointer: fail(op, "ptr must never fall and stay within the length of idx");
    case kBadIndex: fail(op, "an entry of idx is outside the features of x");
    default: fail(op, "an entry of slots is outside the capacity");
  }
}

// The batch in blocks of at most kVectorsPerBlock vectors, as evenly as possible: so only the last block ends
// within a vector, and where there are several it has at least two vectors, the last of which can be moved back.
struct Blocks {
  int64_t batch, lanes, vectors, count;
  Blocks(int64_t batch_, int type) : batch(batch_), lanes(kernels().lanes[type]) {
    vectors = (batch + lanes - 1) / lanes;
    count = (vectors + kVectorsPerBlock - 1) / kVectorsPerBlock;
  }
  int64_t start(int64_t block) const { return std::min(batch, vectors * block / count * lanes); }
  int64_t widest() const { return std::min(batch, kVectorsPerBlock * lanes); }
};

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
  explicit Scratch(int64_t size) : bytes(size > 0 ? new char[static_cast<size_t>(size)] : nullptr) {}
  char* data() const { return bytes.get(); }
};

// A 1-D tensor as the kernels compute with it: numbers of 16 bits as float32.
struct Widened {
  Tensor kept;
  Scratch scratch;
  const void* data;
  Widened(const Tensor& t, int type)
      : kept(packed(t)), scratch(is_narrow(type) ? 4 * kept.numel() : 0), data(kept.const_data_ptr()) {
    if (!is_narrow(type)) return;
    kernels().widen[type - kBFloat16](data, scratch.data(), kept.numel());
    data = scratch.data();
  }
};

// Values and bias may be wider than x of 16 bits: both are computed with as float32.
void require_goes_with(int own, int type, const char* op, const char* what) {
  require(own == type || (is_narrow(type) && own == kFloat32), op, what);
}

// y[b] = bias + sum of the parts in their order, for one row and some columns of the batch.
template <class T>
void add_parts(const T* parts, int64_t count, int64_t step, const T* bias, T* y, int64_t width) {
  for (int64_t b = 0; b < width; ++b) y[b] = (bias ? *bias : T(0)) + parts[b];
  for (int64_t part = 1; part < count; ++part)
    for (int64_t b = 0; b < width; ++b) y[b] += parts[part * step + b];
}

Tensor spmm(const Tensor& ptr, const Tensor& idx, const Tensor& slots, const Tensor& values_, const Tensor& x,
            const std::optional<Tensor>& bias_) {
  const char* op = "spmm";
  const CheckedList list(ptr, idx, slots, op);
  require_cpu(values_, op);
  require(values_.dim() == 1, op, "values must have one dimension");
  const int type = any_element_type(x, op), values_type = any_element_type(values_, op);
  require_goes_with(values_type, type, op, "values and x must have one dtype, or float32 and one of 16 bits");
  int bias_type = values_type;
  if (bias_.has_value()) {
    require_cpu(*bias_, op);
    require(bias_->dim() == 1 && bias_->numel() == list.rows, op, "bias must have one entry per row");
    bias_type = any_element_type(*bias_, op);
    require_goes_with(bias_type, type, op, "bias and x must have one dtype, or float32 and one of 16 bits");
  }
  const Runs runs = as_runs(x, op, "x");
  const int64_t batch = runs.batch;
  Tensor y = empty_strided(x, {batch, list.rows}, {1, batch});
  if (batch == 0 || list.rows == 0) return y;

  const bool narrow = is_narrow(type);
  const int64_t size = type == kFloat64 ? 8 : 4;  // of a number computed with
  const Widened values(values_, values_type);
  const Widened bias(bias_.has_value() ? *bias_ : values_, bias_.has_value() ? bias_type : kFloat32);
  const Blocks blocks(batch, type);
  const Plan plan(list, batch);
  const int64_t parts = plan.first_part.back(), rows = static_cast<int64_t>(plan.long_rows.size());
  const int64_t tiles = tiles_of(list, runs.features, blocks.widest(), narrow ? 2 : size, type);
  // Where y has 16 bits a number, a block of the batch is summed up in float32 first.
  const Scratch wide(narrow ? list.rows * blocks.widest() * size : 0), partial(parts * batch * size);
  const Scratch next(tiles > 1 ? list.rows * 8 : 0);
  std::vector<std::atomic<int64_t>> finished(static_cast<size_t>(rows * blocks.count));
  const SpmmArgs args{list.list,
                      values.data,
                      bias_.has_value() ? bias.data : nullptr,
                      runs.data,
                      narrow ? wide.data() : y.mutable_data_ptr(),
                      values_.numel(),
                      runs.features,
                      runs.step,
                      narrow ? blocks.widest() : batch,
                      scattered(list, values_.numel() * size)};
  char* const result = static_cast<char*>(y.mutable_data_ptr());
  const auto kernel = kernels().spmm[type][list.type];

  // Rows that are complete, to where they belong.
  const auto deliver = [&](int64_t row0, int64_t row1, int64_t b0, int64_t width) {
    if (!narrow) return;
    for (int64_t row = row0; row < row1; ++row)
      kernels().narrow[type - kBFloat16](wide.data() + row * blocks.widest() * 4, result + (row * batch + b0) * 2, width);
  };
  const auto part_of_row = [&](const Unit& unit, int64_t block, int64_t b0, int64_t width) -> Status {
    const OneRow one(list, unit);
    SpmmArgs own = args;
    own.list = one.list;
    own.bias = nullptr;
    own.y = partial.data() + unit.part * batch * size;
    own.y_step = batch;
    const Status status = kernel(own, {0, 1, b0, width, nullptr});
    // Whoever is last adds all of the row.
    const int64_t first = plan.first_part[unit.row], count = plan.first_part[unit.row + 1] - first;
    if (finished[static_cast<size_t>(unit.row * blocks.count + block)].fetch_add(1, std::memory_order_acq_rel) + 1 < count)
      return status;
    const char* sums = partial.data() + (first * batch + b0) * size;
    const int64_t place = unit.row0 * args.y_step + (narrow ? 0 : b0);
    if (type == kFloat64)
      add_parts(reinterpret_cast<const double*>(sums), count, batch,
                args.bias ? static_cast<const double*>(args.bias) + unit.row0 : nullptr,
                static_cast<double*>(args.y) + place, width);
    else
      add_parts(reinterpret_cast<const float*>(sums), count, batch,
                args.bias ? static_cast<const float*>(args.bias) + unit.row0 : nullptr,
                static_cast<float*>(args.y) + place, width);
    deliver(unit.row0, unit.row1, b0, width);
    return status;
  };

  Failure failure;
  // Blocks are the outer loop, tiles the next: one tile of one block fits the cache.
  const bool serial = (list.connections + list.rows) * batch < kSerialWork;
  const auto work = [&](int64_t pass, int64_t number) {
    if (failure.seen()) return;
    const Unit& unit = plan.units[static_cast<size_t>(number)];
    const int64_t block = pass / tiles, b0 = blocks.start(block), width = blocks.start(block + 1) - b0;
    Tile tile{reinterpret_cast<int64_t*>(next.data()), 0, pass % tiles == 0, pass % tiles == tiles - 1};
    if (unit.part >= 0) {
      if (tile.first) failure.note(part_of_row(unit, block, b0, width));
      return;
    }
    tile.end = runs.features * (pass % tiles + 1) / tiles;
    SpmmArgs own = args;
    if (narrow) own.x = static_cast<const char*>(args.x) + b0 * 2;
    failure.note(kernel(own, {unit.row0, unit.row1, narrow ? 0 : b0, width, tiles > 1 ? &tile : nullptr}));
    if (tile.last) deliver(unit.row0, unit.row1, b0, width);
  };
  const int64_t units = static_cast<int64_t>(plan.units.size());
  // Without scratch to share, blocks need not wait for each other.
  if (tiles == 1 && !narrow)
    for_each_item(blocks.count * units, serial, [&](int64_t item) { work(item / units, item % units); });
  else
    in_passes(blocks.count * tiles, units, serial, work);
  raise(failure.status, op);
  return y;
}

Tensor sddmm(const Tensor& ptr, const Tensor& idx, const Tensor& slots, int64_t capacity, const Tensor& g,
             const Tensor& x) {
  const char* op = "sddmm";
  const CheckedList list(ptr, idx, slots, op);
  const int type = any_element_type(x, op);
  require(any_element_type(g, op) == type, op, "g and x must have one dtype");
  require(capacity >= 0, op, "capacity must not be negative");
  const Runs xs = as_runs(x, op, "x"), gs = as_runs(g, op, "g");
  require(gs.features == list.rows, op, "g must have as many features as there are rows");
  require(gs.batch == xs.batch, op, "g and x must have the same batch size");

  const int64_t number = type == kFloat64 ? 8 : 4;
  Tensor out = empty_1d(capacity, type == kFloat64 ? ScalarType::Double : ScalarType::Float);
  char* bytes = static_cast<char*>(out.mutable_data_ptr());
  const int64_t size = capacity * number, piece = 1 << 18;
  for_each_item((size + piece - 1) / piece, size < 4 * piece, [&](int64_t item) {
    std::memset(bytes + item * piece, 0, static_cast<size_t>(std::min(piece, size - item * piece)));
  });
  if (xs.batch == 0 || list.rows == 0) return out;

  const SddmmArgs args{list.list, gs.data, xs.data, bytes, capacity, xs.features, gs.step, xs.step};
  // Each block of the batch adds to the sums of those before it.
  const Blocks blocks(xs.batch, type);
  const Plan plan(list, xs.batch);
  const int64_t element = is_narrow(type) ? 2 : number;
  const int64_t tiles = tiles_of(list, xs.features, blocks.widest(), element, type);
  const Scratch next(tiles > 1 ? list.rows * 8 : 0);
  const auto kernel = kernels().sddmm[type][list.type];
  Failure failure;
  const bool serial = (list.connections + list.rows) * xs.batch < kSerialWork;
  in_passes(blocks.count * tiles, static_cast<int64_t>(plan.units.size()), serial, [&](int64_t pass, int64_t number) {
    if (failure.seen()) return;
    const Unit& unit = plan.units[static_cast<size_t>(number)];
    const int64_t block = pass / tiles, b0 = blocks.start(block), width = blocks.start(block + 1) - b0;
    Tile tile{reinterpret_cast<int64_t*>(next.data()), xs.features * (pass % tiles + 1) / tiles, pass % tiles == 0,
              pass % tiles == tiles - 1};
    if (unit.part < 0) {
      failure.note(kernel(args, {unit.row0, unit.row1, b0, width, tiles > 1 ? &tile : nullptr}, block > 0));
    } else if (tile.first) {
      const OneRow one(list, unit);
      SddmmArgs own = args;
      own.list = one.list;
      own.g = static_cast<const char*>(args.g) + unit.row0 * gs.step * element;
      failure.note(kernel(own, {0, 1, b0, width, nullptr}, block > 0));
    }
  });
  raise(failure.status, op);
  return out;
}

std::string instruction_set() { return kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rewire, m) {
  m.def("spmm(Tensor ptr, Tensor idx, Tensor slots, Tensor values, Tensor x, Tensor? bias) -> Tensor");
  m.def("sddmm(Tensor ptr, Tensor idx, Tensor slots, int capacity, Tensor g, Tensor x) -> Tensor");
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(rewire, CPU, m) {
  m.impl("spmm", TORCH_BOX(&spmm));
  m.impl("sddmm", TORCH_BOX(&sddmm));
}

STABLE_TORCH_LIBRARY_IMPL(rewire, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

}  // namespace rewire
