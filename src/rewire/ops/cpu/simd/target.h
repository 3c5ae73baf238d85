// Which instruction set this process uses.
#pragma once

namespace rewire {

enum class Target { kPortable, kAvx2, kAvx512 };

// The best that the processor has and REWIRE_CPU_CAPABILITY allows; throws std::runtime_error where
// that names no set.
Target target();
const char* target_name();

// One of the same thing from every instruction set.
template <class T>
const T& best(const T& portable, const T& avx2, const T& avx512) {
  const Target found = target();
  return found == Target::kAvx512 ? avx512 : found == Target::kAvx2 ? avx2 : portable;
}

}  // namespace rewire

#if defined(__x86_64__)
#define REWIRE_BEST(name) \
  ::rewire::best(::rewire::portable::name, ::rewire::avx2::name, ::rewire::avx512::name)
#else
#define REWIRE_BEST(name) ::rewire::portable::name
#endif

// Declares the variable `name` of every instruction set.
#define REWIRE_EACH_TARGET(type, name) \
  namespace rewire::portable {         \
  extern const type name;              \
  }                                    \
  namespace rewire::avx2 {             \
  extern const type name;              \
  }                                    \
  namespace rewire::avx512 {           \
  extern const type name;              \
  }
