// What every op needs: how to share out work, how to look into tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "simd/types.h"

// Makes the function `name` the operator rewire::name, with the arguments and results that
// `signature` declares, for tensors on the CPU.
#define REWIRE_OPERATOR(name, signature) REWIRE_OPERATOR_ON(CPU, name, signature)
// The same for a function that takes no tensors.
#define REWIRE_OPERATOR_ANYWHERE(name, signature) \
  REWIRE_OPERATOR_ON(CompositeExplicitAutograd, name, signature)
#define REWIRE_OPERATOR_ON(key, name, signature)                       \
  STABLE_TORCH_LIBRARY_FRAGMENT(rewire, m) { m.def(#name signature); } \
  STABLE_TORCH_LIBRARY_IMPL(rewire, key, m) { m.impl(#name, TORCH_BOX(&name)); }

namespace rewire {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Bytes of the cache that a core has for itself: the second level's, or what REWIRE_CACHE_BYTES
// says.
int64_t cache_bytes();

// Asks the system for large pages, for fresh memory that is written in an order of its own: of a
// list of 10^8 numbers that is written a line here and a line there, a processor cannot remember
// where all the small ones are. No more than a wish.
void want_large_pages(void* memory, int64_t bytes);

[[noreturn]] inline void fail(const char* op, const std::string& what) {
  throw std::runtime_error(std::string("rewire::") + op + ": " + what);
}

inline void require(bool fine, const char* op, const char* what) {
  if (!fine) fail(op, what);
}

// What is at `from` now. The compiler must not read it again instead of keeping what was checked:
// another thread may write to a caller's tensor meanwhile.
template <class T>
inline T read_once(const T* from) {
  return __atomic_load_n(from, __ATOMIC_RELAXED);
}

// Work below this many multiply-adds is done by the caller: waking a second thread costs more.
constexpr int64_t kSerialWork = 1 << 18;

// Calls job(item) for every item in [0, items), on torch's threads. Items are handed out one by
// one, so a slow item or a busy core does not hold up the rest; which thread gets which item must
// not matter to the result. A job must not throw.
template <class Job>
void for_each_item(int64_t items, bool serial, const Job& job) {
  if (serial || items < 2) {
    for (int64_t i = 0; i < items; ++i) job(i);
    return;
  }
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(items, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < items;
           i = next.fetch_add(1, std::memory_order_relaxed))
        job(i);
  });
}

// As for_each_item, for jobs that may throw; what one of them threw is thrown again at the end.
template <class Job>
void try_each_item(int64_t items, bool serial, const Job& job) {
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  for_each_item(items, serial, [&](int64_t item) {
    try {
      job(item);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (failed.load()) std::rethrow_exception(error);
}

// Of the products and copies, which take 16-bit elements too.
inline int any_element_type(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    default:
      fail(op, "the kernels take float32, float64, bfloat16 or float16 tensors");
  }
}
inline int element_type(const Tensor& t, const char* op) {
  const ScalarType type = t.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Double, op,
          "the kernels take float32 or float64 tensors");
  return any_element_type(t, op);
}
inline bool is_narrow(int type) { return type >= kBFloat16; }

inline int index_type(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Int:
      return kInt32;
    case ScalarType::Long:
      return kInt64;
    default:
      fail(op, "index tensors must be int32 or int64");
  }
}

inline void require_cpu(const Tensor& t, const char* op) {
  require(t.is_cpu(), op, "every tensor must be on the CPU");
}

inline Tensor packed(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// A fresh CPU tensor of the dtype of `like`.
Tensor empty_strided(const Tensor& like, std::initializer_list<int64_t> sizes,
                     std::initializer_list<int64_t> strides);

// A fresh 1-D CPU tensor.
Tensor empty_1d(int64_t length, ScalarType type);

// The numbers of an int32 or int64 tensor as int64. `kept` owns the memory if it had to be
// converted.
struct Integers {
  Tensor kept;
  std::vector<int64_t> converted;
  const int64_t* data;
  int64_t count;
};
Integers as_integers(const Tensor& t, const char* op);
// As as_integers, in memory of its own.
Integers own_integers(const Tensor& t, const char* op);

// A (batch, features) tensor as a matrix of contiguous runs over the batch. `kept` owns the memory.
struct Runs {
  Tensor kept;
  const void* data;
  int64_t batch, features, step;
};
Runs as_runs(const Tensor& x, const char* op, const char* name);

// A (batch, features) tensor in any strides.
struct Matrix {
  const char* data;
  int64_t batch, features, batch_step, feature_step;
};
Matrix as_matrix(const Tensor& x, const char* op, const char* name);

}  // namespace rewire
