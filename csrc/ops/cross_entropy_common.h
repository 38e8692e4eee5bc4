// What cross_entropy and linear_cross_entropy share: options, argument checks, the definition, the call of the kernel.
#pragma once
#include <limits>

#include "../cpu/cross_entropy.h"
#include "../cpu/linear_cross_entropy.h"
#include "../cpu/parallel.h"
#include "common.h"

namespace fastllm {

struct CrossEntropyOptions {
  int64_t reduction, ignore_index;
  double label_smoothing, lse_square_scale, softcap;  // softcap 0: none
};

CrossEntropyOptions checked_options(const char* op, int64_t reduction, int64_t ignore_index, double label_smoothing,
                                    double lse_square_scale, std::optional<double> softcap);

// Options and up to 32 flags of a node. Numbers are stored only where they are not the default: an entry costs as much
// as a small tensor.
void save_options(AutogradContext* ctx, const CrossEntropyOptions& options, int64_t flags);
CrossEntropyOptions saved_options(AutogradContext* ctx, int64_t* flags);

// The definition in PyTorch's differentiable operations; logits (N, C), target (N) or (N, C), in logits' dtype.
at::Tensor cross_entropy_definition(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                                    const CrossEntropyOptions& options);

// Class indices of a kind that the kernels read: int64 or int32, contiguous. RuntimeError for another dtype.
at::Tensor checked_indices(const char* op, const at::Tensor& target);

// RuntimeError unless weight is undefined or holds one number of logits' dtype for each class.
void check_class_weight(const char* op, const OptionalTensor& weight, const at::Tensor& like,
                        const c10::SymInt& classes);

// The dtype of a loss with class probabilities: PyTorch multiplies logits, probabilities and weights, and promotes.
at::ScalarType probability_dtype(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight);

// A loss over rows, prepared on the CPU: targets checked (IndexError), divisor and weights known.
class RowLoss {
 public:
  // target (N) class indices or (N, C) probabilities of dtype `dtype`.
  RowLoss(const char* op, at::ScalarType dtype, int64_t classes, const at::Tensor& target, const OptionalTensor& weight,
          const CrossEntropyOptions& options);

  // Loss (rows), softmax (2, rows: maximum, log of the sum) of logits (rows, C), which are rows [first, first + rows)
  // of the whole; with a defined grad (rows, C), which may be the logits, also the gradient of sum_r scale row_scale_r
  // loss_r.
  void forward(const at::Tensor& logits, int64_t first, const at::Tensor& loss, const at::Tensor& softmax,
               const at::Tensor& grad, double scale, const at::Tensor& row_scale) const;
  void backward(const at::Tensor& logits, int64_t first, const at::Tensor& softmax, const at::Tensor& grad,
                double scale, const at::Tensor& row_scale) const;

  // Whether the loss is that of the kernel for few features, and its part of that kernel's arguments.
  bool is_skinny() const;
  void describe(cpu::SkinnyLoss* loss) const;

  // For `mean` x over the count of rows or the sum of their weights: NaN where that is 0, for the definition then
  // divides 0 by 0 in one of its terms; else x.
  double reduced(double x) const { return divisor_ == 0 ? std::numeric_limits<double>::quiet_NaN() : x / divisor_; }
  // The reduced loss as a 0-dim tensor of `dtype`, or for `none` the rows' losses.
  at::Tensor reduced(const at::Tensor& loss, at::ScalarType dtype) const;

 private:
  cpu::CrossEntropyRows rows(const at::Tensor& logits, int64_t first, const at::Tensor& softmax, const at::Tensor& grad,
                             double scale, const at::Tensor& row_scale) const;

  CrossEntropyOptions options_;
  DType dtype_;
  int64_t classes_;
  bool probabilities_;
  at::Tensor target_, weight_;
  mutable at::Tensor scratch_;  // made when a row kernel first needs it
  double weight_sum_, divisor_ = 1;
};

}  // namespace fastllm
