// y = x W^T + bias for a frozen weight: no slots, no index by column, no gradients.
#include <cstdlib>
#include <new>

#include "frozen/kernels.h"
#include "runtime.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rewire {
namespace {

constexpr const char* kOp = "frozen_linear";

// Connections of one item of work: few enough that what `check` has read is still in the cache for
// the product.
constexpr int64_t kItem = 4096;
// Work below this many connections (times the batch, where vectors are full) is done by the caller.
constexpr int64_t kAlone = 1 << 15;
// Floats of a panel that a thread keeps for its next product: those of a large page.
constexpr int64_t kKept = 1 << 19;

const float* row_numbers(const std::optional<Tensor>& t, int64_t rows, const char* name) {
  if (!t.has_value()) return nullptr;
  require_cpu(*t, kOp);
  if (t->dim() != 1 || t->numel() != rows || t->scalar_type() != ScalarType::Float ||
      !t->is_contiguous())
    fail(kOp, std::string(name) + " must be contiguous float32 with one entry per row");
  return static_cast<const float*>(t->const_data_ptr());
}

void require_list(const Tensor& t, const char* name) {
  require_cpu(t, kOp);
  if (t.dim() != 1 || !t.is_contiguous())
    fail(kOp, std::string(name) + " must be contiguous with one dimension");
}

struct Weight {
  FrozenWeight w;
  int64_t rows;
  int value, col;
};

Weight weight_of(const Tensor& ptr, const Tensor& cols, const std::optional<Tensor>& values,
                 const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                 int64_t features) {
  require_list(ptr, "ptr");
  require_list(cols, "cols");
  Weight found{};
  found.w.wide = index_type(ptr, kOp) == kInt64;
  require(ptr.numel() > 0, kOp, "ptr must not be empty");
  if (cols.scalar_type() == ScalarType::UInt16)
    found.col = 0;
  else
    require(cols.scalar_type() == ScalarType::Int, kOp, "cols must be uint16 or int32"),
        found.col = 1;
  found.rows = ptr.numel() - 1;
  if (!values.has_value()) {
    found.value = kFrozenTernary;
    require(found.rows % 2 == 0, kOp,
            "ptr must have two entries per row and one more where there are no values");
    found.rows /= 2;
  } else {
    require_list(*values, "values");
    require(values->numel() == cols.numel(), kOp, "values and cols must have the same length");
    if (values->scalar_type() == ScalarType::Float)
      found.value = kFrozenFloat;
    else
      require(values->scalar_type() == ScalarType::Char, kOp, "values must be float32 or int8"),
          found.value = kFrozenInt8;
    found.w.values = values->const_data_ptr();
  }
  require(scale.has_value() == (found.value != kFrozenFloat), kOp,
          "scale goes with int8 values, or without values, and not with float32");
  found.w.scale = row_numbers(scale, found.rows, "scale");
  found.w.bias = row_numbers(bias, found.rows, "bias");
  found.w.ptr = ptr.const_data_ptr();
  found.w.cols = cols.const_data_ptr();
  found.w.connections = cols.numel();
  found.w.features = features;
  return found;
}

// A panel's memory. Fresh memory of this size costs more than filling it, so threads keep theirs,
// in a large page: of 128 small ones, which are read in any order, a processor cannot remember
// where all of them are.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    if (floats > kKept) {
      own_.resize(static_cast<size_t>(floats));
      data = own_.data();
      return;
    }
    static thread_local Kept kept;
    if (kept.data == nullptr) kept.data = allocate();
    data = kept.data;
  }
  float* data;

 private:
  struct Kept {
    float* data = nullptr;
    ~Kept() { std::free(data); }
  };

  static float* allocate() {
    constexpr size_t kBytes = static_cast<size_t>(kKept) * sizeof(float);
    void* memory = nullptr;
    if (posix_memalign(&memory, kBytes, kBytes) != 0) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(memory, kBytes, MADV_HUGEPAGE);
#endif
    return static_cast<float*>(memory);
  }

  std::vector<float> own_;
};

