// linear_cross_entropy: cross_entropy(input linear_weight^T + linear_bias, target) without the N x V logits.
//
// Rows are taken in chunks. A chunk's logits are computed into one reused buffer, the row kernel of cross_entropy turns
// them into their gradient where they stand, and two more products take that gradient to input and linear_weight: three
// products, and nothing of size N x V in memory. The gradient of linear_weight is summed over chunks in float32.
//
// Chunks are large: each streams linear_weight, and its gradient, once more from memory. A layer of few features has a
// kernel of its own (csrc/cpu/linear_cross_entropy.cpp).
#include <algorithm>

#include "../cpu/linear_relu.h"
#include "chunks.h"
#include "cross_entropy_common.h"
#include "gemm.h"
#include "linear_common.h"
#include "operations.h"

FASTLLM_DEFINE_DISPATCH(LinearCrossEntropyKernels, linear_cross_entropy)

namespace fastllm {
namespace {

constexpr int64_t kWorkspace = int64_t{80} << 20;  // bytes of logits held at once: the least that costs no speed
constexpr int64_t kEvenMultiple = 8;

struct Needs {
  bool input, weight, bias;
  bool any() const { return input || weight || bias; }
};

struct Gradients {
  Tensor input, weight, bias;
};

// The walk over chunks. `loss` (N) acc is written; with needs, so are the gradients of
// sum_r scale row_scale_r loss_r.
class Walk {
 public:
  Walk(const Tensor& input, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
       const OptionalTensor& class_weight, const LossOptions& options, Needs needs)
      : input_(input.contiguous()),
        weight_(weight.contiguous()),
        bias_(defined(bias) ? bias->contiguous() : Tensor()),
        rows_("linear_cross_entropy", input.scalar_type(), weight.size(0), target, class_weight, options),
        needs_(needs) {}

  const RowLoss& rows() const { return rows_; }

  Gradients run(const Tensor& loss, double scale, const Tensor& row_scale) {
    if (input_.numel() > 0 && rows_.is_skinny() && cpu::is_skinny_loss(weight_.size(1), weight_.size(0)))
      return run_skinny(loss, scale, row_scale);
    return run_chunks(loss, scale, row_scale);
  }

 private:
  Gradients run_skinny(const Tensor& loss, double scale, const Tensor& row_scale) const {
    const auto dtype = input_.scalar_type();
    Gradients g;
    cpu::SkinnyLoss s{};
    rows_.describe(&s);
    s.features = input_.size(1);
    s.input = data(input_);
    s.weight = data(weight_);
    s.bias = bias_.defined() ? data(bias_) : nullptr;
    s.loss = loss.mutable_data_ptr();
    s.scale = scale;
    s.row_scale = row_scale.defined() ? data(row_scale) : nullptr;
    const auto result = [&](bool need, const Tensor& like, Tensor* grad) -> void* {
      if (!need) return nullptr;
      *grad = pool::empty(like.sizes(), dtype);
      return grad->mutable_data_ptr();
    };
    s.grad_input = result(needs_.input, input_, &g.input);
    s.grad_weight = result(needs_.weight, weight_, &g.weight);
    s.grad_bias = result(needs_.bias, bias_, &g.bias);
    const Tensor workspace = pool::empty({cpu::linear_cross_entropy().workspace(s)}, dtype);
    s.workspace = workspace.mutable_data_ptr();
    cpu::linear_cross_entropy().run(s);
    return g;
  }

