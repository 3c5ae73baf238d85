// Calls the vector kernels without torch and Python, for processors that these tests do not run on:
// tests/ops/test_other_processors.py compiles it with a cross compiler and runs it in an emulator.
//
// Products are compared with plain loops in double precision, here. A line for each comparison; the
// exit status is 1 if one fails. Random numbers are printed, for the test to compare.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <vector>

#include "conv/kernels.h"
#include "frozen/kernels.h"
#include "pool/kernels.h"
#include "product/kernels.h"
#include "random/kernels.h"

namespace {

using namespace rewire;

bool failed = false;

void report(const char* what, double error, double allowed) {
  const bool fine = error <= allowed;  // not of NaN
  failed = failed || !fine;
  std::printf("%s %s %.3g\n", fine ? "ok" : "WRONG", what, error);
}

uint64_t state = 1;
uint64_t draw() {  // xorshift64*
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545F4914F6CDD1DULL;
}
double number() { return static_cast<double>(draw() >> 40) / (1 << 23) - 1.0; }

// An element as memory has it.
struct BFloat16 {
  uint16_t bits;
  BFloat16(double x = 0.0) {
    const float narrow = static_cast<float>(x);
    uint32_t wide;
    std::memcpy(&wide, &narrow, 4);
    bits = static_cast<uint16_t>((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
  }
  operator double() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
};
struct Float16 {
  uint16_t bits;
  Float16(double x = 0.0) {  // below 65,504
    int exponent;
    std::frexp(x, &exponent);
    const int place = std::max(exponent - 1, -14);
    const double digits = std::nearbyint(std::ldexp(std::abs(x), 10 - place));
    bits = static_cast<uint16_t>((std::signbit(x) ? 0x8000 : 0) + ((place + 14) << 10) +
                                 static_cast<int>(digits));
  }
  operator double() const {
    const int exponent = bits >> 10 & 31, digits = bits & 1023;
    const double x = exponent ? std::ldexp(1024 + digits, exponent - 25) : std::ldexp(digits, -24);
    return bits >> 15 ? -x : x;
  }
};

template <class T>
std::vector<T> numbers(int64_t n) {
  std::vector<T> result(static_cast<size_t>(n));
  for (T& x : result) x = T(number());
  return result;
}

// Rows of 0 to `most` columns each, ascending, with slots in an order of their own.
template <class I>
struct Topology {
  int64_t rows, cols;
  std::vector<I> ptr{0}, idx, slots;

  Topology(int64_t rows, int64_t cols) : rows(rows), cols(cols) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c)
        if (r % 5 != 3 && draw() % 4 == 0) idx.push_back(I(c));
      ptr.push_back(I(idx.size()));
    }
    slots.resize(idx.size());
    std::iota(slots.begin(), slots.end(), I(0));
    for (size_t i = slots.size(); i > 1; --i) std::swap(slots[i - 1], slots[draw() % i]);
  }
  int64_t connections() const { return static_cast<int64_t>(idx.size()); }
  List list() const { return {ptr.data(), idx.data(), slots.data(), connections()}; }
};

