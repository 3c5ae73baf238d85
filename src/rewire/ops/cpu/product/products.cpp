// The products: y = x W^T + bias, the gradient of the values, and both of backward's in one walk.
//
// Samples are taken in panels (panels.h): 64 rows of x, say, are transposed in registers into a
// panel (features, 64) that stays in a core's second-level cache, the list is walked, and a few
// rows of the result at a time are transposed back. No transposed copy of a tensor is made.
//
// Threads take panels of their own where there are enough of them, else they share the rows of the
// list. Sums and dot products are the same either way: a row is summed in segments (kernels.h), and
// dot products of panels are added up in groups that depend on shapes and K only.
#include <cstring>
#include <limits>

#include "product/ordered.h"
#include "simd/target.h"

namespace rewire {
namespace {

constexpr int64_t kStrip = 16;  // rows of the list whose sums are transposed together

class Product {
 public:
  explicit Product(const Task& t)
      : task_(t),
        tiles_(tiles_of(t)),
        panels_(t.x.batch, t.x.features, t.x.type, tiles_ > 1),
        threads_((t.list.connections + t.list.rows) * t.x.batch < kSerialWork
                     ? 1
                     : torch::stable::get_num_threads()),
        groups_(1) {
    if (panels_.count + (t.capacity * t.bytes() > cache_bytes() ? 1 : 0) >= 3 &&
        panels_.count > 1 && t.x.features <= std::numeric_limits<int32_t>::max()) {
      if (t.own) groups_ = groups();
      ordered_ = std::make_unique<Ordered>(t, groups_);
    } else {
      far_ = scattered(t.list, (t.out ? 1 : 0) * t.capacity * t.bytes() +
                                   (t.own ? 1 : 0) * t.capacity * t.bytes());
    }
    const auto& kernels = product_kernels();
    const auto& walks = ordered_ ? kernels.walk_ordered : kernels.walk;
    walk_ = walks[t.wide()][t.list.type][t.wanted()];
    pack_ = kernels.pack[t.x.type];
    unpack_ = kernels.unpack[t.x.type];
    // (A view whose features are a power of two of samples apart is better copied, panel by panel.)
    const int64_t bytes = t.x.features * panels_.widest() * t.bytes();
    as_is_ = panels_.count <= 2 || bytes > cache_bytes();
    for (int64_t p = 0; p < panels_.count; ++p)
      as_is_ = as_is_ && t.x.is_panel(panels_.samples(p), panels_.width(p));
  }

  void run() {
    const int64_t items = task_.own ? groups_ : panels_.count;
    if (threads_ == 1 || items % threads_ == 0 || items >= 4 * threads_)
      apart(items);
    else
      together();
    raise(status_, task_.op);
    if (ordered_ && task_.own) ordered_->deliver();
  }

 private:
  static constexpr int64_t kPanelsPerGroup = 8, kMostGroups = 16;
  static constexpr int64_t kEnd = std::numeric_limits<int64_t>::max();

  // Of panels whose dot products are summed on their own: enough for several threads, and few
  // beside the activations.
  int64_t groups() const {
    int64_t count = std::clamp<int64_t>(panels_.count / kPanelsPerGroup, 1, kMostGroups);
    const int64_t room = panels_.batch * std::max(task_.x.features, task_.list.rows) / 4;
    while (count > 1 && count * task_.list.connections > room) count /= 2;
    return count;
  }
  int64_t first_of(int64_t group) const { return panels_.count * group / groups_; }

  // x as the kernels read it.
  struct Source {
    const char* data;
    int64_t step;
  };
  Source source(int64_t panel, const char* packed) const {
    if (as_is_) return {task_.x.at(panels_.start(panel), 0), task_.x.feature_step};
    return {packed, panels_.width(panel)};
  }
  int64_t panel_bytes() const {
    return as_is_ ? 0 : task_.x.features * panels_.widest() * task_.bytes();
  }
  void pack(int64_t panel, char* to, int64_t feature0, int64_t feature1) const {
    PanelCopy copy =
        task_.x.copy(panels_.start(panel), panels_.samples(panel), feature0, feature1 - feature0);
    copy.width = copy.panel_step = panels_.width(panel);
    copy.to = to + feature0 * copy.width * task_.bytes();
    pack_(copy);
  }

