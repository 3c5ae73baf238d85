// Sparse convolutions: the product, the gradient of its input and the gradient of its values.
//
// Activations come and go as (batch, channels, ...) in any strides. Each piece of work
// (conv/plan.h) packs the source rows that it needs into scratch of its own, batch innermost,
// computes one target row after the other with the kernels of conv/kernels-inl.h, and unpacks it at
// once, while it is in the cache. The topology is read once a call, with every entry checked, into
// a list of (offset, value) that nobody else can change.
#include "conv/pack.h"
#include "conv/stream.h"

namespace rewire {
namespace {

template <class F>
auto with_types(int type, int index, const F& f) {
  if (type == kFloat32) return index == kInt32 ? f(float{}, int32_t{}) : f(float{}, int64_t{});
  return index == kInt32 ? f(double{}, int32_t{}) : f(double{}, int64_t{});
}

// Scratch of one thread for one piece of work. Up to a bound it is kept for the next one: fresh
// pages cost as much as packing into them.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    constexpr int64_t kKept = 8 << 20, kAligned = 64;
    static thread_local Block kept;
    Block& block = bytes <= kKept ? kept : own_;
    if (block.size < bytes + kAligned) {
      block = {};  // the old block is freed before the new one is made
      block.memory.reset(new char[static_cast<size_t>(bytes + kAligned)]);
      block.size = bytes + kAligned;
    }
    start = block.memory.get();
    start += (kAligned - reinterpret_cast<uintptr_t>(start) % kAligned) % kAligned;
  }
  char* start;

 private:
  struct Block {
    std::unique_ptr<char[]> memory;
    int64_t size = 0;
  };
  Block own_;
};

// All rows of the target, from the source.
void run_sum(const ConvPlan& plan, const Stream& stream, int type, const View& source,
             const View& target, const void* bias) {
  const Axis &z = plan.axis[0], &y = plan.axis[1], &x = plan.axis[2];
  const int64_t element = source.element,
                y_at = ceil_div(plan.buffer_elements() * element, 64) * 64;
  const int64_t together =
      plan.widths == 1 ? target.together() : 1;  // rows that are unpacked at a time
  const int64_t bytes = y_at + together * plan.y_elements() * element;
  const auto kernel = conv_kernels().sum[type];
  const Numbers channels = multiples(plan.target_channels, x.phases * plan.y_step);
  const bool serial = static_cast<int64_t>(stream.offsets.size() + 1) * plan.batch * z.target *
                          y.count * x.count / (z.phases * y.phases) <
                      kSerialWork;
  for_each_item(plan.items(), serial, [&](int64_t number) {
    const Scratch memory(bytes);
    char* scratch = memory.start;
    const Item item(plan, number);
    Packer packer(plan, source, item, type, scratch);
    Numbers columns;  // in y, of the target positions from x0 on
    const int64_t x0 = std::max<int64_t>(item.col0 * x.phases - x.shift, 0);
    const int64_t x1 = std::min(item.col1 * x.phases - x.shift, x.target);
    for (int64_t t = x0; t < x1; ++t)
      columns.push_back((t + x.shift) % x.phases * plan.y_step +
                        ((t + x.shift) / x.phases - item.col0) * item.batch);
    repeat(columns, together, plan.y_elements());
    const int64_t first = std::max<int64_t>(item.row0 * y.phases - y.shift, 0);
    const int64_t end = std::min(item.row1 * y.phases - y.shift, y.target);
    int64_t waiting = 0;  // rows that are computed and not unpacked
    for (int64_t t = first; t < end; ++t) {
      const int64_t q = (t + y.shift) / y.phases, phase = (t + y.shift) % y.phases;
      ConvArgs args = stream.args(((item.z + z.shift) % z.phases * y.phases + phase) * plan.y_rows,
                                  plan, item.batch);
      args.bias = bias;
      args.x = packer.window(q);
      args.y = scratch + y_at + waiting * plan.y_elements() * element;
      kernel(args, 0, plan.y_rows, (item.col1 - item.col0) * item.batch);
      if (++waiting < together && t + 1 < end) continue;
      copy_rows(false, type, target, item, item.z, t + 1 - waiting, t + 1, x0, x1, 0,
                plan.target_channels, scratch + y_at, channels.data(), columns.data());
      waiting = 0;
    }
  });
}