class Product {
 public:
  Product(const Weight& weight, const Tensor& x, Tensor& y)
      : weight_(weight),
        x_(static_cast<const float*>(x.const_data_ptr())),
        y_(static_cast<float*>(y.mutable_data_ptr())),
        batch_(x.size(0)),
        row_step_(x.stride(0)),
        col_step_(x.stride(1)) {
    const int64_t connections = std::max<int64_t>(1, weight.w.connections);
    item_rows_ = std::max<int64_t>(1, weight.rows * kItem / connections);
    if (item_rows_ > 16) item_rows_ = item_rows_ / 16 * 16;
    items_ = (weight.rows + item_rows_ - 1) / item_rows_;
  }

  void run() {
    const int64_t work = (weight_.w.connections + weight_.rows) * ((batch_ + 15) / 16);
    const bool alone = work < kAlone;
    int64_t most = 0;
    while (most + 1 < table_.panels &&
           weight_.w.features * table_.panel[most + 1].width * 4 <= cache_bytes() * 3 / 4)
      ++most;
    const int64_t widest = std::max(table_.panel[most].width, 16);
    const int64_t panels = (batch_ + widest - 1) / widest;
    if (!alone && panels >= torch::stable::get_num_threads()) {
      for_each_item(panels, false, [&](int64_t i) {
        panel(i * widest, std::min(widest, batch_ - i * widest), true);
      });
    } else {
      for (int64_t i = 0; i < panels; ++i)
        panel(i * widest, std::min(widest, batch_ - i * widest), alone);
    }
    switch (status_.load()) {
      case kBadPointer:
        fail(kOp, "ptr does not ascend from 0 to the number of connections");
      case kBadIndex:
        fail(kOp, "cols holds a column that x does not have");
      default:
        break;
    }
  }

 private:
  // Rows [b0, b0 + width) of x, by this thread alone or by all of them.
  void panel(int64_t b0, int64_t width, bool alone) {
    const float* x = x_ + b0 * row_step_;
    const int64_t features = weight_.w.features;
    FrozenPart part{x, y_ + b0 * weight_.rows, width, weight_.rows};
    if (width == 1 && (col_step_ == 1 || features == 1)) {
      rows(table_.one[weight_.col][weight_.value], part, alone);
      return;
    }
    int at = 0;
    while (at + 1 < table_.panels && table_.panel[at].width < width) ++at;
    const FrozenPanel& kernel = table_.panel[at];
    const Scratch scratch(features * kernel.width);
    const FrozenFill fill{x, scratch.data, width, row_step_, col_step_};
    const int64_t piece = std::max<int64_t>(16, 16384 / kernel.width);
    for_each_item((features + piece - 1) / piece, alone, [&](int64_t i) {
      kernel.fill(fill, i * piece, std::min(features, (i + 1) * piece));
    });
    part.x = scratch.data;
    rows(kernel.rows[weight_.col][weight_.value], part, alone);
  }

  void rows(FrozenRows kernel, const FrozenPart& part, bool alone) {
    for_each_item(items_, alone, [&](int64_t i) {
      const int64_t row0 = i * item_rows_;
      const Status status =
          kernel(weight_.w, part, row0, std::min(weight_.rows, row0 + item_rows_));
      if (status != kFine) status_.store(status);
    });
  }

  const FrozenKernels& table_ = frozen_kernels();
  const Weight& weight_;
  const float* x_;
  float* y_;
  int64_t batch_, row_step_, col_step_, item_rows_, items_;
  std::atomic<int> status_{kFine};
};

Tensor frozen_linear(const Tensor& ptr, const Tensor& cols, const std::optional<Tensor>& values,
                     const std::optional<Tensor>& scale, const Tensor& x,
                     const std::optional<Tensor>& bias) {
  require_cpu(x, kOp);
  require(x.dim() == 2 && x.scalar_type() == ScalarType::Float, kOp,
          "x must be float32 with two dimensions, batch and features");
  const Weight weight = weight_of(ptr, cols, values, scale, bias, x.size(1));
  Tensor y = empty_strided(x, {x.size(0), weight.rows}, {weight.rows, 1});
  if (x.size(0) > 0 && weight.rows > 0) Product(weight, x, y).run();
  return y;
}

}  // namespace

REWIRE_OPERATOR(
    frozen_linear,
    "(Tensor ptr, Tensor cols, Tensor? values, Tensor? scale, Tensor x, Tensor? bias) -> Tensor")

}  // namespace rewire