  // How many tiles of features a widest panel is read in, so that a tile stays in a core's own
  // cache: one, unless every tile is read often enough to be worth another pass over the rows.
  static int64_t tiles_of(const Task& t) {
    constexpr int64_t kConnectionsPerTile = 12;
    const int64_t samples = std::min(t.x.batch, product_kernels().vectors * lanes_of(t.x.type));
    const int64_t bytes = t.x.features * samples * t.bytes();
    const int64_t most = std::max<int64_t>(cache_bytes() / 3 * 2, 1);
    if (bytes <= cache_bytes() / 4 * 3) return 1;
    const int64_t tiles = std::min((bytes + most - 1) / most, t.x.features);
    const int64_t often = std::max(t.list.rows, t.x.features / tiles);
    return t.list.connections / tiles >= kConnectionsPerTile * often ? tiles : 1;
  }
  // What lies between tiles: by row of the list, sums and the connection to go on with.
  struct Between {
    Memory next, sums;
  };
  Between between() const {
    const int64_t rows = tiles_ > 1 ? task_.list.rows : 0;
    return {Memory(8 * rows), Memory(task_.out ? rows * panels_.widest() * task_.bytes() : 0)};
  }

  // Some rows of the list, for one panel. `part`: where the sums of a segment go, else null.
  void walk(int64_t panel, int64_t tile, int64_t group, Source x, const Unit& unit, char* part,
            const Between& kept) const {
    const bool tiled = tiles_ > 1 && unit.part < 0;
    if (failed() || (!tiled && tile > 0)) return;
    const int64_t width = panels_.width(panel), samples = panels_.samples(panel);
    const int64_t first = panels_.start(panel), size = task_.bytes();
    alignas(64) char own[kStrip * kWidestPanel], sums[kStrip * kWidestPanel];
    const OneRow one(unit);
    const bool segment = unit.part >= 0;
    const bool own_as_is = task_.own && task_.own->is_panel(samples, width);
    const bool out_as_is = part || (task_.out && task_.out->is_panel(samples, width));
    const bool strips = (task_.own && !own_as_is) || (task_.out && !out_as_is);
    for (int64_t r = unit.row0, stop; r < unit.row1; r = stop) {
      stop = strips ? std::min(unit.row1, (r / kStrip + 1) * kStrip) : unit.row1;
      WalkArgs args{};
      args.ptr = segment ? one.ptr(task_.list.type) : task_.list.ptr.const_data_ptr();
      args.length = task_.list.length;
      args.bias = segment && !starts(unit) ? nullptr : task_.bias;
      if (segment && args.bias) args.bias = static_cast<const char*>(task_.bias) + r * size;
      args.x = x.data, args.x_step = x.step;
      args.capacity = task_.capacity, args.features = task_.x.features;
      args.add = panel > (ordered_ ? first_of(group) : 0), args.far = far_;
      if (tiled) {
        args.next = reinterpret_cast<int64_t*>(kept.next.start), args.go_on = tile > 0;
        args.until = tile + 1 < tiles_ ? task_.x.features * (tile + 1) / tiles_ : kEnd;
      }
      if (ordered_) {
        args.idx = ordered_->idx(), args.values = ordered_->values();
        args.length = task_.list.connections;
        args.dots = task_.own ? ordered_->dots(group) : nullptr;
      } else {
        args.idx = task_.list.idx.const_data_ptr(), args.values = task_.values;
        args.slots = task_.list.slots.const_data_ptr(), args.dots = task_.dots;
      }
      if (task_.own) {
        args.own = own_as_is ? task_.own->at(first, r) : own;
        args.own_step = own_as_is ? task_.own->feature_step : width;
        if (!own_as_is) {
          PanelCopy copy = task_.own->copy(first, samples, r, stop - r);
          copy.width = copy.panel_step = width, copy.to = own;
          pack_(copy);
        }
      }
      if (task_.out) {
        char* strip = tiled ? kept.sums.start + r * width * size : sums;
        args.sums = part ? part : out_as_is ? task_.out->at(first, r) : strip;
        args.sums_step = !part && out_as_is ? task_.out->feature_step : width;
      }
      const Status status = walk_(args, segment ? 0 : r, segment ? 1 : stop, width);
      if (status != kFine) {
        status_ = status;
        return;
      }
      if (task_.out && !out_as_is && (!tiled || tile + 1 == tiles_))
        deliver(panel, r, stop, static_cast<const char*>(args.sums));
    }
  }
  // Whether a segment is the first of its row.
  bool starts(const Unit& unit) const { return unit.begin == task_.list.at(unit.row0); }

  // The sums of some rows, to where they belong.
  void deliver(int64_t panel, int64_t row0, int64_t row1, const char* sums) const {
    PanelCopy copy =
        task_.out->copy(panels_.start(panel), panels_.samples(panel), row0, row1 - row0);
    copy.to = const_cast<void*>(copy.from);
    copy.from = sums;
    copy.width = copy.panel_step = panels_.width(panel);
    unpack_(copy);
  }

