// mse_loss: checks, autograd node, fake kernels. Kernels: csrc/cpu/mse_loss.cpp.
#include "../cpu/mse_loss.h"

#include <ATen/autocast_mode.h>

#include "common.h"

FASTLLM_DEFINE_DISPATCH(MseLossKernels, mse_loss)

namespace fastllm {
namespace {

// The definition, in differentiable operations.
Tensor definition(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction) {
  if (!defined(weight)) return at::mse_loss(input, target, reduction);
  const Tensor squares = (input - target).square() * *weight;
  if (reduction == kNone) return squares;
  return reduction == kSum ? squares.sum() : squares.sum() / weight->sum();
}

// --- plain operations: (input, target, weight) of one shape and dtype -------------------------------------------

// Operands in one memory order, so that a kernel may walk them as flat arrays.
struct Flat {
  Tensor input, target, weight;
  Flat(const Tensor& x, const Tensor& t, const OptionalTensor& w) {
    input = x.is_non_overlapping_and_dense() ? x : x.clone();  // strides as empty_like gives them
    target = in_order(t);
    if (defined(w)) weight = in_order(*w);
  }
  Tensor in_order(const Tensor& t) const {
    if (t.strides() == input.strides()) return t;
    Tensor copy = at::empty_strided(input.sizes(), input.strides(), t.options());
    return copy.copy_(t);
  }
  const void* weight_data() const { return weight.defined() ? weight.const_data_ptr() : nullptr; }
  Tensor partial() const { return at::empty({cpu::mse_blocks(input.numel())}, input.options().dtype(at::kDouble)); }
};

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                       int64_t reduction, bool need_grad) {
  const Flat flat(input, target, weight);
  const bool with_grad = need_grad && reduction != kNone;
  Tensor output = reduction == kNone ? pool::empty_like(flat.input) : at::empty({}, input.options());
  Tensor grad = with_grad ? pool::empty_like(flat.input) : at::empty({0}, input.options());
  const Tensor partial = flat.partial();
  cpu::mse_loss().forward(dtype_tag(input), data(flat.input), data(flat.target), flat.weight_data(),
                          output.mutable_data_ptr(), with_grad ? grad.mutable_data_ptr() : nullptr, input.numel(),
                          reduction, partial.mutable_data_ptr());
  return {output, grad};
}

void backward_into(const Tensor& grad_output, const Tensor& input, const Flat& flat, int64_t reduction,
                   const Tensor& grad) {
  const Tensor g = reduction == kNone ? flat.in_order(grad_output.expand_as(input)) : grad_output;
  const Tensor partial = flat.partial();
  cpu::mse_loss().backward(dtype_tag(input), data(g), data(flat.input), data(flat.target), flat.weight_data(),
                           grad.mutable_data_ptr(), input.numel(), reduction, partial.mutable_data_ptr());
}

Tensor backward_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                    int64_t reduction) {
  const Flat flat(input, target, weight);
  const Tensor grad = pool::empty_like(flat.input);
  backward_into(grad_output, input, flat, reduction, grad);
  return grad;
}

// `grad` holds the gradient for an incoming gradient of 1: it is formed anew for another.
void correct_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                 int64_t reduction, const Tensor& grad) {
  if (number_in(grad_output) != 1.0) backward_into(grad_output, input, {input, target, weight}, reduction, grad);
}

std::tuple<Tensor, Tensor> forward_meta(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                        int64_t reduction, bool need_grad) {
  const bool with_grad = need_grad && reduction != kNone;
  return {reduction == kNone ? at::empty_like(input) : at::empty({}, input.options()),
          with_grad ? at::empty_like(input) : at::empty({0}, input.options())};
}

Tensor backward_meta(const Tensor& grad_output, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                     int64_t reduction) {
  return at::empty_like(input);
}

void correct_meta(const Tensor& grad_output, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                  int64_t reduction, const Tensor& grad) {}

std::tuple<Tensor, Tensor> call_forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                        int64_t reduction, bool need_grad) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastllm::mse_loss_forward", "").typed<decltype(forward_cpu)>();
  return op.call(input, target, weight, reduction, need_grad);
}

Tensor call_backward(const Tensor& grad_output, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                     int64_t reduction) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastllm::mse_loss_backward", "").typed<decltype(backward_cpu)>();
  return op.call(grad_output, input, target, weight, reduction);
}

void call_correct(const Tensor& grad_output, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                  int64_t reduction, const Tensor& grad) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastllm::mse_loss_correct_", "").typed<decltype(correct_cpu)>();
  op.call(grad_output, input, target, weight, reduction, grad);
}

// --- autograd ---------------------------------------------------------------------------------------------------