void require_weight(const char* op, const Geometry& g, int64_t outputs, int64_t columns,
                    int64_t inputs) {
  require(inputs % g.groups == 0 && outputs % g.groups == 0, op,
          "groups must divide both numbers of channels");
  require(columns == inputs / g.groups * g.positions, op,
          "the weight does not fit the number of input channels");
}

Tensor packed_values(const Tensor& values, int type, const char* op, const std::string& as) {
  require_cpu(values, op);
  if (values.dim() != 1 || element_type(values, op) != type)
    fail(op, "values must have one dimension and the dtype of " + as);
  return packed(values);
}

Tensor conv(const Tensor& ptr, const Tensor& idx, const Tensor& slots, const Tensor& values_,
            const Tensor& x, const std::optional<Tensor>& bias_, int64_t columns, Numbers kernel,
            Numbers stride, Numbers padding, Numbers dilation, int64_t groups, bool channels_last) {
  const char* op = "conv";
  const Geometry g(op, kernel, stride, padding, dilation, groups);
  check_lists(op, ptr, idx, slots);
  const int type = element_type(x, op);
  const Tensor values = packed_values(values_, type, op, "x");
  const View source(x, g.rank, type, op, "x");
  const int64_t outputs = ptr.numel() - 1;
  require_weight(op, g, outputs, columns, source.channels);
  std::optional<Tensor> bias;
  if (bias_.has_value()) {
    require_cpu(*bias_, op);
    require(bias_->dim() == 1 && bias_->numel() == outputs && element_type(*bias_, op) == type, op,
            "bias must have one entry per row and the dtype of x");
    bias = packed(*bias_);
  }
  const Axis axes[3] = {g.forward(0, source.size[0]), g.forward(1, source.size[1]),
                        g.forward(2, source.size[2])};
  Numbers sizes;
  for (int64_t a = 3 - g.rank; a < 3; ++a) sizes.push_back(axes[a].target);
  Tensor y = make(x, source.batch, outputs, sizes, channels_last);
  if (y.numel() == 0) return y;
  const View target(y, g.rank, type, op, "y");
  const ConvPlan plan(op, axes, source.batch, source.channels, outputs, type,
                      2 * torch::stable::get_num_threads());
  const Stream stream = with_types(type, index_type(ptr, op), [&](auto t, auto i) {
    const Lists<decltype(i)> lists(op, ptr, idx, slots, columns, values.numel());
    return stream_by_row(g, plan, lists, static_cast<const decltype(t)*>(values.const_data_ptr()));
  });
  run_sum(plan, stream, type, source, target, bias ? bias->const_data_ptr() : nullptr);
  return y;
}

