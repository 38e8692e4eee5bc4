#pragma once
#include "launch.h"

namespace fastllm::cuda {

constexpr int64_t kMostLogProbsClasses = int64_t{1} << 30;  // columns are counted in 32 bits

// Statistics of rows of logits, and their gradient. "acc" is the accumulator of `dtype`; nothing here is on the host.
//
// With z = cap tanh(x / cap) / temperature, p = softmax(z) and y the target of a row:
//   log_prob = log p_y   entropy = -sum_c p_c log p_c   lse = log sum_c exp z_c   argmax: the lowest of the largest z
//   mean_logit = mean z  log_sum_sq_probs = log sum_c p_c^2                       top_log_prob_k = log p of id k
struct LogProbsRows {
  DType dtype;
  int64_t rows, classes;  // at most kMostLogProbsClasses
  const void* logits;     // rows of `classes` items, `logits_stride` items apart
  int64_t logits_stride;
  const void* target;  // (rows) int64 or int32
  bool target_is_int32;
  int64_t ignore_index;
  const void* temperature;  // (rows) acc, or null: `number`
  double number, softcap;   // softcap 0: none
  const int64_t* top_ids;   // (rows, top), contiguous
  int top;
  void* saved;  // (3, rows) acc: largest z, log sum exp(z - largest), entropy (0 where it is not asked for)

  // Forward: of acc, null where not asked for.
  void *log_prob, *entropy, *lse, *mean_logit, *log_sum_sq_probs;  // (rows)
  int64_t* argmax;                                                 // (rows)
  void* top_log_prob;                                              // (rows, top)

  // Backward: incoming gradients of acc, contiguous, null where there is none.
  const void *grad_log_prob, *grad_entropy, *grad_lse, *grad_top_log_prob;
  void* grad;  // of the logits, rows `grad_stride` items apart; may be the logits themselves
  int64_t grad_stride;
};

// Rows of ignore_index are not read: their results are 0, their argmax -1, their gradient 0.
Status log_probs_forward(const LogProbsRows& arguments, Stream stream);
Status log_probs_backward(const LogProbsRows& arguments, Stream stream);

}  // namespace fastllm::cuda
