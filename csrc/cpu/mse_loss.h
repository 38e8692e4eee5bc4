#pragma once
#include "isa.h"
#include "types.h"

namespace fastllm::cpu {

struct MseLossKernels {
  // output: `none` n items of dtype, else one. grad: null, or n items, d output / d input for an incoming gradient of 1
  // (not for `none`). weight: null, or n items of dtype. partial: mse_blocks(n) doubles of workspace.
  void (*forward)(DType dtype, const void* input, const void* target, const void* weight, void* output, void* grad,
                  int64_t n, int64_t reduction, void* partial);
  // grad = 2 (input - target) weight grad_output / divisor; grad_output: n items for `none`, else one.
  void (*backward)(DType dtype, const void* grad_output, const void* input, const void* target, const void* weight,
                   void* grad, int64_t n, int64_t reduction, void* partial);
};

// Items of a block of the two-stage sum: fixed, so that the result does not depend on the number of threads.
constexpr int64_t kMseBlock = 8192;
inline int64_t mse_blocks(int64_t n) { return (n + kMseBlock - 1) / kMseBlock; }

}  // namespace fastllm::cpu

FASTLLM_DECLARE_KERNELS(MseLossKernels, mse_loss)
