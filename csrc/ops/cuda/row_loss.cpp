#include "row_loss.h"

#include <cstdlib>

#include "checks.h"
#ifndef FASTLLM_CUDA_HOST
#include <cuda_runtime_api.h>
#endif

namespace fastllm::cuda {
namespace {

struct Device {
  int capability, multiprocessors;
};

#ifdef FASTLLM_CUDA_HOST
Device current_device() { return {90, 3}; }
#else
Device current_device() {
  const int index = c10::cuda::current_device();
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    if (cudaDeviceGetAttribute(&value, attribute, index) != cudaSuccess) {
      cudaGetLastError();  // reported here, and not once more after PyTorch's next kernel
      TORCH_CHECK(false, "fastllm: no attributes of device ", index);
    }
    return value;
  };
  return {10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor),
          ask(cudaDevAttrMultiProcessorCount)};
}
#endif

// The cluster that FASTLLM_CUDA_STRATEGY asks for, or -1.
int read_strategy() {
  const char* text = std::getenv("FASTLLM_CUDA_STRATEGY");
  if (text == nullptr || *text == '\0') return -1;
  const std::string_view name(text);
  if (name == "passes") return 0;
  if (name == "row") return 1;
  for (const int cluster : {2, 4, 8, 16})
    if (name == "cluster" + std::to_string(cluster)) return cluster;
  TORCH_CHECK_VALUE(false,
                    "FASTLLM_CUDA_STRATEGY: expected row, cluster2, cluster4, cluster8, cluster16 or passes, got '",
                    text, "'");
}

int strategy() {
#ifdef FASTLLM_CUDA_HOST
  return read_strategy();
#else
  static const int read = read_strategy();
  return read;
#endif
}

int cluster_for(const char* op, const CrossEntropy& c, int capability) {
  const int asked = strategy();
  if (asked < 0) {
    CrossEntropy any = c;
    if (batch_invariant()) any.rows = 1;  // the order of summation must not depend on the number of rows
    return cross_entropy_cluster(any, capability);
  }
  TORCH_CHECK(asked == 0 || cross_entropy_fits(c.dtype, c.classes, asked), op, ": FASTLLM_CUDA_STRATEGY: rows of ",
              c.classes, " classes do not fit ", asked, " blocks");
  return asked;
}

}  // namespace

RowLoss::RowLoss(const Call& call, const char* op, at::ScalarType dtype, int64_t classes, const Tensor& target,
                 const OptionalTensor& weight, const LossOptions& options)
    : call_(call),
      op_(op),
      options_(options),
      classes_(classes),
      probabilities_(target.is_floating_point()),
      target_(target.contiguous()) {
  TORCH_CHECK(classes <= kMostClasses, op, ": the backend cuda serves at most 2^30 classes, got ", classes);
  const at::ScalarType acc = acc_dtype(dtype);
  dtype_ = dtype == at::kFloat      ? DType::kF32
           : dtype == at::kDouble   ? DType::kF64
           : dtype == at::kBFloat16 ? DType::kBF16
                                    : DType::kF16;
  if (defined(weight)) weight_ = weight->to(acc).contiguous();
  if (weight_.defined() && options.label_smoothing > 0) weight_sum_ = weight_.sum();
  if (!probabilities_ && checks_indices())
    check_indices(op,
                  "target must be in [0, " + std::to_string(classes) + ") or ignore_index " +
                      std::to_string(options.ignore_index),
                  target_, classes, options.ignore_index);
  if (options.reduction == kMean) divisor_ = divisor();
}

Tensor RowLoss::divisor() const {
  const int64_t rows = target_.size(0);
  const at::ScalarType acc = dtype_ == DType::kF64 ? at::kDouble : at::kFloat;
  if (probabilities_) return at::full({}, static_cast<double>(rows), target_.options().dtype(acc));
  const Tensor sum = call_.empty({}, acc), partial = call_.empty({cross_entropy_partials(rows)}, at::kDouble);
  call_.check(cross_entropy_divisor(dtype_, call_.in(target_), target_.scalar_type() == at::kInt, rows, classes_,
                                    options_.ignore_index, call_.in(weight_), call_.out(partial), call_.out(sum),
                                    call_.stream()));
  return sum;
}

CrossEntropy RowLoss::rows(const Tensor& logits, int64_t first, const Tensor& softmax, const Tensor& grad,
                           const Tensor& incoming) const {
  CrossEntropy c{};
  c.dtype = dtype_;
  c.rows = logits.size(0);
  c.classes = classes_;
  c.logits = call_.in(logits);
  c.logits_stride = logits.stride(0);
  const Tensor target = target_.narrow(0, first, c.rows);
  if (probabilities_) {
    c.probabilities = call_.in(target);
  } else {
    c.target = call_.in(target);
    c.target_is_int32 = target.scalar_type() == at::kInt;
  }
  c.weight = call_.in(weight_);
  c.weight_sum = call_.in(weight_sum_);
  c.ignore_index = options_.ignore_index;
  c.label_smoothing = options_.label_smoothing;
  c.lse_square_scale = options_.lse_square_scale;
  c.softcap = options_.softcap.value_or(0);
  c.row_max = call_.out(softmax.select(0, 0));
  c.row_log_sum = call_.out(softmax.select(0, 1));
  if (grad.defined()) {
    c.grad = call_.out(grad);
    c.grad_stride = grad.stride(0);
  }
  if (incoming.defined()) {
    c.incoming = call_.in(incoming);
    c.incoming_is_acc = incoming.scalar_type() == softmax.scalar_type();
    c.incoming_stride = incoming.dim() == 0 ? 0 : incoming.stride(0);
  }
  c.divisor = call_.in(divisor_);
  return c;
}

void RowLoss::forward(const Tensor& logits, int64_t first, const Tensor& loss, const Tensor& softmax,
                      const Tensor& grad, const Tensor& incoming) const {
  CrossEntropy c = rows(logits, first, softmax, grad, incoming);
  c.loss = call_.out(loss);
  c.cluster = cluster_for(op_, c, current_device().capability);
  call_.check(cross_entropy_forward(c, call_.stream()));
}

void RowLoss::backward(const Tensor& logits, const Tensor& softmax, const Tensor& grad, const Tensor& incoming,
                       bool correct) const {
  CrossEntropy c = rows(logits, 0, softmax, grad, incoming);
  c.correct = correct;
  c.multiprocessors = current_device().multiprocessors;
  call_.check(cross_entropy_backward(c, call_.stream()));
}

Tensor RowLoss::reduced(const Tensor& loss, at::ScalarType dtype) const {
  if (options_.reduction == kNone) return loss.to(dtype);
  const Tensor output = call_.empty({}, dtype);
  const Tensor partial = call_.empty({cross_entropy_partials(loss.size(0))}, at::kDouble);
  call_.check(cross_entropy_reduce(dtype_tag(output), call_.in(loss), loss.size(0), call_.in(divisor_),
                                   call_.out(partial), call_.out(output), call_.stream()));
  return output;
}

}  // namespace fastllm::cuda
