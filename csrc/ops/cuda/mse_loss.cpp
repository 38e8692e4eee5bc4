// mse_loss on CUDA: the plain operations of the backend `cuda`. Kernels: csrc/cuda/mse_loss.cu.
#include "../../cuda/mse_loss.h"

#include "call.h"

namespace fastllm::cuda {
namespace {

// A tensor in the memory order of another, so that both are walked as flat arrays.
Tensor in_order(const Tensor& t, const Tensor& like) {
  if (t.strides() == like.strides()) return t;
  return at::empty_strided(like.sizes(), like.strides(), t.options()).copy_(t);
}

// One pass: the loss into `output` and the gradient into `grad`, each unless it is undefined.
void run(const char* op, const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
         const Tensor& output, const Tensor& grad, const Tensor& grad_output, bool correct) {
  const Call call(op, input);
  const Tensor x = input.is_non_overlapping_and_dense() ? input : input.clone();
  const Tensor t = in_order(target, x), w = defined(weight) ? in_order(*weight, x) : Tensor();
  const bool reduced = reduction != kNone;
  const Tensor incoming = reduced || !grad_output.defined() ? grad_output : in_order(grad_output.expand_as(input), x);
  const at::ScalarType acc = acc_dtype(input.scalar_type());
  Tensor divisor, partial;
  if (reduction == kMean)
    divisor = w.defined() ? w.sum(acc) : at::full({}, static_cast<double>(x.numel()), x.options().dtype(acc));
  if (reduced && output.defined()) partial = call.empty({mse_loss_blocks(x.numel())}, acc);
  call.check(mse_loss({dtype_tag(x), x.numel(), call.in(x), call.in(t), call.in(w), reduced, call.in(divisor),
                       call.in(incoming), correct, call.out(output), call.out(grad), call.out(partial)},
                      call.stream()));
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                   int64_t reduction, bool need_grad) {
  const Call call("mse_loss", input);
  const bool with_grad = need_grad && reduction != kNone;
  const Tensor output = reduction == kNone ? call.empty_like(input) : call.empty({}, input.scalar_type());
  const Tensor grad = with_grad ? call.empty_like(input) : Tensor();
  run("mse_loss", input, target, weight, reduction, output, grad, Tensor(), false);
  return {output, with_grad ? grad : call.none(input.scalar_type())};
}

Tensor backward(const Tensor& grad_output, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                int64_t reduction) {
  const Tensor grad = Call("mse_loss", input).empty_like(input);
  run("mse_loss_backward", input, target, weight, reduction, Tensor(), grad, grad_output, false);
  return grad;
}

// `grad` holds the gradient for an incoming gradient of 1: a kernel forms it anew for another.
void correct_(const Tensor& grad_output, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
              int64_t reduction, const Tensor& grad) {
  run("mse_loss_backward", input, target, weight, reduction, Tensor(), grad, grad_output, true);
}

TORCH_LIBRARY_IMPL(fastllm_cuda, FASTLLM_CUDA_KEY, m) {
  m.impl("mse_loss_forward", forward);
  m.impl("mse_loss_backward", backward);
  m.impl("mse_loss_correct_", correct_);
}

}  // namespace
}  // namespace fastllm::cuda
