#pragma once
#include "isa.h"
#include "types.h"

namespace fastllm::cpu {

// loss_r = w_y (lse(z) - z_y) with z = weight x_r + bias and y = target_r, for few features: float32 and float64.
struct SkinnyLoss {
  DType dtype;
  int64_t rows, features, classes;
  const void* input;   // (rows, features) contiguous
  const void* weight;  // (classes, features) contiguous
  const void* bias;    // (classes) or null
  const void* target;  // (rows) class indices, int64 or int32; checked before: each is ignore_index or in [0, classes)
  bool target_is_int32;
  int64_t ignore_index;
  const void* class_weight;  // (classes) or null
  void* loss;                // (rows)
  // Gradients of sum_r scale row_scale_r loss_r, each or null.
  double scale;
  const void* row_scale;  // (rows) or null
  void* grad_input;       // (rows, features)
  void* grad_weight;      // (classes, features)
  void* grad_bias;        // (classes)
  void* workspace;        // workspace(*this) items of dtype
};

// Where the three products cost less than a library's set-up, its packing and the logits' way through memory.
inline bool is_skinny_loss(int64_t features, int64_t classes) {
  return features >= 1 && features <= 32 && classes >= 1 && classes <= 4096;
}

struct LinearCrossEntropyKernels {
  int64_t (*workspace)(const SkinnyLoss&);
  void (*run)(const SkinnyLoss&);
};

}  // namespace fastllm::cpu

FASTLLM_DECLARE_KERNELS(LinearCrossEntropyKernels, linear_cross_entropy)