  // Every item is a group of panels, or one: a thread packs them for itself.
  void apart(int64_t items) {
    const Unit all{0, task_.list.rows, 0, 0, -1};
    try_each_item(items, threads_ == 1, [&](int64_t item) {
      const Memory memory(panel_bytes());
      const Between kept = between();
      const int64_t from = task_.own ? first_of(item) : item;
      const int64_t to = task_.own ? first_of(item + 1) : item + 1;
      for (int64_t panel = from; panel < to; ++panel) {
        if (!as_is_) pack(panel, memory.start, 0, task_.x.features);
        for (int64_t tile = 0; tile < tiles_; ++tile)
          walk(panel, tile, task_.own ? item : 0, source(panel, memory.start), all, nullptr, kept);
      }
    });
  }

  // A few panels at a time are packed by all threads, which then share the rows.
  void together() {
    constexpr int64_t kRoom = 16 << 20, kFeatures = 256;
    const Plan plan(task_.list);
    const int64_t bytes = panel_bytes(), units = static_cast<int64_t>(plan.units.size());
    const int64_t some = std::clamp<int64_t>(kRoom / std::max<int64_t>(bytes, 1), 1, panels_.count);
    const Memory memory(some * bytes);
    const int64_t part_bytes = task_.out ? panels_.widest() * task_.bytes() : 0;
    const Memory parts(some * plan.parts * part_bytes);
    const auto part = [&](int64_t i, int64_t number) {
      return parts.start + (i * plan.parts + number) * part_bytes;
    };
    const Between kept = between();
    int64_t group = 0;
    for (int64_t first = 0; first < panels_.count; first += some) {
      const int64_t now = std::min(some, panels_.count - first);
      const int64_t pieces = (task_.x.features + kFeatures - 1) / kFeatures;
      if (!as_is_)
        for_each_item(now * pieces, false, [&](int64_t item) {
          const int64_t i = item / pieces, feature = item % pieces * kFeatures;
          pack(first + i, memory.start + i * bytes, feature,
               std::min(feature + kFeatures, task_.x.features));
        });
      std::vector<int64_t> group_of(static_cast<size_t>(now));
      for (int64_t i = 0; i < now; ++i) {
        while (group + 1 < groups_ && first_of(group + 1) <= first + i) ++group;
        group_of[static_cast<size_t>(i)] = group;
      }
      // What lies between tiles is for one panel at a time.
      const bool ordered = task_.own != nullptr || tiles_ > 1;
      in_passes(now * tiles_, units, ordered, [&](int64_t pass, int64_t number) {
        const Unit& unit = plan.units[static_cast<size_t>(number)];
        const int64_t i = pass / tiles_;
        walk(first + i, pass % tiles_, group_of[static_cast<size_t>(i)],
             source(first + i, memory.start + i * bytes), unit,
             unit.part >= 0 && task_.out ? part(i, unit.part) : nullptr, kept);
      });
      if (!task_.out || failed()) continue;
      const int64_t rows = static_cast<int64_t>(plan.long_rows.size());
      for_each_item(now * rows, now * plan.parts < 64, [&](int64_t item) {
        const Plan::LongRow& row = plan.long_rows[static_cast<size_t>(item % rows)];
        const int64_t i = item / rows, width = panels_.width(first + i);
        for (int64_t k = 1; k < row.parts; ++k)
          add(part(i, row.first), part(i, row.first + k), width);
        deliver(first + i, row.row, row.row + 1, part(i, row.first));
      });
    }
  }

  void add(char* to, const char* more, int64_t n) const {
    if (task_.wide())
      for (int64_t b = 0; b < n; ++b)
        reinterpret_cast<double*>(to)[b] += reinterpret_cast<const double*>(more)[b];
    else
      for (int64_t b = 0; b < n; ++b)
        reinterpret_cast<float*>(to)[b] += reinterpret_cast<const float*>(more)[b];
  }

  bool failed() const { return status_.load(std::memory_order_relaxed) != kFine; }

  const Task& task_;
  const int64_t tiles_;
  const Panels panels_;
  const int64_t threads_;
  int64_t groups_;
  std::unique_ptr<Ordered> ordered_;
  bool far_ = false, as_is_;
  Status (*walk_)(const WalkArgs&, int64_t, int64_t, int64_t);
  void (*pack_)(const PanelCopy&);
  void (*unpack_)(const PanelCopy&);
  mutable std::atomic<int> status_{kFine};
};

// A list of numbers as the kernels compute with it: those of 16 bits as float32.
struct Numbers {
  Tensor kept;
  std::unique_ptr<float[]> wide;
  const void* data;

