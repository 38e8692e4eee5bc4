// relu_mlp: two linear layers with a ReLU between, as one autograd node. Only the hidden activation is kept: its sign
// is the mask, and the second layer's weight gradient needs it. In backward the hidden gradient is masked where it
// stands, in the pass that sums the first bias's gradient.
#include "linear_common.h"
#include "operations.h"

namespace fastllm {
namespace {

Tensor definition(const Tensor& input, const Tensor& weight1, const OptionalTensor& bias1, const Tensor& weight2,
                  const OptionalTensor& bias2) {
  return linear_definition(at::relu(linear_definition(input, weight1, bias1)), weight2, bias2);
}

// --- plain operations: input (M, K), weight1 (H, K), weight2 (N, H) ----------------------------------------------

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& input, const Tensor& weight1, const OptionalTensor& bias1,
                                       const Tensor& weight2, const OptionalTensor& bias2) {
  const Tensor hidden = linear_cpu(input, weight1, bias1, true);
  return {linear_cpu(hidden, weight2, bias2, false), hidden};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Each of hidden, input, weight1 and weight2 only where a gradient asked for reads it.
Gradients backward_cpu(const Tensor& grad_output, const OptionalTensor& hidden, const OptionalTensor& input,
                       const OptionalTensor& weight1, const OptionalTensor& weight2, bool need_input, bool need_weight1,
                       bool need_bias1, bool need_weight2, bool need_bias2) {
  const auto none = [&] { return at::empty({0}, grad_output.options()); };
  const MaskedGradient outer = mask_gradient(grad_output, std::nullopt, need_bias2, false);
  MaskedGradient inner;
  if (need_input || need_weight1 || need_bias1)
    inner = mask_gradient(row_product(outer.dz, *weight2), hidden, need_bias1, true);
  return {need_input ? row_product(inner.dz, *weight1) : none(), need_weight1 ? product(inner.dz.t(), *input) : none(),
          need_bias1 ? inner.bias : none(), need_weight2 ? product(outer.dz.t(), *hidden) : none(),
          need_bias2 ? outer.bias : none()};
}

constexpr Dispatched<"fastllm::relu_mlp_forward", decltype(forward_cpu)> forward_rows;
constexpr Dispatched<"fastllm::relu_mlp_backward", decltype(backward_cpu)> backward_rows;

// --- autograd ---------------------------------------------------------------------------------------------------

// The hidden activation is an output of the node that no caller sees: a second derivative reaches the first layer by
// its gradient, as it does in PyTorch's graph of single operations, and needs no bias for that.
class ReluMlpBackward : public torch::autograd::Function<ReluMlpBackward> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight1,
                               const OptionalTensor& bias1, const Tensor& weight2, const OptionalTensor& bias2) {
    at::AutoDispatchBelowADInplaceOrView below;
    backend::save(ctx);
    ctx->set_materialize_grads(false);
    const auto [output, hidden] = forward_rows(input, weight1, bias1, weight2, bias2);
    const bool inner = input.requires_grad() || weight1.requires_grad() || requires_grad(bias1);
    ctx->save_for_backward({where_needed(weight1.requires_grad(), input), where_needed(input.requires_grad(), weight1),
                            where_needed(inner, weight2), where_needed(inner || weight2.requires_grad(), hidden)});
    if (defined(bias1)) ctx->saved_data["bias1"] = true;
    if (defined(bias2)) ctx->saved_data["bias2"] = true;
    return {output, hidden};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const backend::Restored restored(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight1 = saved[1], &weight2 = saved[2], &hidden = saved[3];
    const Tensor &g = grad_outputs[0], &g_hidden = grad_outputs[1];
    size_t edge = 0;  // an absent bias has no edge in the graph
    const auto needed = [&](bool is_there) { return is_there && ctx->needs_input_grad(edge++); };
    const bool need_input = needed(true), need_weight1 = needed(true),
               need_bias1 = needed(ctx->saved_data.count("bias1") != 0), need_weight2 = needed(true),
               need_bias2 = needed(ctx->saved_data.count("bias2") != 0);
    if (at::GradMode::is_enabled() || g_hidden.defined() || !g.defined())
      return differentiable(g, g_hidden, input, weight1, weight2, hidden, need_input, need_weight1, need_bias1,
                            need_weight2, need_bias2);
    const auto [gi, gw1, gb1, gw2, gb2] =
        backward_rows(g, optional(hidden), optional(input), optional(weight1), optional(weight2), need_input,
                      need_weight1, need_bias1, need_weight2, need_bias2);
    return {where_needed(need_input, gi), where_needed(need_weight1, gw1), where_needed(need_bias1, gb1),
            where_needed(need_weight2, gw2), where_needed(need_bias2, gb2)};
  }

 private:
  // In PyTorch's operations, to be differentiated again, and for a gradient of the hidden activation. The mask has no
  // derivative.
  static variable_list differentiable(const Tensor& g, const Tensor& g_hidden, const Tensor& input,
                                      const Tensor& weight1, const Tensor& weight2, const Tensor& hidden,
                                      bool need_input, bool need_weight1, bool need_bias1, bool need_weight2,
                                      bool need_bias2) {
    variable_list grads(5);
    if (g.defined() && need_weight2) grads[3] = g.t().mm(hidden);
    if (g.defined() && need_bias2) grads[4] = g.sum(0);
    Tensor sum = g_hidden;
    const Tensor inner = g.defined() && weight2.defined() ? linear_definition(g, weight2.t(), std::nullopt) : Tensor();
    if (inner.defined()) sum = sum.defined() ? sum + inner : inner;
    if (!sum.defined() || !(need_input || need_weight1 || need_bias1)) return grads;
    const Tensor dz = at::threshold_backward(sum, hidden.detach(), 0);
    if (need_input) grads[0] = linear_definition(dz, weight1.t(), std::nullopt);
    if (need_weight1) grads[1] = dz.t().mm(input);
    if (need_bias1) grads[2] = dz.sum(0);
    return grads;
  }
};

TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("relu_mlp_forward", forward_cpu);
  m.impl("relu_mlp_backward", backward_cpu);
}

}  // namespace