  Gradients run_chunks(const Tensor& loss, double scale, const Tensor& row_scale) {
    const int64_t n = input_.size(0), classes = weight_.size(0), features = weight_.size(1);
    const auto dtype = input_.scalar_type();
    const int64_t item = static_cast<int64_t>(input_.element_size());
    // Several chunks in bfloat16 or float16 need a float32 sum beside the result.
    const int64_t beside = needs_.weight && item == 2 ? classes * features * 4 : 0;
    const int64_t chunk = n == 0 ? 0 : chunk_rows(n, classes * item, kWorkspace, beside, kEvenMultiple);
    const bool whole = chunk == n;
    const auto part = [&](const Tensor& t, int64_t first) {
      return whole || !t.defined() ? t : t.narrow(0, first, std::min(chunk, n - first));
    };
    Gradients g;
    if (needs_.input) g.input = pool::empty(input_.sizes(), dtype);
    stride_ = fast_row_stride(classes, dtype);
    if (bias_.defined() && stride_ != classes) bias_ = at::constant_pad_nd(bias_, {0, stride_ - classes});
    const Tensor padded = pool::empty({chunk, stride_}, dtype);
    const Tensor logits = stride_ == classes ? padded : padded.narrow(1, 0, classes);
    const Tensor softmax = pool::empty({2, chunk}, loss.scalar_type());
    if (needs_.bias) bias_sums_ = pool::empty({n / cpu::kColumnBlock + n / (chunk + 1) + 2, stride_}, acc_dtype(dtype));
    for (int64_t first = 0; first < n; first += chunk) {
      const Tensor x = part(input_, first), z = whole ? logits : logits.narrow(0, 0, x.size(0));
      compute_logits(x, z);
      rows_.forward(z, first, part(loss, first), whole ? softmax : softmax.narrow(1, 0, x.size(0)),
                    needs_.any() ? z : Tensor(), scale, part(row_scale, first));
      if (needs_.input) row_product_out(part(g.input, first), z, weight_);
      if (whole && needs_.weight && try_small_weight_gradient(z, x, &g)) continue;
      if (needs_.weight) add_weight_gradient(z, x, first == 0, !whole);
      if (needs_.bias) add_bias_gradient(z);
    }
    if (needs_.weight && !g.weight.defined()) g.weight = n == 0 ? at::zeros_like(weight_) : finished_weight(dtype);
    if (needs_.bias && !g.bias.defined()) g.bias = finished_bias();
    return g;
  }

  void compute_logits(const Tensor& x, const Tensor& z) const {
    if (z.numel() == 0 || try_row_product(z, x, weight_.t(), bias_, false)) return;
    if (try_small_product(z, x, weight_.t(), bias_, false)) return;
    if (bias_.defined())
      cpu::linear_relu().fill_rows(dtype_tag(z), z.mutable_data_ptr(), data(bias_), z.size(0), stride_);
    gemm_out(z, x, weight_.t(), bias_.defined() ? 1 : 0);
  }

  // Short features: the transposed product streams dz along its rows, and sums them for the bias on the way.
  bool try_small_weight_gradient(const Tensor& dz, const Tensor& x, Gradients* g) const {
    const Tensor weight = pool::empty(weight_.sizes(), weight_.scalar_type());
    const Tensor bias = needs_.bias ? at::empty({weight_.size(0)}, weight_.options()) : Tensor();
    if (!try_small_product(weight.t(), x.t(), dz, Tensor(), false, bias)) return false;
    g->weight = weight;
    g->bias = bias;
    return true;
  }

  // One chunk alone goes straight to its dtype: the library rounds its float32 sums once. Several in bfloat16 or
  // float16 are added in float32.
  void add_weight_gradient(const Tensor& dz, const Tensor& x, bool is_first, bool is_one_of_several) {
    if (!is_one_of_several) {
      weight_sum_ = product(dz.t(), x);
      return;
    }
    const bool low = dz.element_size() == 2;
    if (is_first) {
      weight_sum_ = pool::empty(weight_.sizes(), low ? at::kFloat : weight_.scalar_type());
      if (low) part_ = pool::empty(weight_.sizes(), weight_.scalar_type());
    }
    if (!low) {
      gemm_out(weight_sum_, dz.t(), x, is_first ? 0 : 1);
      return;
    }
    gemm_out(part_, dz.t(), x, 0);
    if (is_first)
      weight_sum_.copy_(part_);
    else
      weight_sum_.add_(part_);
  }

  Tensor finished_weight(at::ScalarType dtype) {
    if (weight_sum_.scalar_type() == dtype) return std::move(weight_sum_);
    return part_.copy_(weight_sum_);
  }

