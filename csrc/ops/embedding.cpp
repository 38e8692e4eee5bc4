// embedding: checks, autograd node, fake kernels. Kernels: csrc/cpu/embedding.cpp.
#include "../cpu/embedding.h"

#include "common.h"

FASTLLM_DEFINE_DISPATCH(EmbeddingKernels, embedding)

namespace fastllm {
namespace {

void check_range(const Tensor& ids, int64_t rows) {
  const int64_t bad = cpu::check_ids(data(ids), ids.scalar_type() == at::kInt, ids.numel(), rows);
  TORCH_CHECK_INDEX(bad < 0, "embedding: input must hold ids in [0, ", rows, "), the rows of weight, got ",
                    ids.view(-1)[bad < 0 ? 0 : bad].item<int64_t>(), " at position ", bad);
}

Tensor forward_cpu(const Tensor& weight, const Tensor& input) {
  const Tensor ids = input.contiguous(), table = weight.contiguous();
  check_range(ids, table.size(0));
  std::vector<int64_t> shape = ids.sizes().vec();
  shape.push_back(table.size(1));
  const Tensor output = pool::empty(shape, table.scalar_type());
  if (output.numel() > 0)
    cpu::embedding().forward(data(table), table.size(0), data(ids), ids.scalar_type() == at::kInt,
                             output.mutable_data_ptr(), ids.numel(),
                             table.size(1) * static_cast<int64_t>(table.element_size()));
  return output;
}

Tensor backward_cpu(const Tensor& grad_output, const Tensor& input, int64_t rows, int64_t padding_idx,
                    bool scale_grad_by_freq) {
  const Tensor ids = input.contiguous(), from = grad_output.contiguous();
  check_range(ids, rows);
  const int64_t count = ids.numel(), features = from.size(-1), chunks = cpu::embedding_chunks(count);
  const Tensor grad = pool::empty({rows, features}, from.scalar_type());
  if (grad.numel() == 0) return grad;
  cpu::EmbeddingGradient g{};
  g.dtype = dtype_tag(from);
  g.grad_output = data(from);
  g.ids = data(ids);
  g.ids_are_int32 = ids.scalar_type() == at::kInt;
  g.count = count;
  g.rows = rows;
  g.features = features;
  g.padding_idx = padding_idx;
  g.scale_by_frequency = scale_grad_by_freq;
  g.grad = grad.mutable_data_ptr();
  Tensor work, partial;
  if (cpu::embedding_in_pieces(g)) {
    partial =
        pool::empty({cpu::kEmbeddingPieces * rows * cpu::embedding_stride(features)}, acc_dtype(from.scalar_type()));
    g.partial = partial.mutable_data_ptr();
  } else if (count > cpu::kFewIds) {
    work = pool::empty({rows + 1 + count + 2 * chunks}, at::kLong);
    partial = pool::empty({chunks * features}, acc_dtype(from.scalar_type()));
    g.starts = work.mutable_data_ptr<int64_t>();
    g.order = g.starts + rows + 1;
    g.chunks = g.order + count;
    g.partial = partial.mutable_data_ptr();
  }
  cpu::embedding().backward(g);
  return grad;
}

Tensor forward_meta(const Tensor& weight, const Tensor& input) {
  std::vector<c10::SymInt> shape = input.sym_sizes().vec();
  shape.push_back(weight.sym_size(1));
  return at::empty_symint(shape, weight.options());
}

Tensor backward_meta(const Tensor& grad_output, const Tensor& input, c10::SymInt rows, int64_t padding_idx,
                     bool scale_grad_by_freq) {
  return at::empty_symint({std::move(rows), grad_output.sym_size(-1)}, grad_output.options());
}

Tensor call_forward(const Tensor& weight, const Tensor& input) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastllm::embedding_forward", "").typed<decltype(forward_cpu)>();
  return op.call(weight, input);
}

class EmbeddingBackward : public torch::autograd::Function<EmbeddingBackward> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, int64_t padding_idx,
                        bool scale_grad_by_freq, bool sparse) {
    at::AutoDispatchBelowADInplaceOrView below;
    backend::save(ctx);
    ctx->save_for_backward({input});
    ctx->saved_data["rows"] = weight.sym_size(0);
    ctx->saved_data["padding_idx"] = padding_idx;
    ctx->saved_data["options"] = int64_t{scale_grad_by_freq} | int64_t{sparse} << 1;
    return call_forward(weight, input);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const backend::Restored restored(ctx);
    const Tensor ids = ctx->get_saved_variables()[0];
    const c10::SymInt rows = ctx->saved_data["rows"].toSymInt();
    const int64_t padding_idx = ctx->saved_data["padding_idx"].toInt(), options = ctx->saved_data["options"].toInt();
    const bool by_frequency = (options & 1) != 0, sparse = (options & 2) != 0;
    TORCH_CHECK(!(sparse && by_frequency), "embedding: scale_grad_by_freq is not supported for a sparse gradient");
    variable_list grads(5);
    if (at::GradMode::is_enabled() || sparse) {
      // Differentiable again, or sparse: PyTorch's own gradient. Its second derivative forgets the division by
      // frequency, which is therefore made before.
      Tensor g = grad_outputs[0];
      if (by_frequency) {
        const Tensor flat = ids.reshape({-1});
        const Tensor counts = at::bincount(flat).index_select(0, flat).to(g.scalar_type());
        g = g / counts.reshape_symint(ids.sym_sizes()).unsqueeze(-1);
      }
      grads[1] = at::embedding_backward_symint(g, ids, rows, padding_idx, false, sparse);
      return grads;
    }
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fastllm::embedding_backward", "")
                               .typed<Tensor(const Tensor&, const Tensor&, c10::SymInt, int64_t, bool)>();
    grads[1] = op.call(grad_outputs[0], ids, rows, padding_idx, by_frequency);
    return grads;
  }
};

