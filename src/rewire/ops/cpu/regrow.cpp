// DEEP R's exchange of connections in one pass: draw dormant ones, find their signs, replace; see rewire/ops/regrow.py.
#include "index.h"
#include "sampling.h"

namespace rewire {
namespace {

struct Streams {
  int64_t grow, sign;
  bool fixed;
};

// Signs of the new connections, into out[0 ... n).
void draw_signs(const int64_t* rows, const int64_t* cols, int64_t n, const Coordinates& at, bool fixed, int8_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    if (fixed) {
      out[i] = position_sign(rows[i], cols[i], at.seed, at.stream);
    } else {
      const uint64_t k = static_cast<uint64_t>(i);
      const Words w = philox(at.seed, static_cast<uint32_t>(k), static_cast<uint32_t>(k >> 32), at.step, at.stream);
      out[i] = (w.w[0] & 1) != 0 ? -1 : 1;
    }
  }
}

template <class T>
void write_zeros(T* values, int8_t* signs, const int64_t* slots, const int8_t* sign, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    values[slots[i]] = sign[i] < 0 ? -T(0) : T(0);
    signs[slots[i]] = sign[i];
  }
}

template <class I>
Problem exchange(const Pool<I>& pool, const Complement<I>& list, const Integers& slots, uint64_t seed, uint32_t step,
                 const Streams& streams, std::vector<int8_t>& sign) {
  const int64_t n = slots.count, free = list.dormant() + n;
  for (int64_t i = 0; i < n; ++i)
    if (slots.data[i] < 0 || slots.data[i] >= pool.capacity) return {kSlot, slots.data[i], 0};
  if (n > free || free < 0) fail(list.op, "the index has more connections than there are positions");
  std::vector<int64_t> ranks(static_cast<size_t>(n)), rows(ranks.size()), cols(ranks.size());
  const Coordinates grow{seed, step, static_cast<uint32_t>(streams.grow)};
  distinct_into(n, free, grow, 0, ranks.data());
  map_ranks(list, ranks.data(), n, rows.data(), cols.data(), [&](int64_t i) {
    require(i < n, list.op, "a rank is out of range");
    return std::pair<int64_t, int64_t>(pool.rows[slots.data[i]], pool.cols[slots.data[i]]);
  });
  sign.resize(static_cast<size_t>(n));
  draw_signs(rows.data(), cols.data(), n, {seed, step, static_cast<uint32_t>(streams.sign)}, streams.fixed, sign.data());
  return replace(pool, slots.data, rows.data(), cols.data(), n);
}

Problem regrow_(const Tensor& values, const Tensor& signs, const Tensor& rows, const Tensor& cols,
                const Tensor& row_ptr, const Tensor& row_cols, const Tensor& row_slots, const Tensor& col_ptr,
                const Tensor& col_rows, const Tensor& col_slots, const Tensor& slots_, int64_t seed, int64_t step,
                int64_t grow_stream, int64_t sign_stream, bool fixed) {
  const char* op = "regrow_";
  const int64_t n_rows = row_ptr.numel() - 1, n_cols = col_ptr.numel() - 1;
  const PoolTensors t{rows, cols, row_ptr, row_cols, row_slots, col_ptr, col_rows, col_slots, n_rows, n_cols};
  const int type = t.check(op);
  require_apart(op, {&rows, &cols, &row_ptr, &row_cols, &row_slots, &col_ptr, &col_rows, &col_slots}, {});
  for (const Tensor* x : {&values, &signs}) {
    require_cpu(*x, op);
    require(x->dim() == 1 && x->is_contiguous() && x->numel() == rows.numel(), op,
            "values and signs must be contiguous lists as long as rows");
  }
  const int kind = element_type(values, op);
  require(signs.scalar_type() == ScalarType::Char, op, "signs must be int8");
  const Integers slots = own_integers(slots_, op);
  std::vector<int8_t> sign;
  const Problem problem = with_complement(row_ptr, row_cols, n_cols, op, [&](const auto& list) {
    using I = std::decay_t<decltype(list.ptr[0])>;
    return exchange(t.pool<I>(), list, slots, static_cast<uint64_t>(seed), static_cast<uint32_t>(step),
                    {grow_stream, sign_stream, fixed}, sign);
  });
  if (problem != kNoProblem) return problem;
  int8_t* all = static_cast<int8_t*>(signs.mutable_data_ptr());
  if (kind == kFloat32)
    write_zeros(static_cast<float*>(values.mutable_data_ptr()), all, slots.data, sign.data(), slots.count);
  else
    write_zeros(static_cast<double*>(values.mutable_data_ptr()), all, slots.data, sign.data(), slots.count);
  return {kOk,
          type == kInt32 ? data_of<int32_t>(row_ptr)[n_rows] : static_cast<int64_t>(data_of<int64_t>(row_ptr)[n_rows]),
          0};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rewire, m) {
  m.def(
      "regrow_(Tensor(a!) values, Tensor(b!) signs, Tensor(c!) rows, Tensor(d!) cols, Tensor(e!) row_ptr, "
      "Tensor(f!) row_cols, Tensor(g!) row_slots, Tensor(h!) col_ptr, Tensor(i!) col_rows, Tensor(j!) col_slots, "
      "Tensor slots, int seed, int step, int grow_stream, int sign_stream, bool fixed) -> (int, int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(rewire, CPU, m) { m.impl("regrow_", TORCH_BOX(&regrow_)); }

}  // namespace rewire
