#pragma once
#include "isa.h"
#include "types.h"

namespace fastllm::cpu {

// Rows of logits and their statistics. "acc" is the accumulator of `dtype`: double for float64, else float.
//
// With z = x / T, or softcap tanh(x / softcap) / T, p their softmax and y the target:
//   log_prob = log p_y, entropy = -sum_c p_c log p_c, lse = log sum_c e^z_c, top_log_prob_k = log p_(t_k),
//   mean_logit = sum_c z_c / V, log_sum_sq_probs = log sum_c p_c^2
struct LogProbRows {
  DType dtype;
  int64_t rows, classes;
  const void* logits;  // rows of `classes` items, `logits_stride` items apart
  int64_t logits_stride;
  const void* target;  // (rows) int64 or int32; checked before: each is ignore_index or in [0, classes)
  bool target_is_int32;
  int64_t ignore_index;
  const void* temperature;  // (rows) acc, or null: `number` for all
  double number, softcap;   // softcap 0: none
  const int64_t* top_ids;   // (rows, tops), or null; those of counted rows are in [0, classes)
  int64_t tops;
  // Of each row, read by backward: the maximum of z T, log(sum e^z) - max z, and the same less the entropy. Apart, for
  // their sums would round away what a nearly certain row is about.
  void* max;
  void* log_sum;
  void* surprise;
  // Forward writes those that are not null: (rows) acc, argmax int64, top_log_prob (rows, tops) acc.
  void *log_prob, *entropy, *lse, *mean_logit, *log_sum_sq_probs, *top_log_prob;
  int64_t* argmax;
  // Backward: the incoming gradients, acc, or null; and the gradient of the logits, which may be the logits themselves.
  const void *grad_log_prob, *grad_entropy, *grad_lse, *grad_top_log_prob;
  void* grad;
  int64_t grad_stride;
  void* scratch;  // num_threads() * log_probs_scratch(tops) acc
};

constexpr int64_t kLogProbsBlock = 1024;  // classes of a row at a time
inline int64_t log_probs_scratch(int64_t tops) { return kLogProbsBlock + 3 * (tops + 1); }

struct LogProbsKernels {
  void (*forward)(const LogProbRows&);
  void (*backward)(const LogProbRows&);
};

}  // namespace fastllm::cpu

FASTLLM_DECLARE_KERNELS(LogProbsKernels, log_probs)
