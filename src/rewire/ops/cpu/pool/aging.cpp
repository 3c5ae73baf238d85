// Adam and its relatives on connections younger than the optimizer: their step, put right after the
// optimizer's.
#include <cmath>

#include "runtime.h"

namespace rewire {
namespace {

constexpr int64_t kPiece = int64_t{1} << 15;  // slots at once
constexpr int kBlock = 16;                    // slots that are computed together

// What a step makes of the moments.
template <class T>
struct Factors {
  T m, g, root, eps;
};

struct Step {
  double lr, decay;
  bool maximize, squared;
  int64_t horizon;
};

// Young slots of a block, one after the other: their numbers are gathered, computed in plain loops
// that the compiler turns into vectors, and written back.
template <class A, class U, class T>
int64_t advance(const Tensor& ages_, const Tensor& values_, const Tensor& first_,
                const Tensor& second_, const std::optional<Tensor>& gradient_,
                const Tensor* const (&tables)[4], const Factors<double>& own_, const Step& by) {
  A* ages = static_cast<A*>(ages_.mutable_data_ptr());
  T* values = static_cast<T*>(values_.mutable_data_ptr());
  const auto numbers = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
  const T *first = numbers(first_), *second = numbers(second_);
  const T* gradient = gradient_ ? numbers(*gradient_) : nullptr;
  const T *by_m = numbers(*tables[0]), *by_g = numbers(*tables[1]), *by_root = numbers(*tables[2]),
          *by_eps = numbers(*tables[3]);
  const U oldest = static_cast<U>(std::min<int64_t>(tables[0]->numel() - 1, static_cast<U>(-2)));
  const T lr = static_cast<T>(by.lr), decay = static_cast<T>(by.decay),
          sign = by.maximize ? T(-1) : T(1);
  const Factors<T> own{static_cast<T>(own_.m), static_cast<T>(own_.g), static_cast<T>(own_.root),
                       static_cast<T>(own_.eps)};
  const int64_t slots = values_.numel(), pieces = (slots + kPiece - 1) / kPiece;
  std::vector<int64_t> left(static_cast<size_t>(pieces));
  for_each_item(pieces, pieces < 2, [&](int64_t p) {
    const int64_t end = std::min(slots, (p + 1) * kPiece);
    int64_t place[kBlock], young = 0;
    U at[kBlock];
    int held = 0;
    const auto flush = [&] {
      T m[kBlock], root[kBlock], here[kBlock], there[kBlock], by_age[kBlock], now[kBlock];
      for (int k = 0; k < kBlock;
           ++k) {  // of the last block, what is behind is computed and not written
        const int64_t i = k < held ? place[k] : place[0];
        const U age = k < held ? at[k] : at[0];
        now[k] = values[i];
        m[k] = first[i];
        root[k] = second[i];
        there[k] = by_root[age];
        here[k] = by_eps[age];
        by_age[k] = by_m[age];
      }
      if (by.squared)
        for (int k = 0; k < kBlock; ++k) root[k] = std::sqrt(root[k]);
      for (int k = 0; k < kBlock; ++k) there[k] = there[k] * root[k] + here[k];
      for (int k = 0; k < kBlock; ++k) here[k] = own.root * root[k] + own.eps;
      if (gradient == nullptr) {
        for (int k = 0; k < kBlock; ++k)
          now[k] += lr * (own.m * m[k] / here[k] - by_age[k] * m[k] / there[k]);
      } else {
        for (int k = 0; k < held; ++k) {
          T slope = sign * gradient[place[k]];
          const T old = (now[k] + lr * (own.g * slope + own.m * m[k]) / here[k]) /
                        (T(1) - lr * own.g * decay / here[k]);
          slope += decay * old;
          now[k] += lr * ((own.g * slope + own.m * m[k]) / here[k] -
                          (by_g[at[k]] * slope + by_age[k] * m[k]) / there[k]);
        }
      }
      for (int k = 0; k < held; ++k) values[place[k]] = now[k];
      held = 0;
    };
    for (int64_t i = p * kPiece; i < end; ++i) {
      const U age = static_cast<U>(ages[i]);
      if (age == static_cast<U>(-1)) continue;
      place[held] = i;
      at[held] = std::min(age, oldest);  // the tables begin with age 1, which is a newborn's now
      const bool old = static_cast<int64_t>(age) + 1 >= by.horizon;
      ages[i] = old ? A(-1) : static_cast<A>(age + 1);
      young += !old;
      if (++held == kBlock) flush();
    }
    if (held > 0) flush();
    left[static_cast<size_t>(p)] = young;
  });
  int64_t sum = 0;
  for (const int64_t young : left) sum += young;
  return sum;
}

int64_t age_step_(const Tensor& ages, const Tensor& values, const Tensor& first,
                  const Tensor& second, const std::optional<Tensor>& gradient, const Tensor& by_m,
                  const Tensor& by_g, const Tensor& by_root, const Tensor& by_eps, double m,
                  double g, double root, double eps, double lr, double decay, bool maximize,
                  bool squared, int64_t horizon) {
  const char* op = "age_step_";
  require_cpu(ages, op);
  require_cpu(values, op);
  require(ages.dim() == 1 && values.dim() == 1 && ages.numel() == values.numel(), op,
          "ages and values must be lists of the same length");
  require(ages.is_contiguous() && values.is_contiguous(), op, "ages and values must be contiguous");
  require(ages.scalar_type() == ScalarType::Short || ages.scalar_type() == ScalarType::Int, op,
          "ages must be int16 or int32");
  const bool wide = element_type(values, op) == kFloat64,
             narrow = ages.scalar_type() == ScalarType::Short;
  const Tensor* const tables[4] = {&by_m, &by_g, &by_root, &by_eps};
  for (const Tensor* t :
       {&first, &second, &by_m, &by_g, &by_root, &by_eps, gradient ? &*gradient : &first}) {
    require_cpu(*t, op);
    require(t->dim() == 1 && t->is_contiguous() && t->scalar_type() == values.scalar_type(), op,
            "all numbers must be contiguous lists of the values' dtype");
  }
  const int64_t slots = values.numel();
  require(first.numel() == slots && second.numel() == slots &&
              (!gradient || gradient->numel() == slots),
          op, "moments and gradient must be as long as values");
  for (const Tensor* t : tables)
    require(t->numel() == by_m.numel() && t->numel() > 0, op,
            "tables must be of one length, at least 1");
  require(horizon > 0, op, "horizon must be positive");
  const auto step =
      narrow ? (wide ? &advance<int16_t, uint16_t, double> : &advance<int16_t, uint16_t, float>)
             : (wide ? &advance<int32_t, uint32_t, double> : &advance<int32_t, uint32_t, float>);
  return step(ages, values, first, second, gradient, tables, {m, g, root, eps},
              {lr, decay, maximize, squared, horizon});
}

}  // namespace

REWIRE_OPERATOR(
    age_step_,
    "(Tensor(a!) ages, Tensor(b!) values, Tensor first, Tensor second, Tensor? gradient, Tensor "
    "by_m, Tensor by_g, Tensor by_root, Tensor by_eps, float m, float g, float root, float eps, "
    "float lr, float decay, bool maximize, bool squared, int horizon) -> int")

}  // namespace rewire
