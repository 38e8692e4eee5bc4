#pragma once
#include "isa.h"
#include "types.h"

namespace fastllm::cpu {

// Rows of logits and what is asked of them. "acc" is the accumulator of `dtype`: double for float64, else float.
//
// With z the (softcapped) logits of a row, p their softmax, y its class, w the class weights, e the smoothing:
//   loss = (1 - e) w_y (lse - z_y) + e/V sum_c w_c (lse - z_c) + s lse^2
// and for class probabilities q: loss = sum_c w_c q'_c (lse - z_c) + s lse^2, q' = (1 - e) q + e/V.
struct CrossEntropyRows {
  DType dtype;
  int64_t rows, classes;
  const void* logits;  // rows of `classes` items, `logits_stride` items apart
  int64_t logits_stride;
  const void* target;  // (rows) class indices, int64 or int32; checked before: each is ignore_index or in [0, classes)
  bool target_is_int32;
  const void* probabilities;  // (rows, classes) of dtype instead of `target`, contiguous; else null
  const void* weight;         // (classes) acc, or null
  double weight_sum;          // of `weight`; `classes` without
  int64_t ignore_index;
  double label_smoothing, lse_square_scale, softcap;  // softcap 0: none
  void* loss;                                         // (rows) acc
  // (rows) acc each: the maximum of a row, and the log of its sum of exp(z - maximum). Kept apart: their sum, the
  // log-sum-exp, would round away what large logits leave of their differences.
  void* row_max;
  void* row_log_sum;
  // Gradient of sum_r scale row_scale_r loss_r, or null. May be the logits themselves.
  void* grad;
  int64_t grad_stride;
  double scale;
  const void* row_scale;  // (rows) acc, or null
  // Large gradients are streamed past the caches, and the blocks in which a row is summed then begin where its gradient
  // lets streaming begin. `fixed_blocks`: neither, so that a row's bits do not depend on where it stands.
  bool fixed_blocks;
  void* scratch;  // num_threads() * cross_entropy_scratch(classes) acc
};

constexpr int64_t kCrossEntropyBlock = 1024;
inline int64_t cross_entropy_scratch(int64_t classes) { return classes + classes / kCrossEntropyBlock + 64; }

struct CrossEntropyKernels {
  void (*forward)(const CrossEntropyRows&);   // writes loss, row_max, row_log_sum and, where asked, grad
  void (*backward)(const CrossEntropyRows&);  // reads row_max and row_log_sum, writes grad
};

// Position of the first class index that is neither ignore_index nor in [0, classes), or -1. `divisor` becomes the
// number of counted rows, or the sum of their weights (acc of dtype) where weight is not null.
int64_t check_targets(const void* target, bool is_int32, int64_t rows, int64_t classes, int64_t ignore_index,
                      DType dtype, const void* weight, double* divisor);

}  // namespace fastllm::cpu

FASTLLM_DECLARE_KERNELS(CrossEntropyKernels, cross_entropy)