// --- the operation ----------------------------------------------------------------------------------------------

Tensor relu_mlp(const Tensor& input, const Tensor& weight1, const OptionalTensor& bias1, const Tensor& weight2,
                const OptionalTensor& bias2) {
  check_given("relu_mlp", "weight2", weight2);
  const bool expands = broadcasts_bias(input, weight1, bias1);
  check_linear("relu_mlp", "input", input, "weight1", weight1, "bias1", expands ? std::nullopt : bias1);
  // One feature without a dimension, or a bias to be expanded: PyTorch's.
  if (expands || weight2.dim() == 1 || broadcasts_bias(input, weight2, bias2))
    return definition(input, weight1, bias1, weight2, bias2);
  TORCH_CHECK(weight2.dim() == 2 && weight2.sym_size(1) == weight1.sym_size(0),
              "relu_mlp: weight2 must be of shape (*, ", weight1.sym_size(0), ") for weight1 ", weight1.sym_sizes(),
              ", got ", weight2.sym_sizes());
  check_linear("relu_mlp", "weight1.t()", weight1.t(), "weight2", weight2, "bias2", bias2);
  const Tensor rows = as_rows(input);
  Tensor output;
  if (at::GradMode::is_enabled() && (rows.requires_grad() || weight1.requires_grad() || requires_grad(bias1) ||
                                     weight2.requires_grad() || requires_grad(bias2))) {
    output = ReluMlpBackward::apply(rows, weight1, bias1, weight2, bias2)[0];
  } else {
    at::AutoDispatchBelowADInplaceOrView below;
    output = std::get<0>(forward_rows(rows, weight1, bias1, weight2, bias2));
  }
  if (input.dim() == 2) return output;
  if (input.dim() == 1) return output.squeeze(0);
  std::vector<c10::SymInt> shape = input.sym_sizes().vec();
  shape.back() = weight2.sym_size(0);
  return output.view_symint(shape);
}

FASTLLM_OPERATION(relu_mlp)

}  // namespace fastllm
