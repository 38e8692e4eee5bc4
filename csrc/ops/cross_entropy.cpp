// cross_entropy: checks and autograd node. Kernels: csrc/cpu/cross_entropy.cpp.
#include "cross_entropy_common.h"
#include "operations.h"

namespace fastllm {
namespace {

// --- plain operations: logits (N, C), target (N) class indices or (N, C) probabilities of the logits' dtype ------

Tensor with_unit_stride(const Tensor& logits) {
  const bool rows_apart = logits.size(0) < 2 || logits.stride(0) >= logits.size(1);
  return rows_apart && (logits.stride(1) == 1 || logits.size(1) < 2) ? logits : logits.contiguous();
}

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                               const LossOptions& options, bool need_grad) {
  const Tensor logits = with_unit_stride(input);
  const RowLoss rows("cross_entropy", input.scalar_type(), input.size(1), target, weight, options);
  const at::ScalarType dtype = input.scalar_type(), acc = acc_dtype(dtype);
  const Tensor loss = pool::empty({input.size(0)}, acc), softmax = pool::empty({2, input.size(0)}, acc);
  const bool with_grad = need_grad && options.reduction != kNone;
  const Tensor grad = with_grad ? pool::empty(input.sizes(), dtype) : pool::empty({0, 0}, dtype);
  rows.forward(logits, 0, loss, softmax, with_grad ? grad : Tensor(), rows.reduced(1), Tensor());
  return {rows.reduced(loss, dtype), softmax, grad};
}

void backward_into(const Tensor& grad_output, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                   const Tensor& softmax, const LossOptions& options, const Tensor& grad) {
  const RowLoss rows("cross_entropy", logits.scalar_type(), logits.size(1), target, weight, options);
  if (options.reduction == kNone)
    rows.backward(logits, 0, softmax, grad, 1, grad_output.to(softmax.scalar_type()).contiguous());
  else
    rows.backward(logits, 0, softmax, grad, rows.reduced(number_in(grad_output)), Tensor());
}

Tensor backward_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                    const Tensor& softmax, const LossOptions& options) {
  const Tensor grad = pool::empty(input.sizes(), input.scalar_type());
  backward_into(grad_output, with_unit_stride(input), target, weight, softmax, options, grad);
  return grad;
}

void backward_inplace_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                          const OptionalTensor& weight, const Tensor& softmax, const LossOptions& options) {
  TORCH_CHECK(with_unit_stride(input).is_same(input),
              "cross_entropy_backward_: input's rows must be contiguous and apart, got strides ", input.strides());
  backward_into(grad_output, input, target, weight, softmax, options, input);
}

// `grad` holds the gradient for an incoming gradient of 1: it is formed anew for another.
void correct_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                 const Tensor& softmax, const LossOptions& options, const Tensor& grad) {
  if (number_in(grad_output) == 1.0) return;
  backward_into(grad_output, with_unit_stride(input), target, weight, softmax, options, grad);
}

constexpr Dispatched<"fastllm::cross_entropy_forward", decltype(forward_cpu)> forward_op;
constexpr Dispatched<"fastllm::cross_entropy_backward", decltype(backward_cpu)> backward_op;
constexpr Dispatched<"fastllm::cross_entropy_backward_", decltype(backward_inplace_cpu)> backward_inplace_op;
constexpr Dispatched<"fastllm::cross_entropy_correct_", decltype(correct_cpu)> correct_op;

// --- autograd ---------------------------------------------------------------------------------------------------

// Under `mean` and `sum` the gradient is formed in the forward pass for an incoming gradient of 1. Another incoming
// gradient, a fake tensor, `none` or inplace_backward forms it in backward from the saved logits and their rows'
// maximum and sum: never by scaling what was rounded before, which in float16 may have vanished. On a device nothing
// waits for the incoming gradient's value: a kernel reads it there, and leaves the gradient as it is where it is 1.
class CrossEntropyBackward : public torch::autograd::Function<CrossEntropyBackward> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                        const LossOptions& options, bool inplace) {
    at::AutoDispatchBelowADInplaceOrView below;
    backend::save(ctx);
    const bool early = options.reduction != kNone && !inplace && input.requires_grad() && !target.requires_grad() &&
                       is_concrete(input, target);
    auto [output, softmax, grad] = forward_op(input, target, weight, options, early);
    ctx->save_for_backward({input, target, weight.value_or(Tensor()), softmax});
    save_options(ctx, options, inplace);
    if (early) keep_formed(ctx, "grad", grad);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const backend::Restored restored(ctx);
    const Tensor& g = grad_outputs[0];
    variable_list grads(5);
    const bool formed = has_formed(ctx, "grad") && is_concrete(g) && !at::GradMode::is_enabled();
    if (formed && is_one(g)) {
      grads[0] = take_formed(ctx, "grad");
      return grads;
    }
    int64_t inplace;
    const LossOptions o = saved_options(ctx, &inplace);
    TORCH_CHECK(!ctx->saved_data.count("overwritten"),
                "cross_entropy: a second backward through logits that inplace_backward=True has overwritten with their "
                "gradient; use inplace_backward=False to keep the graph");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &target = saved[1], &softmax = saved[3];
    const OptionalTensor weight = optional(saved[2]);
    const bool need_input = ctx->needs_input_grad(0), need_target = ctx->needs_input_grad(1);
    if (at::GradMode::is_enabled() || need_target) {
      // Second derivatives, and the gradient of class probabilities: by the definition.
      const variable_list found =
          differentiate([&](const variable_list& a) { return cross_entropy_definition(a[0], a[1], weight, o); },
                        {input, target}, {need_input, need_target}, g);
      drop_formed(ctx, "grad");
      grads[0] = found[0];
      grads[1] = found[1];
      return grads;
    }
    if (inplace != 0 && is_concrete(input, g)) {
      const Tensor storage = input.detach();
      backward_inplace_op(g, storage, target, weight, softmax, o);
      storage.unsafeGetTensorImpl()->bump_version();  // whoever else saved the logits is told
      ctx->saved_data["overwritten"] = true;
      grads[0] = storage;
      return grads;
    }
    at::AutoDispatchBelowADInplaceOrView below;
    if (formed) {
      grads[0] = take_formed(ctx, "grad");
      correct_op(g, input, target, weight, softmax, o, grads[0]);
      return grads;
    }
    drop_formed(ctx, "grad");
    grads[0] = backward_op(g, input, target, weight, softmax, o);
    return grads;
  }
};