  Numbers(const Tensor& t, int x_type, const char* op, const char* name) : kept(packed(t)) {
    require_cpu(t, op);
    const int type = any_element_type(t, op);
    if (t.dim() != 1) fail(op, std::string(name) + " must have one dimension");
    if (type != x_type && !(is_narrow(x_type) && type == kFloat32))
      fail(op, std::string(name) + " and x must have one dtype, or float32 and one of 16 bits");
    data = kept.const_data_ptr();
    if (!is_narrow(type)) return;
    wide.reset(new float[static_cast<size_t>(kept.numel())]);
    product_kernels().widen[type - kBFloat16](data, wide.get(), kept.numel());
    data = wide.get();
  }
};

Tensor empty_matrix(const Tensor& like, int64_t batch, int64_t features, bool feature_major) {
  return feature_major ? empty_strided(like, {batch, features}, {1, batch})
                       : empty_strided(like, {batch, features}, {features, 1});
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

void require_match(const CheckedList& list, const Matrix& g, const Matrix& x, const char* op) {
  require(g.type == x.type, op, "g and x must have one dtype");
  require(g.features == list.rows, op, "g must have as many features as there are rows");
  require(g.batch == x.batch, op, "g and x must have the same batch size");
}

Tensor spmm(const Tensor& ptr, const Tensor& idx, const Tensor& slots, const Tensor& values_,
            const Tensor& x_, const std::optional<Tensor>& bias_, bool feature_major) {
  const char* op = "spmm";
  const CheckedList list(ptr, idx, slots, op);
  const Matrix x(x_, op, "x");
  const Numbers values(values_, x.type, op, "values");
  std::optional<Numbers> bias;
  if (bias_.has_value()) {
    bias.emplace(*bias_, x.type, op, "bias");
    require(bias_->numel() == list.rows, op, "bias must have one entry per row");
  }
  const Tensor y = empty_matrix(x_, x.batch, list.rows, feature_major);
  const Matrix out(y, op, "y");
  if (x.batch > 0 && list.rows > 0)
    Product({op, list, x, nullptr, &out, values.data, bias ? bias->data : nullptr, nullptr,
             values_.numel()})
        .run();
  return y;
}

Tensor sddmm(const Tensor& ptr, const Tensor& idx, const Tensor& slots, int64_t capacity,
             const Tensor& g_, const Tensor& x_) {
  const char* op = "sddmm";
  const CheckedList list(ptr, idx, slots, op);
  const Matrix x(x_, op, "x"), g(g_, op, "g");
  require(capacity >= 0, op, "capacity must not be negative");
  require_match(list, g, x, op);
  Tensor out = zeros(capacity, x.type);
  if (x.batch > 0 && list.rows > 0)
    Product({op, list, x, &g, nullptr, nullptr, nullptr, out.mutable_data_ptr(), capacity}).run();
  return out;
}

std::tuple<Tensor, Tensor> spmm_sddmm(const Tensor& ptr, const Tensor& idx, const Tensor& slots,
                                      const Tensor& values_, const Tensor& g_, const Tensor& x_,
                                      bool feature_major) {
  const char* op = "spmm_sddmm";
  const CheckedList list(ptr, idx, slots, op);
  const Matrix x(x_, op, "x"), g(g_, op, "g");
  const Numbers values(values_, x.type, op, "values");
  require_match(list, g, x, op);
  const int64_t capacity = values_.numel();
  Tensor y = empty_matrix(x_, x.batch, list.rows, feature_major), dots = zeros(capacity, x.type);
  const Matrix out(y, op, "y");
  if (x.batch > 0 && list.rows > 0)
    Product({op, list, x, &g, &out, values.data, nullptr, dots.mutable_data_ptr(), capacity}).run();
  return {y, dots};
}

std::string instruction_set() { return target_name(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rewire, m) {
  m.def(
      "spmm(Tensor ptr, Tensor idx, Tensor slots, Tensor values, Tensor x, Tensor? bias, "
      "bool feature_major=False) -> Tensor");
  m.def("sddmm(Tensor ptr, Tensor idx, Tensor slots, int capacity, Tensor g, Tensor x) -> Tensor");
  m.def(
      "spmm_sddmm(Tensor ptr, Tensor idx, Tensor slots, Tensor values, Tensor g, Tensor x, "
      "bool feature_major=False) -> (Tensor, Tensor)");
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(rewire, CPU, m) {
  m.impl("spmm", TORCH_BOX(&spmm));
  m.impl("sddmm", TORCH_BOX(&sddmm));
  m.impl("spmm_sddmm", TORCH_BOX(&spmm_sddmm));
}

STABLE_TORCH_LIBRARY_IMPL(rewire, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

}  // namespace rewire