// E: elements; A: sums and values.
template <class E, class A, class I>
void products(int type, int index, const char* name) {
  const int64_t rows = 37, cols = 29, batch = 80, b0 = 2;
  const double allowed = sizeof(A) == 4 ? 3e-5 : 1e-13;
  const Topology<I> t(rows, cols);
  const int64_t capacity = t.connections() + 5;
  const auto x = numbers<E>(cols * batch), g = numbers<E>(rows * batch);
  const auto values = numbers<A>(capacity), bias = numbers<A>(rows);
  const ProductKernels& k = product_kernels();
  double of_sums = 0, of_dots = 0, of_both = 0;
  const int64_t lanes = k.lanes[type], most = kVectorsPerBlock * lanes;
  for (const int64_t width : {int64_t{1}, int64_t{3}, lanes, 3 * lanes + 1, most - 1, most}) {
    std::vector<A> y(static_cast<size_t>(rows * batch)), z(y.size());
    std::vector<A> dots(static_cast<size_t>(capacity)), both(dots.size());
    const Part part{0, rows, b0, width, nullptr};
    Status status = k.spmm[type][index]({t.list(), values.data(), bias.data(), x.data(), y.data(),
                                         capacity, cols, batch, batch, width > 9},
                                        part);
    status = std::max(status, k.sddmm[type][index]({t.list(), g.data(), x.data(), dots.data(),
                                                    capacity, cols, batch, batch},
                                                   part, false));
    status = std::max(
        status, k.fused[type][index]({t.list(), values.data(), g.data(), x.data(), z.data(),
                                      both.data(), capacity, cols, batch, batch, batch, width > 9},
                                     part, false));
    if (status != kFine) return report(name, NAN, 0);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t b = b0; b < b0 + width; ++b) {
        double sum = 0;
        for (I i = t.ptr[r]; i < t.ptr[r + 1]; ++i)
          sum += double(values[t.slots[i]]) * double(x[t.idx[i] * batch + b]);
        of_sums = std::max(of_sums, std::abs(sum + bias[r] - y[r * batch + b]));
        of_both = std::max(of_both, std::abs(sum - z[r * batch + b]));
      }
      for (I i = t.ptr[r]; i < t.ptr[r + 1]; ++i) {
        double dot = 0;
        for (int64_t b = b0; b < b0 + width; ++b)
          dot += double(g[r * batch + b]) * double(x[t.idx[i] * batch + b]);
        of_dots = std::max(of_dots, std::abs(dot - dots[t.slots[i]]));
        of_both = std::max(of_both, std::abs(dot - both[t.slots[i]]));
      }
    }
  }
  char line[64];
  const auto said = [&](const char* what, double error) {
    std::snprintf(line, sizeof(line), "%s %s", what, name);
    report(line, error, allowed);
  };
  said("spmm", of_sums);
  said("sddmm", of_dots);
  said("fused", of_both);
  Topology<I> wrong = t;
  wrong.idx[t.connections() / 2] = I(cols);
  std::vector<A> y(static_cast<size_t>(rows * batch));
  const Status refused = k.spmm[type][index]({wrong.list(), values.data(), nullptr, x.data(),
                                              y.data(), capacity, cols, batch, batch, false},
                                             {0, rows, 0, batch, nullptr});
  said("a wrong index is refused", refused == kBadIndex ? 0 : 1);
}

template <class E>
void narrow(int which, const char* name) {
  std::vector<float> wide, back(1000);
  for (int i = 0; i < 1000; ++i)
    wide.push_back(static_cast<float>(std::ldexp(number(), i % 30 - 15)));
  std::vector<E> mine(1000);
  product_kernels().narrow[which](wide.data(), mine.data(), 1000);
  product_kernels().widen[which](mine.data(), back.data(), 1000);
  int wrong = 0;
  for (int i = 0; i < 1000; ++i) {
    const E expected{double(wide[i])};
    wrong += std::memcmp(&expected, &mine[i], 2) != 0 || double(mine[i]) != double(back[i]);
  }
  report(name, wrong, 0);
}

template <class E>
void copies(int type, const char* name) {
  const int64_t rows = 45, cols = 53, step = 60;  // what lies between rows stays as it is
  const auto x = numbers<E>(rows * cols);
  std::vector<E> y(static_cast<size_t>(step * cols), E(0.5)), z(x.size());
  product_kernels().copy[type]({x.data(), y.data(), rows, step, 1, cols}, 0, cols);  // transposed
  product_kernels().copy[type]({y.data(), z.data(), cols, cols, 1, step}, 0, rows);  // and back
  int wrong = std::memcmp(x.data(), z.data(), x.size() * sizeof(E)) != 0;
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t r = 0; r < step; ++r)
      wrong += double(y[c * step + r]) != (r < rows ? double(x[r * cols + c]) : 0.5);
  report(name, wrong, 0);
}

template <class Col>
void frozen(int col, int value, const char* name) {
  const int64_t rows = 40, cols = 61;
  const Topology<int32_t> t(rows, cols);
  const std::vector<Col> columns(t.idx.begin(), t.idx.end());
  const auto x = numbers<float>(cols), scale = numbers<float>(rows), bias = numbers<float>(rows);
  const auto floats = numbers<float>(t.connections());
  std::vector<int8_t> bytes;
  for (int64_t i = 0; i < t.connections(); ++i) bytes.push_back(static_cast<int8_t>(draw() % 255));
  std::vector<int32_t> halves{0};  // the end of each row's first half, and of the row
  for (int64_t r = 0; r < rows; ++r) {
    halves.push_back((t.ptr[r] + t.ptr[r + 1]) / 2);
    halves.push_back(t.ptr[r + 1]);
  }
  const bool ternary = value == kFrozenTernary, whole = value == kFrozenFloat;
  const FrozenWeight w{ternary ? halves.data() : t.ptr.data(),
                       columns.data(),
                       ternary ? nullptr
                       : whole ? static_cast<const void*>(floats.data())
                               : bytes.data(),
                       whole ? nullptr : scale.data(),
                       bias.data(),
                       t.connections(),
                       cols,
                       false};
  std::vector<float> y(static_cast<size_t>(rows));
  const Status status = frozen_kernels().one[col][value](w, {x.data(), y.data(), 1, rows}, 0, rows);
  double error = status == kFine ? 0 : NAN;
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int32_t i = t.ptr[r]; i < t.ptr[r + 1]; ++i) {
      const double one = ternary ? (i < halves[2 * r + 1] ? 1 : -1) : whole ? floats[i] : bytes[i];
      sum += one * x[t.idx[i]];
    }
    error = std::max(error, std::abs(sum * (whole ? 1 : scale[r]) + bias[r] - y[r]));
  }
  report(name, error, whole || ternary ? 1e-5 : 2e-3);
}