  void add_bias_gradient(const Tensor& dz) {
    char* to = static_cast<char*>(bias_sums_.mutable_data_ptr()) +
               bias_blocks_ * stride_ * static_cast<int64_t>(bias_sums_.element_size());
    cpu::linear_relu().mask(dtype_tag(dz), data(dz), nullptr, nullptr, dz.size(0), stride_, to);
    bias_blocks_ += cpu::column_blocks(dz.size(0));
  }

  Tensor finished_bias() const {
    const Tensor sum = at::empty({stride_}, input_.options());
    cpu::linear_relu().finish_sums(dtype_tag(sum), data(bias_sums_), bias_blocks_, stride_, sum.mutable_data_ptr());
    return stride_ == weight_.size(0) ? sum : sum.narrow(0, 0, weight_.size(0)).clone();
  }

  Tensor input_, weight_, bias_;
  RowLoss rows_;
  Needs needs_;
  Tensor weight_sum_, part_, bias_sums_;
  int64_t stride_ = 0;  // items between rows of logits; what lies between is 0 where a bias is added, never read else
  int64_t bias_blocks_ = 0;
};

// --- plain operations: input (N, D), linear_weight (V, D), target (N) or (N, V) ----------------------------------

// The loss in the accumulator's dtype, and under `mean` and `sum` the gradients asked for, for an incoming gradient
// of 1.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cpu(const Tensor& input, const Tensor& linear_weight,
                                                       const Tensor& target, const OptionalTensor& linear_bias,
                                                       const OptionalTensor& weight, const LossOptions& options,
                                                       bool need_input, bool need_weight, bool need_bias) {
  const Tensor loss = pool::empty({input.size(0)}, acc_dtype(input.scalar_type()));
  Walk walk(input, linear_weight, target, linear_bias, weight, options, {need_input, need_weight, need_bias});
  const Gradients g = walk.run(loss, walk.rows().reduced(1), Tensor());
  const auto or_none = [&](const Tensor& t) { return t.defined() ? t : pool::empty({0}, input.scalar_type()); };
  return {walk.rows().reduced(loss, loss.scalar_type()), or_none(g.input), or_none(g.weight), or_none(g.bias)};
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                const Tensor& linear_weight, const Tensor& target,
                                                const OptionalTensor& linear_bias, const OptionalTensor& weight,
                                                const LossOptions& options, bool need_input, bool need_weight,
                                                bool need_bias) {
  const Tensor loss = pool::empty({input.size(0)}, acc_dtype(input.scalar_type()));
  Walk walk(input, linear_weight, target, linear_bias, weight, options, {need_input, need_weight, need_bias});
  const bool by_row = options.reduction == kNone;
  const Gradients g = walk.run(loss, by_row ? 1 : walk.rows().reduced(number_in(grad_output)),
                               by_row ? grad_output.to(loss.scalar_type()).contiguous() : Tensor());
  const auto or_none = [&](const Tensor& t) { return t.defined() ? t : pool::empty({0}, input.scalar_type()); };
  return {or_none(g.input), or_none(g.weight), or_none(g.bias)};
}

void scale_cpu(const Tensor& grad_output, const Tensor& grad) {
  if (number_in(grad_output) != 1.0) grad.mul_(grad_output);
}

constexpr Dispatched<"fastllm::linear_cross_entropy_forward", decltype(forward_cpu)> forward_op;
constexpr Dispatched<"fastllm::linear_cross_entropy_backward", decltype(backward_cpu)> backward_op;
constexpr Dispatched<"fastllm::linear_cross_entropy_scale_", decltype(scale_cpu)> scale_op;

// --- autograd ---------------------------------------------------------------------------------------------------

Tensor definition(const variable_list& a, const OptionalTensor& weight, const LossOptions& options) {
  const OptionalTensor bias = a[3].defined() ? OptionalTensor(a[3]) : std::nullopt;
  const Tensor loss = cross_entropy_definition(linear_definition(a[0], a[1], bias), a[2], weight, options);
  return loss.to(acc_dtype(loss.scalar_type()));
}

// The bias of a graph from a copy of its numbers: its gradient goes where that of the bias itself would.
Tensor in_graph(const Tensor& copy, size_t edge) {
  Tensor alias = copy.detach();
  torch::autograd::impl::set_gradient_edge(alias, torch::autograd::get_current_node()->next_edge(edge));
  return alias;
}

// Gradients are formed in the forward pass, for an incoming gradient of 1, and scaled if it is another: only second
// derivatives read the saved inputs. `none` and float16, whose range a later scale could not bring back, walk the
// chunks again in backward; they save a copy of the bias, which an optimizer may change before.
class LinearCrossEntropyBackward : public torch::autograd::Function<LinearCrossEntropyBackward> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                        const OptionalTensor& linear_bias, const OptionalTensor& weight, const LossOptions& options) {
    at::AutoDispatchBelowADInplaceOrView below;
    backend::save(ctx);
    const bool early = options.reduction != kNone && input.scalar_type() != at::kHalf && !target.requires_grad();
    const bool need_input = input.requires_grad(), need_weight = linear_weight.requires_grad(),
               need_bias = requires_grad(linear_bias);
    auto [output, gi, gw, gb] = forward_op(input, linear_weight, target, linear_bias, weight, options,
                                           early && need_input, early && need_weight, early && need_bias);
    Tensor bias = linear_bias.value_or(Tensor());
    if (!early && bias.defined()) bias = bias.clone();
    ctx->save_for_backward({input, linear_weight, target, bias, weight.value_or(Tensor())});
    save_options(ctx, options, early | need_input << 1 | need_weight << 2 | need_bias << 3);
    if (early && need_input) keep_formed(ctx, kInput, gi);
    if (early && need_weight) keep_formed(ctx, kWeight, gw);
    if (early && need_bias) keep_formed(ctx, kBias, gb);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const backend::Restored restored(ctx);
    int64_t flags;
    const LossOptions o = saved_options(ctx, &flags);
    const bool early = (flags & 1) != 0;
    const bool need_input = (flags & 2) != 0 && ctx->needs_input_grad(0),
               need_weight = (flags & 4) != 0 && ctx->needs_input_grad(1),
               need_bias = (flags & 8) != 0 && ctx->needs_input_grad(3);
    const Tensor& g = grad_outputs[0];
    variable_list grads(6);
    if (early && !at::GradMode::is_enabled() &&
        (has_formed(ctx, kInput) || has_formed(ctx, kWeight) || has_formed(ctx, kBias))) {
      at::AutoDispatchBelowADInplaceOrView below;
      if (need_input) grads[0] = scaled(ctx, kInput, g);
      if (need_weight) grads[1] = scaled(ctx, kWeight, g);
      if (need_bias) grads[3] = scaled(ctx, kBias, g);
      drop(ctx);
      return grads;
    }
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor weight = optional(saved[4]);
    const bool need_target = ctx->needs_input_grad(2);
    if (at::GradMode::is_enabled() || need_target) {
      const Tensor bias = early || !need_bias ? saved[3] : in_graph(saved[3], 3);
      const variable_list found =
          differentiate([&](const variable_list& a) { return definition(a, weight, o); },
                        {saved[0], saved[1], saved[2], bias}, {need_input, need_weight, need_target, need_bias}, g);
      drop(ctx);
      std::copy(found.begin(), found.end(), grads.begin());
      return grads;
    }
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [gi, gw, gb] =
        backward_op(g, saved[0], saved[1], saved[2], optional(saved[3]), weight, o, need_input, need_weight, need_bias);
    grads[0] = where_needed(need_input, gi);
    grads[1] = where_needed(need_weight, gw);
    grads[3] = where_needed(need_bias, gb);
    return grads;
  }

 private:
  static constexpr const char *kInput = "grad_input", *kWeight = "grad_weight", *kBias = "grad_bias";

  static void drop(AutogradContext* ctx) {
    for (const char* name : {kInput, kWeight, kBias}) drop_formed(ctx, name);
  }

  static Tensor scaled(AutogradContext* ctx, const char* name, const Tensor& g) {
    if (!is_concrete(g)) {
      const Tensor grad = ctx->saved_data[name].toTensor();
      return (grad * g).to(grad.dtype());
    }
    const Tensor grad = take_formed(ctx, name);
    if (is_one(g)) return grad;
    scale_op(g, grad);
    return grad;
  }
};

TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("linear_cross_entropy_forward", flat<&forward_cpu>);
  m.impl("linear_cross_entropy_backward", flat<&backward_cpu>);
  m.impl("linear_cross_entropy_scale_", flat<&scale_cpu>);
}

}  // namespace

// --- the operation ----------------------------------------------------------------------------------------------

Tensor linear_cross_entropy(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                            const OptionalTensor& linear_bias, const OptionalTensor& weight, const LossOptions& options,
                            bool accumulator_dtype) {
  constexpr const char* op = "linear_cross_entropy";
  check_options(op, options);
  check_given(op, "input", input);
  check_given(op, "target", target);
  TORCH_CHECK(input.dim() == 1 || input.dim() == 2, op, ": input must be 1-D or 2-D, got ", input.dim(), "-D ",
              input.sym_sizes());
  check_linear(op, "input", input, "linear_weight", linear_weight, "linear_bias", linear_bias);
  const bool single = input.dim() == 1;
  const Tensor x = single ? input.unsqueeze(0) : input;
  const auto classes = linear_weight.sym_size(0);
  const bool probabilities =
      single ? target.dim() == 1 && target.sym_size(0) == classes
             : target.dim() == 2 && target.sym_size(0) == x.sym_size(0) && target.sym_size(1) == classes;
  TORCH_CHECK(target.device() == input.device(), op, ": target must be on input's device ", input.device(), ", got ",
              target.device());
  Tensor y = single ? target.unsqueeze(0) : target;
  OptionalTensor w = weight;
  if (probabilities) {
    TORCH_CHECK(target.is_floating_point(), op, ": target of class probabilities must be floating point, got ",
                target.scalar_type());
    y = y.to(x.scalar_type());
    if (defined(weight)) w = weight->to(x.scalar_type());
  } else {
    if (single && target.dim() == 1) y = target;
    TORCH_CHECK_VALUE(y.dim() > 0 && y.sym_size(0) == x.sym_size(0), op, ": target must have input's batch size ",
                      x.sym_size(0), ", got ", target.sym_sizes());
    TORCH_CHECK(y.dim() == 1, op, ": target must be of shape (", x.sym_size(0),
                ",) or hold class probabilities of shape (", x.sym_size(0), ", ", classes, "), got ",
                target.sym_sizes());
    y = checked_indices(op, y);
  }
  check_class_weight(op, w, x, classes);
  const bool weight_gradient = requires_grad(w) && at::GradMode::is_enabled();
  TORCH_CHECK(probabilities || !weight_gradient, op,
              ": weight must not require a gradient (pass weight.detach()), got one that does");
  Tensor output;
  if (probabilities && (weight_gradient || classes == 0)) {
    output = definition({x, linear_weight, y, linear_bias.value_or(Tensor())}, w, options);
  } else if (at::GradMode::is_enabled() &&
             (x.requires_grad() || linear_weight.requires_grad() || requires_grad(linear_bias) || y.requires_grad())) {
    output = LinearCrossEntropyBackward::apply(x, linear_weight, y, linear_bias, w, options);
  } else {
    at::AutoDispatchBelowADInplaceOrView below;
    output = std::get<0>(forward_op(x, linear_weight, y, linear_bias, w, options, false, false, false));
  }
  if (single && options.reduction == kNone) output = output.squeeze(0);
  if (accumulator_dtype) return output;
  // The dtype that PyTorch gives the loss: input's, or what input, probabilities and weight are promoted to.
  const at::ScalarType dtype =
      target.is_floating_point() ? probability_dtype(input, target, weight) : input.scalar_type();
  return output.scalar_type() == dtype ? output : output.to(dtype);
}

FASTLLM_OPERATION(linear_cross_entropy)

}  // namespace fastllm
