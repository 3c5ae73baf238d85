// The two products: y = x W^T + bias, and the gradient with respect to the values.
#include <cstring>

#include "runtime.h"

namespace rewire {
namespace {

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

};

// The rows, shared out in chunks of about equal work (connections, plus one for the row itself). Chunk c starts at the
// first row before which c / count of the work lies: it depends on the topology only. Whatever ptr holds, chunks follow
// each other from row 0 to the last, because a search begins where the one before ended: so the kernels see, and
// check, every row.
struct Chunks {
  static constexpr int64_t kMost = 256;
  int64_t count, start[kMost + 1];

  explicit Chunks(const CheckedList& list) : count(std::clamp<int64_t>((list.connections + list.rows) / 64, 1, kMost)) {
    const int64_t each = (list.connections + list.rows) / count;
    start[0] = 0;
    for (int64_t chunk = 1; chunk < count; ++chunk) {
      const auto early = [&](int64_t row) { return list.at(row) < each * chunk - row; };
      int64_t low = start[chunk - 1], high = list.rows;
      for (int64_t step = 1; step < high - low && early(low + step); step *= 2) low += step;
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (early(middle))
          low = middle + 1;
        else
          high = middle;
      }
      start[chunk] = low;
    }
    start[count] = list.rows;
  }
};

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
};

// The first error that a worker thread met; the others stop early.
struct Failure {
  std::atomic<int> status{kFine};
  void note(int s) {
    if (s != kFine) status.store(s, std::memory_order_relaxed);
  }
  bool seen() const { return status.load(std::memory_order_relaxed) != kFine; }
};

Tensor spmm(const Tensor& ptr, const Tensor& idx, const Tensor& slots, const Tensor& values_, const Tensor& x,
            const std::optional<Tensor>& bias_) {
  const char* op = "spmm";
  const CheckedList list(ptr, idx, slots, op);
  require_cpu(values_, op);
  require(values_.dim() == 1, op, "values must have one dimension");
  const int type = element_type(x, op);
  require(element_type(values_, op) == type, op, "values and x must have one dtype");
  const Tensor values = packed(values_);
  std::optional<Tensor> bias;
  if (bias_.has_value()) {
    require_cpu(*bias_, op);
    require(bias_->dim() == 1 && bias_->numel() == list.rows, op, "bias must have one entry per row");
    require(element_type(*bias_, op) == type, op, "bias and x must have one dtype");
    bias = packed(*bias_);
  }
  const Runs runs = as_runs(x, op, "x");
  const int64_t batch = runs.batch;
  Tensor y = empty_strided(x, {batch, list.rows}, {1, batch});
  if (batch == 0 || list.rows == 0) return y;

  const SpmmArgs args{list.list, values.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr, runs.data,
                      y.mutable_data_ptr(), values.numel(), runs.features, runs.step, batch};
  const Blocks blocks(batch, type);
  const Chunks chunks(list);
  const auto kernel = kernels().spmm[type][list.type];
  Failure failure;
  // Blocks are the outer loop: one block of all features fits the cache better.
  for_each_item(blocks.count * chunks.count, (list.connections + list.rows) * batch < kSerialWork, [&](int64_t item) {
    if (failure.seen()) return;
    const int64_t block = item / chunks.count, chunk = item % chunks.count, b0 = blocks.start(block);
    failure.note(kernel(args, chunks.start[chunk], chunks.start[chunk + 1], b0, blocks.start(block + 1) - b0));
  });
  raise(failure.status, op);
  return y;
}

Tensor sddmm(const Tensor& ptr, const Tensor& idx, const Tensor& slots, int64_t capacity, const Tensor& g,
             const Tensor& x) {
  const char* op = "sddmm";
  const CheckedList list(ptr, idx, slots, op);
  const int type = element_type(x, op);
  require(element_type(g, op) == type, op, "g and x must have one dtype");
  require(capacity >= 0, op, "capacity must not be negative");
  const Runs xs = as_runs(x, op, "x"), gs = as_runs(g, op, "g");
  require(gs.features == list.rows, op, "g must have as many features as there are rows");
  require(gs.batch == xs.batch, op, "g and x must have the same batch size");

  Tensor out = empty_strided(x, {capacity}, {1});
  char* bytes = static_cast<char*>(out.mutable_data_ptr());
  const int64_t size = capacity * (type == kFloat32 ? 4 : 8), piece = 1 << 18;
  for_each_item((size + piece - 1) / piece, size < 4 * piece, [&](int64_t item) {
    std::memset(bytes + item * piece, 0, static_cast<size_t>(std::min(piece, size - item * piece)));
  });
  if (xs.batch == 0 || list.rows == 0) return out;

  const SddmmArgs args{list.list, gs.data, xs.data, bytes, capacity, xs.features, gs.step, xs.step};
  // The same blocks of the batch as in spmm, but one after the other: each adds to the sums of those before it.
  const Blocks blocks(xs.batch, type);
  const Chunks chunks(list);
  const auto kernel = kernels().sddmm[type][list.type];
  Failure failure;
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t b0 = blocks.start(block), width = blocks.start(block + 1) - b0;
    for_each_item(chunks.count, (list.connections + list.rows) * width < kSerialWork, [&](int64_t chunk) {
      if (failure.seen()) return;
      failure.note(kernel(args, chunks.start[chunk], chunks.start[chunk + 1], b0, width, block > 0));
    });
  }
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
