// What cross_entropy and linear_cross_entropy share on CUDA: the call of the row kernel.
#pragma once
#include "../../cuda/cross_entropy.h"
#include "../operation.h"
#include "call.h"

namespace fastllm::cuda {

// A loss over rows, prepared on the device: class weights as accumulators, the divisor of the mean.
//
// FASTLLM_CUDA_STRATEGY makes the forward pass walk rows in one way, for tests and measurements: `row` (a block holds a
// row), `cluster2`, `cluster4`, `cluster8`, `cluster16` (so many blocks hold a row), `passes` (a row is read again for
// its gradient). A RuntimeError where rows do not fit. It is read once; where kernels are played on the host, by every
// call.
class RowLoss {
 public:
  // target (N) class indices or (N, C) probabilities of dtype `dtype`.
  RowLoss(const Call& call, const char* op, at::ScalarType dtype, int64_t classes, const Tensor& target,
          const OptionalTensor& weight, const LossOptions& options);

  // Loss (rows), softmax (2, rows: maximum, log of the sum) of logits (rows, C), which are rows [first, first + rows)
  // of the whole; with a defined grad (rows, C), which may be the logits, also the gradient of the reduced loss for an
  // incoming gradient of () or, without reduction, (rows); undefined: 1.
  void forward(const Tensor& logits, int64_t first, const Tensor& loss, const Tensor& softmax, const Tensor& grad,
               const Tensor& incoming) const;
  // grad from softmax; `correct`: unless the incoming gradient is 1.
  void backward(const Tensor& logits, const Tensor& softmax, const Tensor& grad, const Tensor& incoming,
                bool correct) const;

  // The reduced loss as a 0-dim tensor of `dtype`, or for `none` the rows' losses.
  Tensor reduced(const Tensor& loss, at::ScalarType dtype) const;

 private:
  CrossEntropy rows(const Tensor& logits, int64_t first, const Tensor& softmax, const Tensor& grad,
                    const Tensor& incoming) const;
  Tensor divisor() const;

  const Call& call_;
  const char* op_;
  LossOptions options_;
  DType dtype_;
  int64_t classes_;
  bool probabilities_;
  Tensor target_, weight_, weight_sum_, divisor_;
};

}  // namespace fastllm::cuda