// Under `mean` and `sum` the gradient is formed in the forward pass, for an incoming gradient of 1; another incoming
// gradient, a fake tensor or `none` computes it in backward from the saved inputs. On a device a kernel reads the
// incoming gradient there, and leaves the gradient as it is where it is 1.
class MseLossBackward : public torch::autograd::Function<MseLossBackward> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                        int64_t reduction) {
    at::AutoDispatchBelowADInplaceOrView below;
    backend::save(ctx);
    const bool early = reduction != kNone && is_concrete(input, target);
    auto [output, grad] = call_forward(input, target, weight, reduction, early);
    ctx->save_for_backward({input, target, weight.value_or(Tensor())});
    ctx->saved_data["reduction"] = reduction;
    if (early) keep_formed(ctx, "grad", grad);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const backend::Restored restored(ctx);
    const Tensor& g = grad_outputs[0];
    const bool need_input = ctx->needs_input_grad(0), need_target = ctx->needs_input_grad(1);
    const auto both = [&](const Tensor& grad) -> variable_list {
      return {need_input ? grad : Tensor(), need_target ? grad.neg() : Tensor(), Tensor(), Tensor()};
    };
    const bool formed = has_formed(ctx, "grad") && is_concrete(g) && !at::GradMode::is_enabled();
    if (formed && is_one(g)) {
      at::AutoDispatchBelowADInplaceOrView below;
      return both(take_formed(ctx, "grad"));
    }
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &target = saved[1];
    const OptionalTensor weight = optional(saved[2]);
    const int64_t reduction = ctx->saved_data["reduction"].toInt();
    if (at::GradMode::is_enabled()) {
      auto grads = differentiate([&](const variable_list& a) { return definition(a[0], a[1], weight, reduction); },
                                 {input, target}, {need_input, need_target}, g);
      drop_formed(ctx, "grad");
      return {grads[0], grads[1], Tensor(), Tensor()};
    }
    at::AutoDispatchBelowADInplaceOrView below;
    if (!formed) {
      drop_formed(ctx, "grad");
      return both(call_backward(g, input, target, weight, reduction));
    }
    const Tensor grad = take_formed(ctx, "grad");
    call_correct(g, input, target, weight, reduction, grad);
    return both(grad);
  }
};

// --- the operation ----------------------------------------------------------------------------------------------

Tensor mse_loss(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction) {
  check_given("mse_loss", "input", input);
  check_given("mse_loss", "target", target);
  TORCH_CHECK(input.device() == target.device(), "mse_loss: target must be on input's device ", input.device(),
              ", got ", target.device());
  if (defined(weight)) {
    TORCH_CHECK_VALUE(weight->sym_sizes() == input.sym_sizes(), "mse_loss: weight must have input's size ",
                      input.sym_sizes(), ", got ", weight->sym_sizes());
    TORCH_CHECK(weight->device() == input.device(), "mse_loss: weight must be on input's device ", input.device(),
                ", got ", weight->device());
  }
  const bool same = input.sym_sizes() == target.sym_sizes();
  const auto both = same ? std::vector<Tensor>{input, target} : at::broadcast_tensors({input, target});
  const at::ScalarType dtype = at::result_type(both[0], both[1]);
  TORCH_CHECK_NOT_IMPLEMENTED(is_served_dtype(dtype),
                              "mse_loss: input and target must be float32, float64, bfloat16 or float16, got ",
                              input.scalar_type(), " and ", target.scalar_type());
  Tensor x = both[0].to(dtype), t = both[1].to(dtype);
  OptionalTensor w;
  if (defined(weight)) {
    const at::ScalarType wide = at::result_type(x, *weight);
    const bool own_gradient = weight->requires_grad() && at::GradMode::is_enabled();
    // The mean divides by the sum of the weights as given, which a broadcast would count more than once.
    const bool broadcast = x.sym_sizes() != weight->sym_sizes();
    if (own_gradient || broadcast || !is_served_dtype(wide)) return definition(x, t, weight, reduction);
    x = x.to(wide);
    t = t.to(wide);
    w = weight->to(wide);
  }
  if (at::GradMode::is_enabled() && (x.requires_grad() || t.requires_grad()))
    return MseLossBackward::apply(x, t, w, reduction);
  at::AutoDispatchBelowADInplaceOrView below;
  return std::get<0>(call_forward(x, t, w, reduction, false));
}

// As PyTorch's mse_loss under autocast: in float32.
template <c10::DeviceType device>
Tensor mse_loss_autocast(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(at::kFloat, t, device); };
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastllm::mse_loss", "").typed<decltype(mse_loss)>();
  return op.call(cast(input), cast(target), cast(weight), reduction);
}

TORCH_LIBRARY_FRAGMENT(fastllm, m) {
  m.def("mse_loss(Tensor input, Tensor target, Tensor? weight, int reduction) -> Tensor");
  m.def(
      "mse_loss_forward(Tensor input, Tensor target, Tensor? weight, int reduction, bool need_grad) -> (Tensor output, "
      "Tensor grad)");
  m.def("mse_loss_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, int reduction) -> Tensor");
  m.def(
      "mse_loss_correct_(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, int reduction, Tensor(a!) "
      "grad) -> ()");
}
TORCH_LIBRARY_IMPL(fastllm, CompositeExplicitAutograd, m) { m.impl("mse_loss", mse_loss); }
TORCH_LIBRARY_IMPL(fastllm, Autograd, m) {
  m.impl("mse_loss", mse_loss);
  m.impl("mse_loss_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("mse_loss_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("mse_loss_correct_", torch::autograd::autogradNotImplementedFallback());
}
TORCH_LIBRARY_IMPL(fastllm, AutocastCPU, m) { m.impl("mse_loss", mse_loss_autocast<c10::DeviceType::CPU>); }
TORCH_LIBRARY_IMPL(fastllm, AutocastCUDA, m) { m.impl("mse_loss", mse_loss_autocast<c10::DeviceType::CUDA>); }
TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("mse_loss_forward", forward_cpu);
  m.impl("mse_loss_backward", backward_cpu);
  m.impl("mse_loss_correct_", correct_cpu);
}
TORCH_LIBRARY_IMPL(fastllm, Meta, m) {
  m.impl("mse_loss_forward", forward_meta);
  m.impl("mse_loss_backward", backward_meta);
  m.impl("mse_loss_correct_", correct_meta);
}

}  // namespace
}  // namespace fastllm