Tensor embedding(const Tensor& input, const Tensor& weight, int64_t padding_idx, bool scale_grad_by_freq, bool sparse) {
  check_given("embedding", "input", input);
  check_given("embedding", "weight", weight);
  TORCH_CHECK(weight.dim() == 2, "embedding: weight must be 2-D (rows, features), got ", weight.dim(), "-D ",
              weight.sym_sizes());
  TORCH_CHECK(input.scalar_type() == at::kLong || input.scalar_type() == at::kInt,
              "embedding: input must be int64 or int32 ids, got ", input.scalar_type());
  TORCH_CHECK(input.device() == weight.device(), "embedding: input must be on weight's device ", weight.device(),
              ", got ", input.device());
  TORCH_CHECK_NOT_IMPLEMENTED(is_served_dtype(weight.scalar_type()),
                              "embedding: weight must be float32, float64, bfloat16 or float16, got ",
                              weight.scalar_type());
  if (at::GradMode::is_enabled() && weight.requires_grad())
    return EmbeddingBackward::apply(input, weight, padding_idx, scale_grad_by_freq, sparse);
  at::AutoDispatchBelowADInplaceOrView below;
  return call_forward(weight, input);
}

TORCH_LIBRARY_FRAGMENT(fastllm, m) {
  m.def("embedding(Tensor input, Tensor weight, int padding_idx, bool scale_grad_by_freq, bool sparse) -> Tensor");
  m.def("embedding_forward(Tensor weight, Tensor input) -> Tensor");
  m.def(
      "embedding_backward(Tensor grad_output, Tensor input, SymInt rows, int padding_idx, bool scale_grad_by_freq) -> "
      "Tensor");
}
TORCH_LIBRARY_IMPL(fastllm, CompositeExplicitAutograd, m) { m.impl("embedding", embedding); }
TORCH_LIBRARY_IMPL(fastllm, Autograd, m) {
  m.impl("embedding", embedding);
  m.impl("embedding_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("embedding_backward", torch::autograd::autogradNotImplementedFallback());
}
TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("embedding_forward", forward_cpu);
  m.impl("embedding_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(fastllm, Meta, m) {
  m.impl("embedding_forward", forward_meta);
  m.impl("embedding_backward", backward_meta);
}

}  // namespace
}  // namespace fastllm
