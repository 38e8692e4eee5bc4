#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace fastllm::cpu {

static Isa detect() {
#ifdef FASTLLM_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  Isa best = avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kPortable;
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  if (asked != nullptr) {
    if (std::strcmp(asked, "default") == 0) best = Isa::kPortable;
    if (std::strcmp(asked, "avx2") == 0 && avx2) best = Isa::kAvx2;
  }
  return best;
#else
  return Isa::kPortable;
#endif
}

Isa current_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name(Isa isa) { return isa == Isa::kAvx512 ? "AVX512" : isa == Isa::kAvx2 ? "AVX2" : "DEFAULT"; }

}  // namespace fastllm::cpu
