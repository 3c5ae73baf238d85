// Adam and its relatives on connections younger than the optimizer: which those are, and their step.
#include <cmath>

#include "runtime.h"

namespace rewire {
namespace {

constexpr int64_t kPiece = int64_t{1} << 15;  // slots at once

struct Step {
  double lr, shrink, decay;
  bool maximize, squared;
  int64_t horizon;
};

// For each piece of the slots, how many young connections come before it; and at the end, how many there are.
template <class A>
std::vector<int64_t> places(const A* ages, int64_t slots) {
  const int64_t pieces = (slots + kPiece - 1) / kPiece;
  std::vector<int64_t> found(static_cast<size_t>(pieces + 1));
  for_each_item(pieces, pieces < 8, [&](int64_t p) {
    const int64_t end = std::min(slots, (p + 1) * kPiece);
    int64_t young = 0;
    for (int64_t i = p * kPiece; i < end; ++i) young += ages[i] != A(-1);
    found[static_cast<size_t>(p + 1)] = young;
  });
  for (int64_t p = 0; p < pieces; ++p) found[static_cast<size_t>(p + 1)] += found[static_cast<size_t>(p)];
  return found;
}

template <class A, class T>
Tensor young(const Tensor& ages_, const Tensor& values_) {
  const A* ages = static_cast<const A*>(ages_.const_data_ptr());
  const T* values = static_cast<const T*>(values_.const_data_ptr());
  const int64_t slots = values_.numel();
  const std::vector<int64_t> first = places(ages, slots);
  const int64_t pieces = static_cast<int64_t>(first.size()) - 1;
  Tensor result = empty_1d(first.back(), values_.scalar_type());
  T* out = static_cast<T*>(result.mutable_data_ptr());
  for_each_item(first.back() > 0 ? pieces : 0, pieces < 8, [&](int64_t p) {
    const int64_t end = std::min(slots, (p + 1) * kPiece);
    // Bounded by the count of before, whatever another thread may have written since.
    int64_t k = first[static_cast<size_t>(p)];
    const int64_t last = first[static_cast<size_t>(p + 1)];
    for (int64_t i = p * kPiece; i < end && k < last; ++i)
      if (ages[i] != A(-1)) out[k++] = values[i];
  });
  return result;
}

template <class A, class U, class T>
void advance(const Tensor& ages_, const Tensor& values_, const Tensor& before_, const Tensor& first_,
             const Tensor& second_, const std::optional<Tensor>& gradient_, const Tensor* const (&tables)[4],
             const Step& by, const char* op) {
  A* ages = static_cast<A*>(ages_.mutable_data_ptr());
  T* values = static_cast<T*>(values_.mutable_data_ptr());
  const auto numbers = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
  const T *before = numbers(before_), *m = numbers(first_), *v = numbers(second_);
  const T* g = gradient_ ? numbers(*gradient_) : nullptr;
  const T *by_m = numbers(*tables[0]), *by_g = numbers(*tables[1]), *by_root = numbers(*tables[2]),
          *by_eps = numbers(*tables[3]);
  const U oldest = static_cast<U>(std::min<int64_t>(tables[0]->numel() - 1, static_cast<U>(-2)));
  const T lr = static_cast<T>(by.lr), shrink = static_cast<T>(by.shrink), decay = static_cast<T>(by.decay);
  const T sign = by.maximize ? T(-1) : T(1);
  const int64_t slots = values_.numel();
  const std::vector<int64_t> places_ = places(ages, slots);
  require(places_.back() == before_.numel(), op, "before must have one number for each young connection");
  const int64_t pieces = static_cast<int64_t>(places_.size()) - 1;
  for_each_item(pieces, pieces < 2, [&](int64_t p) {
    const int64_t end = std::min(slots, (p + 1) * kPiece);
    int64_t k = places_[static_cast<size_t>(p)];
    const int64_t last = places_[static_cast<size_t>(p + 1)];
    for (int64_t i = p * kPiece; i < end && k < last; ++i) {
      const U age = static_cast<U>(ages[i]);
      if (age == static_cast<U>(-1)) continue;
      const U at = std::min(age, oldest);  // the tables begin with age 1, which is a newborn's now
      const T old = before[k++];
      const T below = by_root[at] * (by.squared ? std::sqrt(v[i]) : v[i]) + by_eps[at];
      T now = shrink * old;
      if (g != nullptr) now -= lr * by_g[at] * (sign * g[i] + decay * old) / below;
      now -= lr * by_m[at] * m[i] / below;
      values[i] = now;
      ages[i] = static_cast<int64_t>(age) + 1 >= by.horizon ? A(-1) : static_cast<A>(age + 1);
    }
  });
}

void check(const Tensor& ages, const Tensor& values, const char* op) {
  require_cpu(ages, op);
  require_cpu(values, op);
  require(ages.dim() == 1 && values.dim() == 1 && ages.numel() == values.numel(), op,
          "ages and values must be lists of the same length");
  require(ages.is_contiguous() && values.is_contiguous(), op, "ages and values must be contiguous");
  require(ages.scalar_type() == ScalarType::Short || ages.scalar_type() == ScalarType::Int, op,
          "ages must be int16 or int32");
  require(values.scalar_type() == ScalarType::Float || values.scalar_type() == ScalarType::Double, op,
          "values must be float32 or float64");
}

Tensor young_values(const Tensor& ages, const Tensor& values) {
  check(ages, values, "young_values");
  const bool wide = values.scalar_type() == ScalarType::Double;
  if (ages.scalar_type() == ScalarType::Short)
    return wide ? young<int16_t, double>(ages, values) : young<int16_t, float>(ages, values);
  return wide ? young<int32_t, double>(ages, values) : young<int32_t, float>(ages, values);
}

void age_step_(const Tensor& ages, const Tensor& values, const Tensor& before, const Tensor& first,
               const Tensor& second, const std::optional<Tensor>& gradient, const Tensor& by_m, const Tensor& by_g,
               const Tensor& by_root, const Tensor& by_eps, double lr, double shrink, double decay, bool maximize,
               bool squared, int64_t horizon) {
  const char* op = "age_step_";
  check(ages, values, op);
  const Tensor* const tables[4] = {&by_m, &by_g, &by_root, &by_eps};
  std::vector<const Tensor*> all{&before, &first, &second, &by_m, &by_g, &by_root, &by_eps};
  if (gradient) all.push_back(&*gradient);
  for (const Tensor* t : all) {
    require_cpu(*t, op);
    require(t->dim() == 1 && t->is_contiguous() && t->scalar_type() == values.scalar_type(), op,
            "all numbers must be contiguous lists of the values' dtype");
  }
  const int64_t slots = values.numel();
  require(first.numel() == slots && second.numel() == slots && (!gradient || gradient->numel() == slots), op,
          "moments and gradient must be as long as values");
  for (const Tensor* t : tables)
    require(t->numel() == by_m.numel() && t->numel() > 0, op, "tables must be of one length, at least 1");
  require(horizon > 0, op, "horizon must be positive");
  const Step by{lr, shrink, decay, maximize, squared, horizon};
  const bool wide = values.scalar_type() == ScalarType::Double;
  const bool narrow = ages.scalar_type() == ScalarType::Short;
  const auto step = narrow ? (wide ? &advance<int16_t, uint16_t, double> : &advance<int16_t, uint16_t, float>)
                           : (wide ? &advance<int32_t, uint32_t, double> : &advance<int32_t, uint32_t, float>);
  step(ages, values, before, first, second, gradient, tables, by, op);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rewire, m) {
  m.def("young_values(Tensor ages, Tensor values) -> Tensor");
  m.def(
      "age_step_(Tensor(a!) ages, Tensor(b!) values, Tensor before, Tensor first, Tensor second, Tensor? gradient, "
      "Tensor by_m, Tensor by_g, Tensor by_root, Tensor by_eps, float lr, float shrink, float decay, bool maximize, "
      "bool squared, int horizon) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rewire, CPU, m) {
  m.impl("young_values", TORCH_BOX(&young_values));
  m.impl("age_step_", TORCH_BOX(&age_step_));
}

}  // namespace rewire
