#pragma once
#include "launch.h"

namespace fastllm::cuda {

constexpr int64_t kMostClasses = int64_t{1} << 30;  // columns are counted in 32 bits

// Rows of logits and what is asked of them. "acc" is the accumulator of `dtype`; nothing here is on the host.
//
// With z the (softcapped) logits of a row, p their softmax, y its class, w the class weights, e the smoothing:
//   loss = (1 - e) w_y (lse - z_y) + e/V sum_c w_c (lse - z_c) + s lse^2
// and for class probabilities q: loss = sum_c w_c q'_c (lse - z_c) + s lse^2, q' = (1 - e) q + e/V.
struct CrossEntropy {
  DType dtype;
  int64_t rows, classes;  // at most kMostClasses
  const void* logits;     // rows of `classes` items, `logits_stride` items apart
  int64_t logits_stride;
  const void* target;  // (rows) class indices, int64 or int32
  bool target_is_int32;
  const void* probabilities;  // (rows, classes) of dtype instead of `target`, contiguous; else null
  const void* weight;         // (classes) acc, or null
  const void* weight_sum;     // acc, the sum of `weight`; null without weight or smoothing
  int64_t ignore_index;
  double label_smoothing, lse_square_scale, softcap;  // softcap 0: none
  void* loss;                                         // (rows) acc
  void *row_max, *row_log_sum;                        // (rows) acc: maximum, log of the sum of exp(z - maximum)
  // Gradient of sum_r incoming_r loss_r / divisor, or null. May be the logits themselves.
  void* grad;
  int64_t grad_stride;
  const void* incoming;  // of dtype or acc; null: 1
  bool incoming_is_acc;
  int64_t incoming_stride;  // items from row to row; 0: one item for all
  const void* divisor;      // acc, one; null: 1
  bool correct;             // backward: nothing is written where the (one) incoming gradient is 1
  int cluster;              // forward: cross_entropy_cluster(...)
  int multiprocessors;      // of the device
};

// The forward pass: how many blocks hold a row in their registers together. 0: no number of them can, or the rows are
// better read by one block each, part by part, or the current device has no room for so large a cluster.
// capability: 90 for sm_90.
int cross_entropy_cluster(const CrossEntropy& arguments, int capability);
// Whether a cluster of so many blocks can hold a row.
bool cross_entropy_fits(DType dtype, int64_t classes, int cluster);

// Writes loss, row_max, row_log_sum and, where asked, grad. Rows of ignore_index are not read.
Status cross_entropy_forward(const CrossEntropy& arguments, Stream stream);
// Reads row_max and row_log_sum, writes grad.
Status cross_entropy_backward(const CrossEntropy& arguments, Stream stream);

// Sums over rows, in an order that depends on their number alone. Partial sums: cross_entropy_partials(rows) doubles.
int64_t cross_entropy_partials(int64_t rows);
// divisor (acc of dtype) = the number of rows that are not ignored, or the sum of their weights.
Status cross_entropy_divisor(DType dtype, const void* target, bool target_is_int32, int64_t rows, int64_t classes,
                             int64_t ignore_index, const void* weight, void* partial, void* divisor, Stream stream);
// output (of dtype) = sum of loss (rows, acc) over divisor (acc; null: 1).
Status cross_entropy_reduce(DType dtype, const void* loss, int64_t rows, const void* divisor, void* partial,
                            void* output, Stream stream);

}  // namespace fastllm::cuda