// --- the operation ----------------------------------------------------------------------------------------------

void check_shapes(const Tensor& input, const Tensor& target, bool probabilities) {
  TORCH_CHECK_INDEX(input.dim() >= 1, "cross_entropy: input must have at least 1 dimension, got ", input.dim());
  TORCH_CHECK(input.device() == target.device(), "cross_entropy: target must be on input's device ", input.device(),
              ", got ", target.device());
  if (probabilities) return;
  if (input.dim() == 1) {
    TORCH_CHECK_VALUE(target.dim() == 0 || (target.dim() == 1 && target.sym_size(0) == 1),
                      "cross_entropy: target must be of shape () or (1,) for input of shape ", input.sym_sizes(),
                      ", got ", target.sym_sizes());
    return;
  }
  TORCH_CHECK_VALUE(target.dim() > 0 && input.sym_size(0) == target.sym_size(0),
                    "cross_entropy: target must have input's batch size ", input.sym_size(0), ", got ",
                    target.sym_sizes());
  bool match = target.dim() == input.dim() - 1;
  for (int64_t d = 2; match && d < input.dim(); ++d) match = target.sym_size(d - 1) == input.sym_size(d);
  TORCH_CHECK(match, "cross_entropy: target must be of input's shape ", input.sym_sizes(),
              " without its class dimension, or of that shape with class probabilities, got ", target.sym_sizes());
}

TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("cross_entropy_forward", flat<&forward_cpu>);
  m.impl("cross_entropy_backward", flat<&backward_cpu>);
  m.impl("cross_entropy_backward_", flat<&backward_inplace_cpu>);
  m.impl("cross_entropy_correct_", flat<&correct_cpu>);
}

}  // namespace

Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                     const LossOptions& options, bool inplace_backward) {
  check_options("cross_entropy", options);
  check_given("cross_entropy", "input", input);
  check_given("cross_entropy", "target", target);
  const bool probabilities = input.sym_sizes() == target.sym_sizes();
  TORCH_CHECK(!probabilities || target.is_floating_point(),
              "cross_entropy: target of class probabilities must be floating point, got ", target.scalar_type());
  check_shapes(input, target, probabilities);
  TORCH_CHECK_NOT_IMPLEMENTED(is_served_dtype(input.scalar_type()),
                              "cross_entropy: input must be float32, float64, bfloat16 or float16, got ",
                              input.scalar_type());
  const auto classes = input.sym_size(input.dim() == 1 ? 0 : 1);
  Tensor x = input, y = target;
  OptionalTensor w = weight;
  if (probabilities) {
    TORCH_CHECK(options.ignore_index < 0, "cross_entropy: ignore_index is not supported for class probabilities, got ",
                options.ignore_index);
    const at::ScalarType dtype = probability_dtype(input, target, weight);
    x = x.to(dtype);
    y = y.to(dtype);
    if (defined(weight)) w = weight->to(dtype);
  } else {
    y = checked_indices("cross_entropy", target);
  }
  check_class_weight("cross_entropy", w, x, classes);
  const bool weight_gradient = requires_grad(w) && at::GradMode::is_enabled();
  TORCH_CHECK(probabilities || !weight_gradient,
              "cross_entropy: weight must not require a gradient (pass weight.detach()), got one that does");
  // Rows of classes: (C) -> (1, C), (N, C, d1, ...) -> (N d1 ..., C).
  const bool spatial = input.dim() > 2;
  if (input.dim() == 1) {
    x = x.unsqueeze(0);
    if (probabilities || y.dim() == 0) y = y.unsqueeze(0);
  } else if (spatial) {
    x = x.movedim(1, -1).flatten(0, -2);
    y = probabilities ? y.movedim(1, -1).flatten(0, -2) : y.flatten();
  }
  Tensor output;
  if (probabilities && (weight_gradient || classes == 0)) {
    // PyTorch differentiates by the weights here, but not with class indices.
    output = cross_entropy_definition(x, y, w, options);
  } else if (at::GradMode::is_enabled() && (x.requires_grad() || y.requires_grad())) {
    // In place only over rows that a kernel can walk: other layouts get a copy of their own to overwrite.
    const bool overwrite = inplace_backward && is_concrete(x);
    if (overwrite && !with_unit_stride(x).is_same(x)) x = x.contiguous();
    output = CrossEntropyBackward::apply(x, y, w, options, inplace_backward);
  } else {
    at::AutoDispatchBelowADInplaceOrView below;
    output = std::get<0>(forward_op(x, y, w, options, false));
  }
  if (options.reduction != kNone) return output;
  if (input.dim() == 1) return output.squeeze(0);
  if (!spatial) return output;
  std::vector<c10::SymInt> shape = input.sym_sizes().vec();
  shape.erase(shape.begin() + 1);
  return output.reshape_symint(shape);
}

FASTLLM_OPERATION(cross_entropy)

}  // namespace fastllm
