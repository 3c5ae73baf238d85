#include "simd/target.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace rewire {
namespace {

Target choose() {
  const char* variable = std::getenv("REWIRE_CPU_CAPABILITY");
  const std::string cap = variable == nullptr ? "" : variable;
  if (!cap.empty() && cap != "portable" && cap != "avx2" && cap != "avx512")
    throw std::runtime_error("REWIRE_CPU_CAPABILITY is '" + cap +
                             "'; allowed are portable, avx2 and avx512");
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (cap.empty() || cap == "avx512")) return Target::kAvx512;
  if (has_avx2 && cap != "portable") return Target::kAvx2;
#endif
  return Target::kPortable;
}

}  // namespace

Target target() {
  static const Target chosen = choose();
  return chosen;
}

const char* target_name() {
  const Target found = target();
  return found == Target::kAvx512 ? "avx512" : found == Target::kAvx2 ? "avx2" : "portable";
}

}  // namespace rewire
