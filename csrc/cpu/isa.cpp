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
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const Isa best = bf16 ? Isa::kAvx512Bf16 : avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kPortable;
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  if (asked == nullptr) return best;
  if (std::strcmp(asked, "default") == 0) return Isa::kPortable;
  if (std::strcmp(asked, "avx2") == 0 && avx2) return Isa::kAvx2;
  if (std::strcmp(asked, "avx512") == 0 && avx512) return Isa::kAvx512;
  return best;
#else
  return Isa::kPortable;
#endif
}

Isa current_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name(Isa isa) {
  static const char* const names[] = {"DEFAULT", "AVX2", "AVX512", "AVX512_BF16"};
  return names[static_cast<int>(isa)];
}

}  // namespace fastllm::cpu