Tensor conv_input_gradient(const Tensor& ptr, const Tensor& idx, const Tensor& slots,
                           const Tensor& values_, const Tensor& gradient, Numbers input,
                           int64_t inputs, Numbers kernel, Numbers stride, Numbers padding,
                           Numbers dilation, int64_t groups, bool channels_last) {
  const char* op = "conv_input_gradient";
  const Geometry g(op, kernel, stride, padding, dilation, groups);
  check_lists(op, ptr, idx, slots);
  const int type = element_type(gradient, op);
  const Tensor values = packed_values(values_, type, op, "the gradient");
  const View source(gradient, g.rank, type, op, "the gradient");
  require_weight(op, g, source.channels, ptr.numel() - 1, inputs);
  require(static_cast<int64_t>(input.size()) == g.rank, op,
          "input must have one size per dimension of the kernel");
  Numbers sizes(static_cast<size_t>(3 - g.rank), 1);
  sizes.insert(sizes.end(), input.begin(), input.end());
  for (int a = 0; a < 3; ++a)
    require(sizes[a] >= 0 && source.size[a] == g.output(a, sizes[a]), op,
            "the gradient has another size than the output");
  Tensor result = make(gradient, source.batch, inputs, input, channels_last);
  if (result.numel() == 0) return result;
  const View target(result, g.rank, type, op, "the result");
  if (gradient.numel() == 0) {
    std::memset(target.data, 0, static_cast<size_t>(result.numel() * target.element));
    return result;
  }
  const Axis axes[3] = {g.backward(0, sizes[0]), g.backward(1, sizes[1]), g.backward(2, sizes[2])};
  const ConvPlan plan(op, axes, source.batch, source.channels, inputs, type,
                      2 * torch::stable::get_num_threads());
  const Stream stream = with_types(type, index_type(ptr, op), [&](auto t, auto i) {
    const Lists<decltype(i)> lists(op, ptr, idx, slots, source.channels, values.numel());
    return stream_by_col(g, plan, lists, static_cast<const decltype(t)*>(values.const_data_ptr()));
  });
  run_sum(plan, stream, type, source, target, nullptr);
  return result;
}

// Partial sums of every connection, one list per part. Parts and ranges of channels depend on the
// shapes and the topology only, so the result does not depend on the number of threads.
struct Parts {
  int64_t parts, ranges, connections;
  std::unique_ptr<char[]> sums;

  Parts(const ConvPlan& plan, int64_t rows, int64_t count, int64_t activations, int64_t element)
      : connections(count) {
    // As many parts as cost little memory beside the activations; with too few for all cores,
    // channels are shared out.
    parts = std::clamp<int64_t>(activations / (4 * std::max<int64_t>(count, 1)), 1,
                                std::min<int64_t>(plan.items(), 16));
    ranges = std::min(rows, ceil_div(8, parts));
    sums.reset(new char[static_cast<size_t>(parts * count * element)]());
  }
};

void run_dot(const ConvPlan& plan, const Stream& stream, const Parts& parts, int type,
             const View& source, const View& gradient) {
  const int64_t element = source.element,
                y_at = ceil_div(plan.buffer_elements() * element, 64) * 64;
  const int64_t together =
      plan.widths == 1 ? gradient.together() : 1;  // rows that are packed at a time
  const int64_t bytes = y_at + together * plan.y_elements() * element;
  const auto kernel = conv_kernels().dot[type];
  const Numbers channels = multiples(plan.target_channels, plan.y_step);
  const bool serial =
      parts.connections * plan.batch * gradient.size[0] * gradient.size[1] * gradient.size[2] <
      kSerialWork;
  const auto start = [&](int64_t range) {
    const auto at = std::lower_bound(stream.ptr.begin(), stream.ptr.end(),
                                     parts.connections * range / parts.ranges);
    return range == parts.ranges ? plan.target_channels
                                 : static_cast<int64_t>(at - stream.ptr.begin());
  };
  for_each_item(parts.parts * parts.ranges, serial, [&](int64_t number) {
    const Scratch memory(bytes);
    char* scratch = memory.start;
    const int64_t part = number / parts.ranges, range = number % parts.ranges;
    const int64_t channel0 = start(range), channel1 = start(range + 1);
    if (channel0 >= channel1) return;
    char* rows = scratch + y_at;
    for (int64_t i = plan.items() * part / parts.parts; i < plan.items() * (part + 1) / parts.parts;
         ++i) {
      const Item item(plan, i);
      Packer packer(plan, source, item, type, scratch);
      Numbers columns = multiples(item.col1 - item.col0, item.batch);
      repeat(columns, together, plan.y_elements());
      ConvArgs args = stream.args(0, plan, item.batch);
      args.sums = parts.sums.get() + part * parts.connections * element;
      for (int64_t q = item.row0; q < item.row1; ++q) {
        const int64_t ready = (q - item.row0) % together;
        if (ready == 0)
          copy_rows(true, type, gradient, item, item.z, q, std::min(q + together, item.row1),
                    item.col0, item.col1, channel0, channel1, rows, channels.data(),
                    columns.data());
        args.x = packer.window(q);
        args.y = rows + ready * plan.y_elements() * element;
        kernel(args, channel0, channel1, (item.col1 - item.col0) * item.batch);
      }
    }
  });
}

