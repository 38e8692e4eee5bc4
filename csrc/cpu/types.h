// What crosses the line between the torch-facing layer and the kernels: a dtype tag and plain pointers.
#pragma once
#include <cstdint>

namespace fastllm {

enum class DType : int { kF32, kF64, kBF16, kF16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Reduction, as at::Reduction numbers it.
enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

}  // namespace fastllm

// Runs `body` with T naming the storage type of `dtype`.
#define FASTLLM_SWITCH_DTYPE(dtype, ...) \
  switch (dtype) {                       \
    case ::fastllm::DType::kF32: {       \
      using T = float;                   \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
    case ::fastllm::DType::kF64: {       \
      using T = double;                  \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
    case ::fastllm::DType::kBF16: {      \
      using T = ::fastllm::bf16;         \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
    case ::fastllm::DType::kF16: {       \
      using T = ::fastllm::f16;          \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
  }
