// linear_relu: checks and autograd node. Kernels: csrc/cpu/linear_relu.cpp and the library's matrix product.
#include "linear_common.h"
#include "operations.h"

namespace fastllm {
namespace {

Tensor definition(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return at::relu(linear_definition(input, weight, bias));
}

// --- plain operations: input (M, K), weight (N, K), bias (N) -----------------------------------------------------

Tensor forward_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return linear_cpu(input, weight, bias, true);
}

// input only for the gradient of weight, weight only for that of input.
std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_output, const Tensor& output,
                                                const OptionalTensor& input, const OptionalTensor& weight,
                                                bool need_input, bool need_weight, bool need_bias) {
  const MaskedGradient g = mask_gradient(grad_output, output, need_bias, false);
  const auto none = [&] { return pool::empty({0}, output.scalar_type()); };
  return {need_input ? row_product(g.dz, *weight) : none(), need_weight ? product_of_turned(g.dz, *input) : none(),
          need_bias ? g.bias : none()};
}

constexpr Dispatched<"fastllm::linear_relu_forward", decltype(forward_cpu)> forward_rows;
constexpr Dispatched<"fastllm::linear_relu_backward", decltype(backward_cpu)> backward_rows;

// --- autograd ---------------------------------------------------------------------------------------------------

// Saved are the output, whose sign is the mask, and what the gradients asked for read: as by PyTorch's linear and relu.
class LinearReluBackward : public torch::autograd::Function<LinearReluBackward> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    backend::save(ctx);
    const Tensor output = forward_rows(input, weight, bias);
    variable_list saved{where_needed(weight.requires_grad(), input), where_needed(input.requires_grad(), weight),
                        output};
    if (defined(bias)) saved.emplace_back();  // says that there is one, and so an edge for its gradient
    ctx->save_for_backward(std::move(saved));
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const backend::Restored restored(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &output = saved[2], &g = grad_outputs[0];
    const bool need_input = ctx->needs_input_grad(0), need_weight = ctx->needs_input_grad(1),
               need_bias = saved.size() == 4 && ctx->needs_input_grad(2);
    if (at::GradMode::is_enabled()) {
      // In PyTorch's operations, to be differentiated again. The mask has no derivative.
      const Tensor dz = at::threshold_backward(g, output.detach(), 0);
      return {need_input ? linear_definition(dz, weight.t(), std::nullopt) : Tensor(),
              need_weight ? dz.t().mm(input) : Tensor(), need_bias ? dz.sum(0) : Tensor()};
    }
    const auto [gi, gw, gb] =
        backward_rows(g, output, optional(input), optional(weight), need_input, need_weight, need_bias);
    return {where_needed(need_input, gi), where_needed(need_weight, gw), where_needed(need_bias, gb)};
  }
};

TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("linear_relu_forward", forward_cpu);
  m.impl("linear_relu_backward", backward_cpu);
}

}  // namespace

// --- the operation ----------------------------------------------------------------------------------------------

Tensor linear_relu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  check_given("linear_relu", "weight", weight);
  // One feature without a dimension, or a bias to be expanded: PyTorch's.
  if (weight.dim() == 1 || broadcasts_bias(input, weight, bias)) return definition(input, weight, bias);
  check_linear("linear_relu", "input", input, "weight", weight, "bias", bias);
  const Tensor rows = as_rows(input);
  Tensor output;
  if (at::GradMode::is_enabled() && (rows.requires_grad() || weight.requires_grad() || requires_grad(bias))) {
    output = LinearReluBackward::apply(rows, weight, bias);
  } else {
    at::AutoDispatchBelowADInplaceOrView below;
    output = forward_rows(rows, weight, bias);
  }
  if (input.dim() == 2) return output;
  if (input.dim() == 1) return output.squeeze(0);
  std::vector<c10::SymInt> shape = input.sym_sizes().vec();
  shape.back() = weight.sym_size(0);
  return output.view_symint(shape);
}

Tensor call(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastllm::linear_relu", "").typed<decltype(linear_relu)>();
  return op.call(input, weight, bias);
}

FASTLLM_OPERATION(linear_relu)

}  // namespace fastllm
