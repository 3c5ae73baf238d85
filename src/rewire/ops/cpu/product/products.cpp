// The products: y = x W^T + bias, the gradient with respect to the values, and both of backward's
// in one walk.
#include <cstring>

#include "product/panels.h"
#include "simd/target.h"

namespace rewire {
namespace {

// Values as a product takes them: their tensor checked, numbers of 16 bits widened.
struct Values {
  const int type;
  const Widened wide;
  Values(const Tensor& t, int x_type, const char* op)
      : type(checked(t, x_type, op)), wide(t, type) {}

 private:
  static int checked(const Tensor& t, int x_type, const char* op) {
    require_cpu(t, op);
    require(t.dim() == 1, op, "values must have one dimension");
    const int own = any_element_type(t, op);
    require_goes_with(own, x_type, op,
                      "values and x must have one dtype, or float32 and one of 16 bits");
    return own;
  }
};

const void* moved(const void* p, int64_t bytes) {
  return p == nullptr ? p : static_cast<const char*>(p) + bytes;
}

// `panels`: as panels.h says; y is row-major then, unless it is to keep its `runs` over the batch.
Tensor spmm(const Tensor& ptr, const Tensor& idx, const Tensor& slots, const Tensor& values_,
            const Tensor& x, const std::optional<Tensor>& bias_, bool panels, bool runs) {
  const char* op = "spmm";
  const CheckedList list(ptr, idx, slots, op);
  const int type = any_element_type(x, op);
  const Values values(values_, type, op);
  int bias_type = values.type;
  if (bias_.has_value()) {
    require_cpu(*bias_, op);
    require(bias_->dim() == 1 && bias_->numel() == list.rows, op,
            "bias must have one entry per row");
    bias_type = any_element_type(*bias_, op);
    require_goes_with(bias_type, type, op,
                      "bias and x must have one dtype, or float32 and one of 16 bits");
  }
  const Widened wide_bias(bias_.has_value() ? *bias_ : values_,
                          bias_.has_value() ? bias_type : kFloat32);
  const void* bias = bias_.has_value() ? wide_bias.data : nullptr;
  const bool far = scattered(list, values_.numel() * number_bytes(type));
  const auto kernel = product_kernels().spmm[type][list.type];
  if (panels) {
    const Matrix m = as_matrix(x, op, "x");
    Tensor y = empty_strided(x, {m.batch, list.rows}, {runs ? 1 : list.rows, runs ? m.batch : 1});
    if (m.batch == 0 || list.rows == 0) return y;
    std::optional<InOrder> ordered;
    if (far) ordered.emplace(list, type, values.wide.data, values_.numel(), 0, op);
    Panels(list, type, m, nullptr, &y, 0).run(op, [&](const Piece& p) {
      const SpmmArgs args{far ? ordered->list(p) : p.list,
                          far ? ordered->values() : values.wide.data,
                          moved(bias, p.first * number_bytes(type)),
                          p.x,
                          p.y,
                          far ? list.connections : values_.numel(),
                          m.features,
                          p.step,
                          p.step,
                          false};
      return kernel(args, p.part());
    });
    return y;
  }
  const Runs xs = as_runs(x, op, "x");
  Tensor y = empty_strided(x, {xs.batch, list.rows}, {1, xs.batch});
  if (xs.batch == 0 || list.rows == 0) return y;
  const Walk walk(list, xs.batch, xs.features, type);
  Sums sums(walk, type, bias, y);
  walk.run(op, sums.ordered(),
           [&](const Unit& unit, int64_t block, int64_t b0, int64_t width, const Tile* tile) {
             return sums(unit, block, b0, width, tile, [&](const Place& at, const Tile* part) {
               const SpmmArgs args{at.list,     values.wide.data,
                                   at.bias,     moved(xs.data, b0 * element_bytes(type)),
                                   at.y,        values_.numel(),
                                   xs.features, xs.step,
                                   at.y_step,   far};
               return kernel(args, {at.row0, at.row1, 0, width, part});
             });
           });
  return y;
}

// A fresh list of zeros for the gradient of `capacity` values.
Tensor zeros(int64_t capacity, int type) {
  Tensor out = empty_1d(capacity, type == kFloat64 ? ScalarType::Double : ScalarType::Float);
  char* bytes = static_cast<char*>(out.mutable_data_ptr());
  const int64_t size = capacity * number_bytes(type), piece = 1 << 18;
  want_large_pages(bytes, size);
  for_each_item((size + piece - 1) / piece, size < 4 * piece, [&](int64_t item) {
    std::memset(bytes + item * piece, 0, static_cast<size_t>(std::min(piece, size - item * piece)));
  });
  return out;
}

void require_match(const CheckedList& list, const Tensor& g, const Tensor& x, const char* op) {
  const Matrix gs = as_matrix(g, op, "g"), xs = as_matrix(x, op, "x");
  require(gs.features == list.rows, op, "g must have as many features as there are rows");
  require(gs.batch == xs.batch, op, "g and x must have the same batch size");
}

Tensor sddmm(const Tensor& ptr, const Tensor& idx, const Tensor& slots, int64_t capacity,
             const Tensor& g, const Tensor& x, bool panels) {
  const char* op = "sddmm";
  const CheckedList list(ptr, idx, slots, op);
  const int type = any_element_type(x, op);
  require(any_element_type(g, op) == type, op, "g and x must have one dtype");
  require(capacity >= 0, op, "capacity must not be negative");
  require_match(list, g, x, op);
  Tensor out = zeros(capacity, type);
  if (x.size(0) == 0 || list.rows == 0) return out;

  const auto kernel = product_kernels().sddmm[type][list.type];
  if (panels) {
    const Matrix xm = as_matrix(x, op, "x"), gm = as_matrix(g, op, "g");
    const Panels walk(list, type, xm, &gm, nullptr, groups_of(list, xm, gm));
    const InOrder ordered(list, type, nullptr, capacity, walk.groups(), op);
    walk.run(op, [&](const Piece& p) {
      const SddmmArgs args{ordered.list(p),  p.g,         p.x,    ordered.gradient(p.group),
                           list.connections, xm.features, p.step, p.step};
      return kernel(args, p.part(), p.add);
    });
    ordered.deliver(out.mutable_data_ptr(), op);
    return out;
  }
  const Runs xs = as_runs(x, op, "x"), gs = as_runs(g, op, "g");
  const SddmmArgs args{list.list, gs.data,     xs.data, out.mutable_data_ptr(),
                       capacity,  xs.features, gs.step, xs.step};
  // Each block of the batch adds to the sums of those before it.
  Walk(list, xs.batch, xs.features, type)
      .run(op, true,
           [&](const Unit& unit, int64_t block, int64_t b0, int64_t width, const Tile* tile) {
             if (unit.part < 0)
               return kernel(args, {unit.row0, unit.row1, b0, width, tile}, block > 0);
             const OneRow one(list, unit);
             SddmmArgs own = args;
             own.list = one.list;
             own.g = moved(args.g, unit.row0 * gs.step * element_bytes(type));
             return kernel(own, {0, 1, b0, width, nullptr}, block > 0);
           });
  return out;
}

std::tuple<Tensor, Tensor> spmm_sddmm(const Tensor& ptr, const Tensor& idx, const Tensor& slots,
                                      const Tensor& values_, const Tensor& g, const Tensor& x,
                                      bool panels) {
  const char* op = "spmm_sddmm";
  const CheckedList list(ptr, idx, slots, op);
  const int type = any_element_type(x, op);
  const Values values(values_, type, op);
  require(any_element_type(g, op) == type, op, "g and x must have one dtype");
  require_match(list, g, x, op);
  const int64_t capacity = values_.numel(), batch = x.size(0);
  const std::initializer_list<int64_t> strides = {panels ? list.rows : 1, panels ? 1 : batch};
  Tensor y = empty_strided(x, {batch, list.rows}, strides), out = zeros(capacity, type);
  if (batch == 0 || list.rows == 0) return {y, out};

  const auto kernel = product_kernels().fused[type][list.type];
  if (panels) {
    const Matrix xm = as_matrix(x, op, "x"), gm = as_matrix(g, op, "g");
    const Panels walk(list, type, xm, &gm, &y, groups_of(list, xm, gm));
    const InOrder ordered(list, type, values.wide.data, capacity, walk.groups(), op);
    walk.run(op, [&](const Piece& p) {
      const FusedArgs args{
          ordered.list(p),  ordered.values(), p.g,    p.x,    p.y,    ordered.gradient(p.group),
          list.connections, xm.features,      p.step, p.step, p.step, false};
      return kernel(args, p.part(), p.add);
    });
    ordered.deliver(out.mutable_data_ptr(), op);
    return {y, out};
  }
  const Runs xs = as_runs(x, op, "x"), gs = as_runs(g, op, "g");
  // Values and their gradients by column are read and written a line per feature at a time.
  const Walk walk(list, batch, xs.features, type, 2 * kLine);
  Sums sums(walk, type, nullptr, y);
  const bool far = scattered(list, 2 * capacity * number_bytes(type));
  const int64_t bytes = element_bytes(type);
  walk.run(op, true,
           [&](const Unit& unit, int64_t block, int64_t b0, int64_t width, const Tile* tile) {
             return sums(unit, block, b0, width, tile, [&](const Place& at, const Tile* part) {
               const FusedArgs args{at.list,
                                    values.wide.data,
                                    moved(gs.data, (at.first * gs.step + b0) * bytes),
                                    moved(xs.data, b0 * bytes),
                                    at.y,
                                    out.mutable_data_ptr(),
                                    capacity,
                                    xs.features,
                                    gs.step,
                                    xs.step,
                                    at.y_step,
                                    far};
               return kernel(args, {at.row0, at.row1, 0, width, part}, block > 0);
             });
           });
  return {y, out};
}

std::string instruction_set() { return target_name(); }

}  // namespace

REWIRE_OPERATOR(spmm,
                "(Tensor ptr, Tensor idx, Tensor slots, Tensor values, Tensor x, Tensor? bias, "
                "bool panels=False, bool runs=False) -> Tensor")
REWIRE_OPERATOR(sddmm,
                "(Tensor ptr, Tensor idx, Tensor slots, int capacity, Tensor g, Tensor x, "
                "bool panels=False) -> Tensor")
REWIRE_OPERATOR(spmm_sddmm,
                "(Tensor ptr, Tensor idx, Tensor slots, Tensor values, Tensor g, Tensor x, "
                "bool panels=False) -> (Tensor, Tensor)")
REWIRE_OPERATOR_ANYWHERE(instruction_set, "() -> str")

}  // namespace rewire
