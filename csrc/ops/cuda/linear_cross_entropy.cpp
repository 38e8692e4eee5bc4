// linear_cross_entropy on CUDA: cross_entropy(input linear_weight^T + linear_bias, target) without the N x V logits.
//
// Rows are taken in few large chunks: a library product writes a chunk's logits, the row kernel turns them into their
// gradient where they stand, and two more products take that gradient to input and linear_weight. Three products in
// all; the rest moves 2 chunk x V items. Several chunks add the gradient of linear_weight up in float32, round it once,
// and stream V x D items for each chunk; so chunks are large, and one where several would need more memory.
//
// A chunk's rows start at 16-byte boundaries whatever V is, so that products and row kernel take 16 bytes at a time.
// Without a gradient there are no gradient buffers: one chunk of logits is all that is held.
#include "../../cuda/linear_cross_entropy.h"

#include <algorithm>

#include "../chunks.h"
#include "row_loss.h"
#include "row_product.h"

namespace fastllm::cuda {
namespace {

constexpr const char* kOp = "linear_cross_entropy";
constexpr int64_t kWorkspace = int64_t{2} << 30;  // bytes of logits held at once
constexpr int64_t kEvenMultiple = 64;

struct Needs {
  bool input, weight, bias;
  bool any() const { return input || weight || bias; }
};

struct Gradients {
  Tensor input, weight, bias;
};

// sum (float32, or the operands' dtype) = a b, added to what it holds unless it is the first.
void add_product(const Tensor& sum, const Tensor& a, const Tensor& b, bool first) {
  Tensor out = sum;
  if (sum.scalar_type() == a.scalar_type()) {
    first ? at::mm_out(out, a, b) : at::addmm_out(out, sum, a, b);
    return;
  }
#ifdef FASTLLM_CUDA_HOST
  const Tensor part = at::mm(a, b);
  first ? out.copy_(part) : out.add_(part);
#else
  first ? at::mm_out(out, a, b, sum.scalar_type()) : at::addmm_out(out, sum, a, b, sum.scalar_type());
#endif
}

// The walk over chunks. `loss` (N) acc is written; with needs, so are the gradients of the reduced loss for an incoming
// gradient of () or, without reduction, (N); undefined: 1.
class Walk {
 public:
  Walk(const Call& call, const Tensor& input, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
       const OptionalTensor& class_weight, const LossOptions& options, Needs needs)
      : call_(call),
        input_(input.contiguous()),
        weight_(weight.contiguous()),
        bias_(defined(bias) ? bias->contiguous() : Tensor()),
        rows_(call, kOp, input.scalar_type(), weight.size(0), target, class_weight, options),
        needs_(needs) {}

  const RowLoss& rows() const { return rows_; }

  Gradients run(const Tensor& loss, const Tensor& incoming) {
    const int64_t n = input_.size(0), classes = weight_.size(0), features = weight_.size(1);
    const at::ScalarType dtype = input_.scalar_type();
    const int64_t item = static_cast<int64_t>(input_.element_size());
    const int64_t beside = needs_.weight && item == 2 ? classes * features * 2 : 0;  // a sum in float32, not dtype
    const int64_t chunk = std::max<int64_t>(chunk_rows(n, classes * item, kWorkspace, beside, kEvenMultiple), 1);
    const int64_t chunks = (n + chunk - 1) / chunk, multiple = 16 / item;
    const bool several = chunks > 1;
    Tensor logits = call_.empty({std::min(chunk, n), (classes + multiple - 1) / multiple * multiple}, dtype);
    logits = logits.narrow(1, 0, classes);
    const Tensor softmax = call_.empty({2, std::min(chunk, n)}, loss.scalar_type());
    Gradients g;
    if (needs_.input) g.input = call_.empty(input_.sizes(), dtype);
    if (needs_.weight) g.weight = call_.empty(weight_.sizes(), several ? loss.scalar_type() : dtype);
    const int64_t sum_blocks = column_sum_blocks(chunk, classes);
    if (needs_.bias) bias_sums_ = call_.empty({chunks * sum_blocks, classes}, loss.scalar_type());
    for (int64_t first = 0; first < n; first += chunk) {
      const int64_t size = std::min(chunk, n - first);
      const Tensor x = input_.narrow(0, first, size), z = logits.narrow(0, 0, size);
      row_product_out(call_, z, x, weight_.t(), bias_.defined() ? OptionalTensor(bias_) : std::nullopt);
      rows_.forward(z, first, loss.narrow(0, first, size), softmax.narrow(1, 0, size), needs_.any() ? z : Tensor(),
                    incoming.defined() && incoming.dim() == 1 ? incoming.narrow(0, first, size) : incoming);
      if (needs_.input) row_product_out(call_, g.input.narrow(0, first, size), z, weight_, std::nullopt);
      if (needs_.weight) add_product(g.weight, z.t(), x, first == 0);
      if (needs_.bias) add_bias_gradient(z);
    }
    logits.reset();  // before the sum is rounded into a tensor of its own
    if (needs_.weight) g.weight = n == 0 ? at::zeros_like(weight_) : g.weight.to(dtype);
    if (needs_.bias) g.bias = finished_bias();
    return g;
  }