Tensor conv_value_gradient(const Tensor& ptr, const Tensor& idx, const Tensor& slots,
                           int64_t capacity, const Tensor& gradient_, const Tensor& x,
                           int64_t columns, Numbers kernel, Numbers stride, Numbers padding,
                           Numbers dilation, int64_t groups) {
  const char* op = "conv_value_gradient";
  const Geometry g(op, kernel, stride, padding, dilation, groups);
  check_lists(op, ptr, idx, slots);
  require(capacity >= 0, op, "capacity must not be negative");
  const int type = element_type(x, op);
  const View source(x, g.rank, type, op, "x"),
      gradient(gradient_, g.rank, type, op, "the gradient");
  const int64_t outputs = ptr.numel() - 1;
  require_weight(op, g, outputs, columns, source.channels);
  require(gradient.channels == outputs && gradient.batch == source.batch, op,
          "x and the gradient must agree in batch, the gradient and the weight in channels");
  const Axis axes[3] = {g.forward(0, source.size[0]), g.forward(1, source.size[1]),
                        g.forward(2, source.size[2])};
  for (int a = 0; a < 3; ++a)
    require(gradient.size[a] == axes[a].target, op,
            "the gradient has another size than the output");
  Tensor result = empty_strided(x, {capacity}, {1});
  char* out = static_cast<char*>(result.mutable_data_ptr());
  std::fill_n(out, capacity * source.element, char{0});
  if (gradient_.numel() == 0 || x.numel() == 0) return result;
  const ConvPlan plan(op, axes, source.batch, source.channels, outputs, type, 8);
  with_types(type, index_type(ptr, op), [&](auto t, auto i) {
    using T = decltype(t);
    const Lists<decltype(i)> lists(op, ptr, idx, slots, columns, capacity);
    const Stream stream = stream_by_row(g, plan, lists, static_cast<const T*>(nullptr));
    const int64_t connections = stream.ptr.back();
    const Parts parts(plan, outputs, connections, x.numel() + gradient_.numel(), source.element);
    run_dot(plan, stream, parts, type, source, gradient);
    const T* sums = reinterpret_cast<const T*>(parts.sums.get());
    for (int64_t k = 0; k < connections; ++k) {
      T sum = 0;
      for (int64_t part = 0; part < parts.parts; ++part) sum += sums[part * connections + k];
      reinterpret_cast<T*>(out)[lists.slot(k)] = sum;
    }
  });
  return result;
}

}  // namespace

REWIRE_OPERATOR(conv,
                "(Tensor ptr, Tensor idx, Tensor slots, Tensor values, Tensor x, Tensor? bias, int "
                "columns, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
                "bool channels_last) -> Tensor")
REWIRE_OPERATOR(conv_input_gradient,
                "(Tensor ptr, Tensor idx, Tensor slots, Tensor values, Tensor gradient, int[] "
                "input, int inputs, int[] kernel, int[] stride, int[] padding, int[] dilation, int "
                "groups, bool channels_last) -> Tensor")
REWIRE_OPERATOR(
    conv_value_gradient,
    "(Tensor ptr, Tensor idx, Tensor slots, int capacity, Tensor gradient, Tensor x, int columns, "
    "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor")

}  // namespace rewire
