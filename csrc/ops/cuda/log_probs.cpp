// log_probs on CUDA: the plain operations of the backend `cuda` over rows of logits. Kernels: csrc/cuda/log_probs.cu.
#include "../../cuda/log_probs.h"

#include "call.h"
#include "checks.h"

namespace fastllm::cuda {
namespace {

constexpr const char* kOp = "log_probs";

// What both directions read, made contiguous: the numbers of a row, not its logits.
struct Rows {
  Tensor logits, target, temperature, top_ids;
  LogProbsRows arguments{};

  Rows(const Call& call, const Tensor& given, const Tensor& targets, const OptionalTensor& temperatures,
       const OptionalTensor& ids, int64_t ignore_index, double number, std::optional<double> softcap,
       const Tensor& saved)
      : logits(given), target(targets.contiguous()) {
    const int64_t rows = logits.size(0), classes = logits.size(1);
    TORCH_CHECK(classes <= kMostLogProbsClasses, kOp, ": the backend cuda serves at most 2^30 classes, got ", classes);
    const bool apart = rows < 2 || logits.stride(0) >= classes;
    TORCH_CHECK(apart && (logits.stride(1) == 1 || classes < 2), kOp,
                ": the logits' rows must be contiguous and apart, got strides ", logits.strides());
    if (defined(temperatures)) temperature = temperatures->to(acc_dtype(logits.scalar_type())).contiguous();
    if (defined(ids)) top_ids = ids->contiguous();
    if (checks_indices()) check(ignore_index);
    LogProbsRows& a = arguments;
    a.dtype = dtype_tag(logits);
    a.rows = rows;
    a.classes = classes;
    a.logits = call.in(logits);
    a.logits_stride = logits.stride(0);
    a.target = call.in(target);
    a.target_is_int32 = target.scalar_type() == at::kInt;
    a.ignore_index = ignore_index;
    a.temperature = call.in(temperature);
    a.number = number;
    a.softcap = softcap.value_or(0);
    a.top_ids = static_cast<const int64_t*>(call.in(top_ids));
    a.top = top_ids.defined() ? static_cast<int>(top_ids.size(1)) : 0;
    a.saved = call.out(saved);
  }

 private:
  // IndexError or ValueError that names what is wrong; of ignored rows nothing is asked.
  void check(int64_t ignore_index) const {
    const int64_t classes = logits.size(1);
    const std::string range = "[0, " + std::to_string(classes) + ")";
    check_indices(kOp, "target must be in " + range + " or ignore_index " + std::to_string(ignore_index), target,
                  classes, ignore_index);
    const auto on_host = [](const Tensor& t, at::ScalarType dtype) {
      return t.to(c10::Device(at::kCPU), dtype).contiguous();
    };
    const Tensor counted = on_host(target != ignore_index, at::kBool);
    const bool* counts = counted.const_data_ptr<bool>();
    if (temperature.defined()) {
      const Tensor values = on_host(temperature, at::kDouble);
      for (int64_t i = 0; i < values.numel(); ++i) {
        const double value = values.const_data_ptr<double>()[i];
        TORCH_CHECK_VALUE(!counts[i] || value > 0, kOp, ": temperature must be positive, got ", value, " at position ",
                          i);
      }
    }
    if (!top_ids.defined()) return;
    const Tensor ids = on_host(top_ids, at::kLong);
    for (int64_t i = 0; i < ids.numel(); ++i) {
      const int64_t id = ids.const_data_ptr<int64_t>()[i], row = i / ids.size(1);
      TORCH_CHECK_INDEX(!counts[row] || (id >= 0 && id < classes), kOp, ": top_ids must be in ", range, ", got ", id,
                        " at row ", row, ", column ", i % ids.size(1));
    }
  }
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results forward(const Tensor& logits, const Tensor& target, const OptionalTensor& temperature,
                const OptionalTensor& top_ids, int64_t ignore_index, double number, std::optional<double> softcap,
                const c10::List<bool>& asked) {
  const Call call(kOp, logits);
  const int64_t rows = logits.size(0);
  const at::ScalarType acc = acc_dtype(logits.scalar_type());
  const Tensor saved = call.empty({3, rows}, acc);
  Rows r(call, logits, target, temperature, top_ids, ignore_index, number, softcap, saved);
  LogProbsRows& a = r.arguments;
  const auto field = [&](size_t i, at::ScalarType dtype) {
    if (!asked.get(i)) return call.none(dtype);
    return i == 6 ? call.empty({rows, a.top}, dtype) : call.empty({rows}, dtype);
  };
  const Results found(field(0, acc), field(1, acc), field(2, acc), field(3, at::kLong), field(4, acc), field(5, acc),
                      field(6, acc), saved);
  const auto out = [&](size_t i, const Tensor& t) { return asked.get(i) ? call.out(t) : nullptr; };
  a.log_prob = out(0, std::get<0>(found));
  a.entropy = out(1, std::get<1>(found));
  a.lse = out(2, std::get<2>(found));
  a.argmax = static_cast<int64_t*>(out(3, std::get<3>(found)));
  a.mean_logit = out(4, std::get<4>(found));
  a.log_sum_sq_probs = out(5, std::get<5>(found));
  a.top_log_prob = out(6, std::get<6>(found));
  if (a.classes == 0) {  // every target is ignored
    std::get<3>(found).fill_(-1);
    for (const Tensor& t : {std::get<0>(found), std::get<1>(found), std::get<2>(found), std::get<4>(found),
                            std::get<5>(found), std::get<6>(found), saved})
      t.zero_();
    return found;
  }
  call.check(log_probs_forward(a, call.stream()));
  return found;
}

void backward(const OptionalTensor& grad_log_prob, const OptionalTensor& grad_entropy, const OptionalTensor& grad_lse,
              const OptionalTensor& grad_top_log_prob, const Tensor& saved, const Tensor& logits, const Tensor& target,
              const OptionalTensor& temperature, const OptionalTensor& top_ids, int64_t ignore_index, double number,
              std::optional<double> softcap, const Tensor& grad) {
  const Call call("log_probs_backward", logits);
  Rows r(call, logits, target, temperature, top_ids, ignore_index, number, softcap, saved);
  TORCH_CHECK(grad.sizes() == logits.sizes() && (grad.stride(1) == 1 || grad.size(1) < 2), kOp,
              ": the gradient must be of the logits' shape, with contiguous rows");
  const auto flat = [](const OptionalTensor& t) { return defined(t) ? t->contiguous() : Tensor(); };
  const Tensor g_y = flat(grad_log_prob), g_entropy = flat(grad_entropy), g_lse = flat(grad_lse),
               g_top = flat(grad_top_log_prob);
  LogProbsRows& a = r.arguments;
  a.grad_log_prob = call.in(g_y);
  a.grad_entropy = call.in(g_entropy);
  a.grad_lse = call.in(g_lse);
  a.grad_top_log_prob = call.in(g_top);
  a.grad = call.out(grad);
  a.grad_stride = grad.stride(0);
  if (a.classes > 0) call.check(log_probs_backward(a, call.stream()));
}

TORCH_LIBRARY_IMPL(fastllm_cuda, FASTLLM_CUDA_KEY, m) {
  m.impl("log_probs_rows_forward", forward);
  m.impl("log_probs_rows_backward_", backward);
}

}  // namespace
}  // namespace fastllm::cuda