 private:
  void add_bias_gradient(const Tensor& dz) {
    const int64_t blocks = column_sum_blocks(dz.size(0), dz.size(1));
    const Tensor sums = bias_sums_.narrow(0, bias_blocks_, blocks);
    call_.check(column_sums(dtype_tag(dz), call_.in(dz), dz.size(0), dz.size(1), dz.stride(0), call_.out(sums),
                            call_.stream()));
    bias_blocks_ += blocks;
  }

  Tensor finished_bias() const {
    const Tensor bias = call_.empty({weight_.size(0)}, input_.scalar_type());
    call_.check(finish_column_sums(dtype_tag(bias), call_.in(bias_sums_), bias_blocks_, bias.size(0), call_.out(bias),
                                   call_.stream()));
    return bias;
  }

  const Call& call_;
  Tensor input_, weight_, bias_;
  RowLoss rows_;
  Needs needs_;
  Tensor bias_sums_;
  int64_t bias_blocks_ = 0;
};

// --- plain operations: input (N, D), linear_weight (V, D), target (N) or (N, V) ----------------------------------

std::tuple<Tensor, Tensor, Tensor> results(const Call& call, const Gradients& g, at::ScalarType dtype) {
  const auto or_none = [&](const Tensor& t) { return t.defined() ? t : call.none(dtype); };
  return {or_none(g.input), or_none(g.weight), or_none(g.bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& linear_weight,
                                                   const Tensor& target, const OptionalTensor& linear_bias,
                                                   const OptionalTensor& weight, const LossOptions& options,
                                                   bool need_input, bool need_weight, bool need_bias) {
  const Call call(kOp, input);
  const at::ScalarType acc = acc_dtype(input.scalar_type());
  const Tensor loss = call.empty({input.size(0)}, acc);
  Walk walk(call, input, linear_weight, target, linear_bias, weight, options, {need_input, need_weight, need_bias});
  const Gradients g = walk.run(loss, Tensor());
  return std::tuple_cat(std::make_tuple(walk.rows().reduced(loss, acc)), results(call, g, input.scalar_type()));
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& linear_weight,
                                            const Tensor& target, const OptionalTensor& linear_bias,
                                            const OptionalTensor& weight, const LossOptions& options, bool need_input,
                                            bool need_weight, bool need_bias) {
  const Call call("linear_cross_entropy_backward", input);
  const Tensor loss = call.empty({input.size(0)}, acc_dtype(input.scalar_type()));
  Walk walk(call, input, linear_weight, target, linear_bias, weight, options, {need_input, need_weight, need_bias});
  return results(call, walk.run(loss, grad_output), input.scalar_type());
}

// A kernel reads the factor, and returns at once where it is 1.
void scale_(const Tensor& grad_output, const Tensor& grad) {
  TORCH_CHECK(grad.is_non_overlapping_and_dense(), kOp, ": grad must be dense, got strides ", grad.strides());
  const Call call(kOp, grad);
  call.check(scale_unless_one(dtype_tag(grad), call.out(grad), grad.numel(), call.in(grad_output),
                              grad_output.scalar_type() == acc_dtype(grad.scalar_type()), call.stream()));
}

TORCH_LIBRARY_IMPL(fastllm_cuda, FASTLLM_CUDA_KEY, m) {
  m.impl("linear_cross_entropy_forward", flat<&forward>);
  m.impl("linear_cross_entropy_backward", flat<&backward>);
  m.impl("linear_cross_entropy_scale_", flat<&scale_>);
}

}  // namespace
}  // namespace fastllm::cuda
