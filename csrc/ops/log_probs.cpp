// log_probs on the CPU: the row kernels. Checks, autograd node and the loop over chunks of linear_log_probs are in
// fastllm/operations/log_probs.py, the same for every backend. Kernels: csrc/cpu/log_probs.cpp.
#include "../cpu/log_probs.h"

#include "../cpu/parallel.h"
#include "common.h"

FASTLLM_DEFINE_DISPATCH(LogProbsKernels, log_probs)

namespace fastllm {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

class Rows {
 public:
  Rows(const Tensor& logits, const Tensor& target, const OptionalTensor& temperature, const OptionalTensor& top_ids,
       int64_t ignore_index, double number, std::optional<double> softcap, const Tensor& saved) {
    r.dtype = dtype_tag(logits);
    r.rows = logits.size(0);
    r.classes = logits.size(1);
    r.logits = data(logits);
    r.logits_stride = row_stride("logits", logits);
    r.target = data(target);
    r.target_is_int32 = target.scalar_type() == at::kInt;
    r.ignore_index = ignore_index;
    r.temperature = data(temperature);
    r.number = number;
    r.softcap = softcap.value_or(0);
    if (defined(top_ids)) {
      r.top_ids = top_ids->const_data_ptr<int64_t>();
      r.tops = top_ids->size(1);
    }
    char* const to = static_cast<char*>(saved.mutable_data_ptr());
    const int64_t bytes = r.rows * static_cast<int64_t>(saved.element_size());
    r.max = to;
    r.log_sum = to + bytes;
    r.surprise = to + 2 * bytes;
    scratch_ = at::empty({num_threads() * cpu::log_probs_scratch(r.tops)}, saved.options());
    r.scratch = scratch_.mutable_data_ptr();
  }

  static int64_t row_stride(const char* name, const Tensor& t) {
    const bool one = t.size(0) < 2;
    TORCH_CHECK((one || t.stride(0) >= t.size(1)) && (t.stride(1) == 1 || t.size(1) < 2), "log_probs: ", name,
                " must have contiguous rows that do not overlap, got strides ", t.strides());
    return one ? t.size(1) : t.stride(0);
  }

  cpu::LogProbRows r{};

 private:
  Tensor scratch_;
};

template <class T>
void check_targets(const Tensor& target, int64_t ignore_index, int64_t classes) {
  const T* y = target.const_data_ptr<T>();
  for (int64_t i = 0; i < target.numel(); ++i)
    TORCH_CHECK_INDEX(y[i] == ignore_index || (y[i] >= 0 && y[i] < classes), "log_probs: target must be in [0, ",
                      classes, ") or ignore_index ", ignore_index, ", got ", y[i], " at position ", i);
}

int64_t target_at(const Tensor& target, int64_t i) {
  return target.scalar_type() == at::kInt ? target.const_data_ptr<int32_t>()[i] : target.const_data_ptr<int64_t>()[i];
}

// What only the numbers tell.
void check_values(const Tensor& target, const OptionalTensor& temperature, const OptionalTensor& top_ids,
                  int64_t ignore_index, int64_t classes) {
  if (target.scalar_type() == at::kInt)
    check_targets<int32_t>(target, ignore_index, classes);
  else
    check_targets<int64_t>(target, ignore_index, classes);
  if (defined(top_ids)) {
    const int64_t tops = top_ids->size(1);
    const int64_t* id = top_ids->const_data_ptr<int64_t>();
    for (int64_t i = 0; i < top_ids->numel(); ++i)
      TORCH_CHECK_INDEX((id[i] >= 0 && id[i] < classes) || target_at(target, i / tops) == ignore_index,
                        "log_probs: top_ids must be in [0, ", classes, "), got ", id[i], " at row ", i / tops,
                        ", column ", i % tops);
  }
  if (defined(temperature)) {
    AT_DISPATCH_FLOATING_TYPES(temperature->scalar_type(), "log_probs", [&] {
      const scalar_t* t = temperature->const_data_ptr<scalar_t>();
      for (int64_t i = 0; i < temperature->numel(); ++i)
        TORCH_CHECK_VALUE(t[i] > 0 || target_at(target, i) == ignore_index,
                          "log_probs: temperature must be positive, got ", t[i], " at position ", i);
    });
  }
}

Results rows_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& temperature,
                     const OptionalTensor& top_ids, int64_t ignore_index, double number, std::optional<double> softcap,
                     const c10::List<bool>& asked) {
  check_values(target, temperature, top_ids, ignore_index, logits.size(1));
  const int64_t n = logits.size(0);
  const at::ScalarType acc = acc_dtype(logits.scalar_type());
  const Tensor saved = at::empty({3, n}, logits.options().dtype(acc));
  Rows rows(logits, target, temperature, top_ids, ignore_index, number, softcap, saved);
  std::array<Tensor, 7> found;
  const std::array<void**, 7> to = {&rows.r.log_prob,   &rows.r.entropy,          &rows.r.lse,         nullptr,
                                    &rows.r.mean_logit, &rows.r.log_sum_sq_probs, &rows.r.top_log_prob};
  for (size_t i = 0; i < found.size(); ++i) {
    const bool ask = asked.get(i);
    const bool is_index = to[i] == nullptr, is_top = i + 1 == found.size();
    const at::ScalarType dtype = is_index ? at::kLong : acc;
    if (is_top && ask)
      found[i] = at::empty({n, rows.r.tops}, logits.options().dtype(dtype));
    else
      found[i] = at::empty({ask ? n : 0}, logits.options().dtype(dtype));
    if (!ask) continue;
    if (is_index)
      rows.r.argmax = found[i].mutable_data_ptr<int64_t>();
    else
      *to[i] = found[i].mutable_data_ptr();
  }
  cpu::log_probs().forward(rows.r);
  return {found[0], found[1], found[2], found[3], found[4], found[5], found[6], saved};
}

void rows_backward(const OptionalTensor& grad_log_prob, const OptionalTensor& grad_entropy,
                   const OptionalTensor& grad_lse, const OptionalTensor& grad_top_log_prob, const Tensor& saved,
                   const Tensor& logits, const Tensor& target, const OptionalTensor& temperature,
                   const OptionalTensor& top_ids, int64_t ignore_index, double number, std::optional<double> softcap,
                   const Tensor& grad) {
  check_values(target, temperature, top_ids, ignore_index, logits.size(1));
  Rows rows(logits, target, temperature, top_ids, ignore_index, number, softcap, saved);
  rows.r.grad_log_prob = data(grad_log_prob);
  rows.r.grad_entropy = data(grad_entropy);
  rows.r.grad_lse = data(grad_lse);
  rows.r.grad_top_log_prob = data(grad_top_log_prob);
  rows.r.grad = grad.mutable_data_ptr();
  rows.r.grad_stride = Rows::row_stride("grad", grad);
  cpu::log_probs().backward(rows.r);
}

TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("log_probs_rows_forward", &rows_forward);
  m.impl("log_probs_rows_backward_", &rows_backward);
}

}  // namespace
}  // namespace fastllm
