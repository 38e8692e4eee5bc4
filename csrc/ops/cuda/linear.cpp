// linear_relu and relu_mlp on CUDA: the plain operations of the backend `cuda`. Kernels: csrc/cuda/linear_relu.cu.
#include "../../cuda/linear_relu.h"
#include "call.h"

namespace fastllm::cuda {
namespace {

// a b by PyTorch's library.
Tensor product(const Call& call, const Tensor& a, const Tensor& b) {
  Tensor out = call.empty({a.size(0), b.size(1)}, a.scalar_type());
  return at::mm_out(out, a, b);
}

// input weight^T + bias, rounded once, by PyTorch's library.
Tensor linear(const Call& call, const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  if (!defined(bias)) return product(call, input, weight.t());
  Tensor out = call.empty({input.size(0), weight.size(0)}, input.scalar_type());
  return at::addmm_out(out, *bias, input, weight.t());
}

// relu(input weight^T + bias). bfloat16 and float16 add the bias to the product's float32 sums, so that they round
// once; float32 and float64 add it in the pass that takes the ReLU.
Tensor linear_relu(const Call& call, const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const bool late_bias = input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble;
  const Tensor y = linear(call, input, weight, late_bias ? std::nullopt : bias);
  const Tensor b = late_bias && defined(bias) ? bias->contiguous() : Tensor();
  call.check(bias_relu({dtype_tag(y), y.size(0), y.size(1), call.out(y), call.in(b)}, call.stream()));
  return y;
}

struct Masked {
  Tensor dz, sums;
};

// dz = dy where y is not <= 0 (over dy where `in_place`), and its sum over rows where asked. Without y, dz is dy.
Masked mask(const Call& call, const Tensor& dy, const OptionalTensor& y, bool need_sums, bool in_place) {
  const Tensor from = dy.contiguous(), output = defined(y) ? y->contiguous() : Tensor();
  Masked result{!output.defined() || in_place ? from : call.empty_like(from), call.none(dy.scalar_type())};
  if (!output.defined() && !need_sums) return result;
  const at::ScalarType acc = acc_dtype(from.scalar_type());
  MaskGradient m{dtype_tag(from), from.size(0),    from.size(1),
                 call.in(from),   call.in(output), output.defined() ? call.out(result.dz) : nullptr,
                 nullptr};
  Tensor partial;
  if (need_sums) {
    partial = call.empty({mask_sums(m), m.columns}, acc);
    m.partial = call.out(partial);
    result.sums = call.empty({m.columns}, from.scalar_type());
  }
  call.check(mask_gradient(m, call.stream()));
  if (need_sums)
    call.check(
        finish_column_sums({m.dtype, partial.size(0), m.columns, m.partial, call.out(result.sums)}, call.stream()));
  return result;
}

// --- linear_relu: input (M, K), weight (N, K), bias (N) -----------------------------------------------------------

Tensor linear_relu_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const Call call("linear_relu", input);
  return linear_relu(call, input, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_backward(const Tensor& grad_output, const Tensor& output,
                                                        const Tensor& input, const Tensor& weight, bool need_input,
                                                        bool need_weight, bool need_bias) {
  const Call call("linear_relu_backward", input);
  const Tensor none = call.none(input.scalar_type());
  const Masked g = mask(call, grad_output, output, need_bias, false);
  return {need_input ? product(call, g.dz, weight) : none, need_weight ? product(call, g.dz.t(), input) : none, g.sums};
}

// --- relu_mlp: input (M, K), weight1 (H, K), weight2 (N, H) -------------------------------------------------------

std::tuple<Tensor, Tensor> relu_mlp_forward(const Tensor& input, const Tensor& weight1, const OptionalTensor& bias1,
                                            const Tensor& weight2, const OptionalTensor& bias2) {
  const Call call("relu_mlp", input);
  const Tensor hidden = linear_relu(call, input, weight1, bias1);
  return {linear(call, hidden, weight2, bias2), hidden};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients relu_mlp_backward(const Tensor& grad_output, const Tensor& hidden, const Tensor& input, const Tensor& weight1,
                            const Tensor& weight2, bool need_input, bool need_weight1, bool need_bias1,
                            bool need_weight2, bool need_bias2) {
  const Call call("relu_mlp_backward", input);
  const Tensor none = call.none(input.scalar_type());
  Masked inner{none, none};
  if (need_input || need_weight1 || need_bias1)
    inner = mask(call, product(call, grad_output, weight2), hidden, need_bias1, true);
  return {need_input ? product(call, inner.dz, weight1) : none,
          need_weight1 ? product(call, inner.dz.t(), input) : none, inner.sums,
          need_weight2 ? product(call, grad_output.t(), hidden) : none,
          mask(call, grad_output, std::nullopt, need_bias2, false).sums};
}

TORCH_LIBRARY_IMPL(fastllm_cuda, FASTLLM_CUDA_KEY, m) {
  m.impl("linear_relu_forward", linear_relu_forward);
  m.impl("linear_relu_backward", linear_relu_backward);
  m.impl("relu_mlp_forward", relu_mlp_forward);
  m.impl("relu_mlp_backward", relu_mlp_backward);
}

}  // namespace
}  // namespace fastllm::cuda
