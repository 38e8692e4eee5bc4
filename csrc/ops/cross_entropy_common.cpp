#include "cross_entropy_common.h"

FASTLLM_DEFINE_DISPATCH(CrossEntropyKernels, cross_entropy)

namespace fastllm {

void check_options(const char* op, const LossOptions& o) {
  TORCH_CHECK_VALUE(o.reduction >= kNone && o.reduction <= kSum, op,
                    ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ", o.reduction);
  TORCH_CHECK(o.label_smoothing >= 0 && o.label_smoothing <= 1, op,
              ": label_smoothing must be between 0.0 and 1.0, got ", o.label_smoothing);
  TORCH_CHECK_VALUE(!o.softcap.has_value() || *o.softcap > 0, op, ": softcap must be positive or None, got ",
                    o.softcap.value_or(0));
}

void save_options(AutogradContext* ctx, const LossOptions& o, int64_t flags) {
  ctx->saved_data["options"] = o.reduction | flags << 2;
  if (o.ignore_index != -100) ctx->saved_data["ignore_index"] = o.ignore_index;
  if (o.label_smoothing != 0 || o.lse_square_scale != 0 || o.softcap.has_value())
    ctx->saved_data["numbers"] = std::vector<double>{o.label_smoothing, o.lse_square_scale, o.softcap.value_or(0)};
}

LossOptions saved_options(AutogradContext* ctx, int64_t* flags) {
  const int64_t options = ctx->saved_data["options"].toInt();
  *flags = options >> 2;
  LossOptions o{options & 3, -100, 0, 0, std::nullopt};
  if (const auto found = ctx->saved_data.find("ignore_index"); found != ctx->saved_data.end())
    o.ignore_index = found->second.toInt();
  if (const auto found = ctx->saved_data.find("numbers"); found != ctx->saved_data.end()) {
    const auto numbers = found->second.toDoubleList();
    o.label_smoothing = numbers[0];
    o.lse_square_scale = numbers[1];
    if (numbers[2] != 0) o.softcap = numbers[2];
  }
  return o;
}

Tensor cross_entropy_definition(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                const LossOptions& o) {
  const Tensor z = o.softcap.has_value() ? at::tanh(logits / *o.softcap) * *o.softcap : logits;
  const bool probabilities = target.is_floating_point();
  const Tensor y = probabilities || target.scalar_type() == at::kLong ? target : target.to(at::kLong);
  const Tensor loss = at::cross_entropy_loss(z, y, weight, o.reduction, o.ignore_index, o.label_smoothing);
  if (o.lse_square_scale == 0) return loss;
  const Tensor acc = z.to(acc_dtype(z.scalar_type()));
  Tensor squares = at::logsumexp(acc, {1}).square() * o.lse_square_scale;
  Tensor divisor;
  if (probabilities) {
    divisor = at::full_symint({}, squares.sym_size(0), squares.options());
  } else {
    const Tensor counted = y != o.ignore_index;
    squares = at::where(counted, squares, at::zeros({}, squares.options()));
    const Tensor safe = at::where(counted, y, at::zeros({}, y.options()));
    divisor = defined(weight) ? (weight->index_select(0, safe).to(squares.scalar_type()) * counted).sum()
                              : counted.sum().to(squares.scalar_type());
  }
  if (o.reduction == kNone) return loss + squares.to(loss.scalar_type());
  const Tensor sum = squares.sum();
  return loss + (o.reduction == kSum ? sum : sum / divisor).to(loss.scalar_type());
}

Tensor checked_indices(const char* op, const Tensor& target) {
  switch (target.scalar_type()) {
    case at::kLong:
    case at::kInt: return target.contiguous();
    case at::kByte: return target.to(at::kLong).contiguous();
    default: TORCH_CHECK(false, op, ": target must be int64 or int32 class indices, got ", target.scalar_type());
  }
}

void check_class_weight(const char* op, const OptionalTensor& weight, const Tensor& like, const c10::SymInt& classes) {
  if (!defined(weight)) return;
  TORCH_CHECK(weight->dim() == 1 && weight->sym_size(0) == classes, op, ": weight must be of shape (", classes,
              ",), one number for each class, got ", weight->sym_sizes());
  TORCH_CHECK(weight->scalar_type() == like.scalar_type(), op, ": weight must have input's dtype ", like.scalar_type(),
              ", got ", weight->scalar_type());
  TORCH_CHECK(weight->device() == like.device(), op, ": weight must be on input's device ", like.device(), ", got ",
              weight->device());
}

at::ScalarType probability_dtype(const Tensor& input, const Tensor& target, const OptionalTensor& weight) {
  const at::ScalarType dtype = at::promote_types(input.scalar_type(), target.scalar_type());
  return defined(weight) && weight->is_floating_point() ? at::promote_types(dtype, weight->scalar_type()) : dtype;
}

RowLoss::RowLoss(const char* op, at::ScalarType dtype, int64_t classes, const Tensor& target,
                 const OptionalTensor& weight, const LossOptions& options)
    : options_(options), classes_(classes), probabilities_(target.is_floating_point()), target_(target.contiguous()) {
  // Probabilities of no class have no memory, and the kernel takes a null pointer for class indices.
  TORCH_CHECK_VALUE(classes > 0 || !probabilities_, op, ": class probabilities must be of at least one class, got ",
                    target.sizes());
  const at::ScalarType acc = acc_dtype(dtype);
  dtype_ = dtype == at::kFloat      ? DType::kF32
           : dtype == at::kDouble   ? DType::kF64
           : dtype == at::kBFloat16 ? DType::kBF16
                                    : DType::kF16;
  if (defined(weight)) weight_ = weight->to(acc).contiguous();
  weight_sum_ = weight_.defined() ? (options.label_smoothing > 0 ? weight_.sum(at::kDouble).item<double>() : 0)
                                  : static_cast<double>(classes);
  const int64_t rows = target.size(0);
  double counted = static_cast<double>(rows);
  if (!probabilities_) {
    const bool is_int32 = target_.scalar_type() == at::kInt;
    const int64_t bad = cpu::check_targets(data(target_), is_int32, rows, classes, options.ignore_index, dtype_,
                                           weight_.defined() ? data(weight_) : nullptr, &counted);
    TORCH_CHECK_INDEX(bad < 0, op, ": target must be in [0, ", classes, ") or ignore_index ", options.ignore_index,
                      ", got ", target_.view(-1)[bad < 0 ? 0 : bad].item<int64_t>(), " at position ", bad);
  }
  if (options.reduction == kMean) divisor_ = counted;
}

bool RowLoss::is_skinny() const {
  return (dtype_ == DType::kF32 || dtype_ == DType::kF64) && !probabilities_ && options_.label_smoothing == 0 &&
         options_.lse_square_scale == 0 && !options_.softcap.has_value();
}

void RowLoss::describe(cpu::SkinnyLoss* loss) const {
  loss->dtype = dtype_;
  loss->rows = target_.size(0);
  loss->classes = classes_;
  loss->target = data(target_);
  loss->target_is_int32 = target_.scalar_type() == at::kInt;
  loss->ignore_index = options_.ignore_index;
  loss->class_weight = weight_.defined() ? data(weight_) : nullptr;
}

cpu::CrossEntropyRows RowLoss::rows(const Tensor& logits, int64_t first, const Tensor& softmax, const Tensor& grad,
                                    double scale, const Tensor& row_scale) const {
  const auto offset = [&](const Tensor& t, int64_t items) {
    return static_cast<const char*>(t.const_data_ptr()) + first * items * static_cast<int64_t>(t.element_size());
  };
  cpu::CrossEntropyRows r{};
  r.dtype = dtype_;
  r.rows = logits.size(0);
  r.classes = classes_;
  r.logits = data(logits);
  r.logits_stride = logits.stride(0);
  if (probabilities_) {
    r.probabilities = offset(target_, classes_);
  } else {
    r.target = offset(target_, 1);
    r.target_is_int32 = target_.scalar_type() == at::kInt;
  }
  r.weight = weight_.defined() ? data(weight_) : nullptr;
  r.weight_sum = weight_sum_;
  r.ignore_index = options_.ignore_index;
  r.label_smoothing = options_.label_smoothing;
  r.lse_square_scale = options_.lse_square_scale;
  r.softcap = options_.softcap.value_or(0);
  r.row_max = softmax.mutable_data_ptr();
  r.row_log_sum = static_cast<char*>(r.row_max) + softmax.stride(0) * static_cast<int64_t>(softmax.element_size());
  if (grad.defined()) {
    r.grad = grad.mutable_data_ptr();
    r.grad_stride = grad.stride(0);
  }
  r.fixed_blocks = backend::batch_invariant();
  r.scale = scale;
  r.row_scale = row_scale.defined() ? data(row_scale) : nullptr;
  if (!scratch_.defined()) {
    const auto acc = dtype_ == DType::kF64 ? at::kDouble : at::kFloat;
    scratch_ = pool::empty({cpu::cross_entropy_scratch(classes_) * num_threads()}, acc);
  }
  r.scratch = scratch_.mutable_data_ptr();
  return r;
}

void RowLoss::forward(const Tensor& logits, int64_t first, const Tensor& loss, const Tensor& softmax,
                      const Tensor& grad, double scale, const Tensor& row_scale) const {
  cpu::CrossEntropyRows r = rows(logits, first, softmax, grad, scale, row_scale);
  r.loss = loss.mutable_data_ptr();
  cpu::cross_entropy().forward(r);
}

void RowLoss::backward(const Tensor& logits, int64_t first, const Tensor& softmax, const Tensor& grad, double scale,
                       const Tensor& row_scale) const {
  cpu::cross_entropy().backward(rows(logits, first, softmax, grad, scale, row_scale));
}

Tensor RowLoss::reduced(const Tensor& loss, at::ScalarType dtype) const {
  if (options_.reduction == kNone) return loss.to(dtype);
  double sum = 0;
  AT_DISPATCH_FLOATING_TYPES(loss.scalar_type(), "cross_entropy", [&] {
    const scalar_t* rows = loss.const_data_ptr<scalar_t>();
    for (int64_t i = 0; i < loss.numel(); ++i) sum += rows[i];
  });
  if (dtype != at::kFloat) return at::full({}, reduced(sum), at::TensorOptions().dtype(dtype));
  const Tensor result = pool::empty({}, dtype);
  *result.mutable_data_ptr<float>() = static_cast<float>(reduced(sum));
  return result;
}

}  // namespace fastllm
