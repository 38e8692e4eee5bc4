// One library holds every kernel four times: AVX-512 with and without the bfloat16 instructions, AVX2 + FMA + F16C, and
// the base line of the architecture.
// A kernel file is compiled once per instruction set with FASTLLM_ISA naming its namespace; the choice is made at
// run time, once, so that a wheel never meets an instruction its processor lacks.
#pragma once
#include <cstdint>

namespace fastllm::cpu {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best set that this processor has, lowered by ATEN_CPU_CAPABILITY=default|avx2|avx512 (PyTorch's own switch; for
// it, avx512 is without the bfloat16 instructions).
Isa current_isa();
const char* isa_name(Isa isa);

}  // namespace fastllm::cpu

// Declares the tables of `Table` function pointers, one an instruction set, and `op()`, the one for this processor.
#define FASTLLM_DECLARE_KERNELS(Table, op) \
  namespace fastllm::cpu {                 \
  namespace portable {                     \
  extern const Table op##_kernels;         \
  }                                        \
  namespace avx2 {                         \
  extern const Table op##_kernels;         \
  }                                        \
  namespace avx512 {                       \
  extern const Table op##_kernels;         \
  }                                        \
  namespace avx512bf16 {                   \
  extern const Table op##_kernels;         \
  }                                        \
  const Table& op();                       \
  }

// In csrc/ops/<op>.cpp (base-line flags): the body of `op()`. On a machine other than x86-64 only `portable` is built.
#ifdef FASTLLM_X86
#define FASTLLM_DEFINE_DISPATCH(Table, op)                                \
  namespace fastllm::cpu {                                                \
  const Table& op() {                                                     \
    static const Table* const tables[] = {                                \
        &portable::op##_kernels,                                          \
        &avx2::op##_kernels,                                              \
        &avx512::op##_kernels,                                            \
        &avx512bf16::op##_kernels,                                        \
    };                                                                    \
    static const Table& table = *tables[static_cast<int>(current_isa())]; \
    return table;                                                         \
  }                                                                       \
  }
#else
#define FASTLLM_DEFINE_DISPATCH(Table, op)             \
  namespace fastllm::cpu {                             \
  const Table& op() { return portable::op##_kernels; } \
  }
#endif
