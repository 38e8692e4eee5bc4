// cross_entropy on CUDA: the plain operations of the backend `cuda`. Kernels: csrc/cuda/cross_entropy.cu.
#include "row_loss.h"
#include "row_product.h"

namespace fastllm::cuda {
namespace {

constexpr const char* kOp = "cross_entropy";

// Logits whose rows are contiguous and apart.
Tensor walkable(const Tensor& logits) {
  const bool apart = logits.size(0) < 2 || logits.stride(0) >= logits.size(1);
  return apart && (logits.stride(1) == 1 || logits.size(1) < 2) ? logits : logits.contiguous();
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                           const LossOptions& options, bool need_grad) {
  const Call call(kOp, input);
  const at::ScalarType dtype = input.scalar_type(), acc = acc_dtype(dtype);
  const RowLoss rows(call, kOp, dtype, input.size(1), target, weight, options);
  const Tensor logits = aligned_rows(walkable(input));
  const Tensor loss = call.empty({input.size(0)}, acc), softmax = call.empty({2, input.size(0)}, acc);
  const bool with_grad = need_grad && options.reduction != kNone;
  const Tensor grad = with_grad ? call.empty(input.sizes(), dtype) : Tensor();
  rows.forward(logits, 0, loss, softmax, grad, Tensor());
  return {rows.reduced(loss, dtype), softmax, with_grad ? grad : at::empty({0, 0}, input.options())};
}

void backward_into(const Tensor& grad_output, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                   const Tensor& softmax, const LossOptions& options, const Tensor& grad, bool correct) {
  const Call call("cross_entropy_backward", input);
  const RowLoss rows(call, kOp, input.scalar_type(), input.size(1), target, weight, options);
  rows.backward(aligned_rows(walkable(input)), softmax.contiguous(), grad, grad_output, correct);
}

Tensor backward(const Tensor& grad_output, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                const Tensor& softmax, const LossOptions& options) {
  const Tensor grad = Call(kOp, input).empty(input.sizes(), input.scalar_type());
  backward_into(grad_output, input, target, weight, softmax, options, grad, false);
  return grad;
}

void backward_inplace(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                      const OptionalTensor& weight, const Tensor& softmax, const LossOptions& options) {
  TORCH_CHECK(walkable(input).is_same(input),
              "cross_entropy_backward_: input's rows must be contiguous and apart, got strides ", input.strides());
  backward_into(grad_output, input, target, weight, softmax, options, input, false);
}

// `grad` holds the gradient for an incoming gradient of 1: a kernel forms it anew for another.
void correct_(const Tensor& grad_output, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
              const Tensor& softmax, const LossOptions& options, const Tensor& grad) {
  backward_into(grad_output, input, target, weight, softmax, options, grad, true);
}

TORCH_LIBRARY_IMPL(fastllm_cuda, FASTLLM_CUDA_KEY, m) {
  m.impl("cross_entropy_forward", flat<&forward>);
  m.impl("cross_entropy_backward", flat<&backward>);
  m.impl("cross_entropy_backward_", flat<&backward_inplace>);
  m.impl("cross_entropy_correct_", flat<&correct_>);
}

}  // namespace
}  // namespace fastllm::cuda