template <class I>
void dormant(int index, const char* name) {
  const Topology<I> t(23, 31);
  const int64_t free = t.rows * t.cols - t.connections();
  std::vector<int64_t> ranks(static_cast<size_t>(free)), row(ranks.size()), col(ranks.size());
  std::iota(ranks.begin(), ranks.end(), 0);
  const Status status = pool_kernels().dormant[index](
      {t.ptr.data(), t.idx.data(), t.rows, t.connections(), t.cols, free}, ranks.data(), free,
      row.data(), col.data());
  int64_t at = 0, wrong = status != kFine;
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t c = 0; c < t.cols; ++c)
      if (!std::binary_search(t.idx.begin() + t.ptr[r], t.idx.begin() + t.ptr[r + 1], I(c))) {
        wrong += row[at] != r || col[at] != c;
        ++at;
      }
  report(name, double(wrong + (at != free)), 0);
}

void convolution() {
  const int64_t rows = 6, n = 70, step = 80;  // whole vectors are written
  const std::vector<int64_t> ptr{0, 3, 3, 7, 8, 12, 15};
  std::vector<int32_t> offsets;
  for (int i = 0; i < 15; ++i) offsets.push_back(static_cast<int32_t>(draw() % 90));
  const auto values = numbers<float>(15), bias = numbers<float>(rows),
             x = numbers<float>(90 * 4 + step);
  std::vector<float> y(static_cast<size_t>(rows * step)), sums(15);
  const ConvArgs args{ptr.data(), offsets.data(), values.data(), bias.data(),
                      x.data(),   y.data(),       sums.data(),   4,
                      step};
  conv_kernels().sum[kFloat32](args, 0, rows, n);
  double error = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < n; ++j) {
      double sum = bias[r];
      for (int64_t i = ptr[r]; i < ptr[r + 1]; ++i)
        sum += double(values[i]) * x[offsets[i] * 4 + j];
      error = std::max(error, std::abs(sum - y[r * step + j]));
    }
  report("conv", error, 1e-5);
}

void random_numbers() {
  int64_t bits[70];
  random_kernels().random_bits(12345678901ULL, 7, 3, 1000, 70, bits);
  for (const int64_t b : bits) std::printf("bits %lld\n", static_cast<long long>(b));
  std::vector<int64_t> rows(50), cols(50);
  for (int i = 0; i < 50; ++i) rows[i] = i * 3, cols[i] = i * i;
  int8_t signs[50];
  random_kernels().position_signs(rows.data(), cols.data(), 50, 99, 5, signs);
  for (const int8_t s : signs) std::printf("sign %d\n", s);
  std::vector<float> normals(64);
  random_kernels().add_normals[kFloat32](normals.data(), 2.0, 12345678901ULL, 7, 3, 0, 64);
  for (const float z : normals) std::printf("normal %.9g\n", double(z));
}

}  // namespace

int main() {
  products<float, float, int32_t>(kFloat32, kInt32, "float32");
  products<float, float, int64_t>(kFloat32, kInt64, "float32, int64");
  products<double, double, int32_t>(kFloat64, kInt32, "float64");
  products<BFloat16, float, int32_t>(kBFloat16, kInt32, "bfloat16");
  products<Float16, float, int64_t>(kFloat16, kInt64, "float16, int64");
  narrow<BFloat16>(0, "to bfloat16 and back");
  narrow<Float16>(1, "to float16 and back");
  copies<float>(kFloat32, "copy float32");
  copies<double>(kFloat64, "copy float64");
  copies<BFloat16>(kBFloat16, "copy bfloat16");
  frozen<uint16_t>(0, kFrozenFloat, "frozen float");
  frozen<int32_t>(1, kFrozenFloat, "frozen float, int32");
  frozen<uint16_t>(0, kFrozenInt8, "frozen int8");
  frozen<uint16_t>(0, kFrozenTernary, "frozen ternary");
  dormant<int32_t>(kInt32, "dormant");
  dormant<int64_t>(kInt64, "dormant, int64");
  convolution();
  random_numbers();
  return failed ? 1 : 0;
}
