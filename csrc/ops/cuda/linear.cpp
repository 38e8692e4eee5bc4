// linear_relu and relu_mlp on CUDA: the plain operations of the backend `cuda`. Kernels: csrc/cuda/linear_relu.cu,
// gemm_mma.cu, gemm_wgmma.cu.
#include <cstdlib>

#include "../../cuda/gemm.h"
#include "../../cuda/linear_relu.h"
#include "call.h"

namespace fastllm::cuda {
namespace {

// --- the GEMM of products with an epilogue ------------------------------------------------------------------------

// For relu(x W^T + b), and the hidden gradient of relu_mlp.
enum class Gemm {
  kPlain,    // PyTorch's library, then a pass of ours
  kLibrary,  // PyTorch's own epilogue (bias and ReLU); the hidden gradient by kPlain
  kMma,      // ours
  kWgmma,    // ours for Hopper; the hidden gradient by kMma
};

// FASTLLM_CUDA_GEMM, if it is set.
std::optional<Gemm> forced_gemm(const char* op) {
  const char* name = std::getenv("FASTLLM_CUDA_GEMM");
  if (name == nullptr || *name == '\0') return std::nullopt;
  const std::string_view asked = name;
  if (asked == "plain") return Gemm::kPlain;
  if (asked == "library") return Gemm::kLibrary;
  if (asked == "mma") return Gemm::kMma;
  if (asked == "wgmma") return Gemm::kWgmma;
  TORCH_CHECK(false, op, ": FASTLLM_CUDA_GEMM must be plain, library, mma or wgmma, got ", name);
}

// Whether the library's epilogue keeps NaN and saves a pass: measured on an H100 (cuBLASLt of CUDA 13.0, every dtype
// but float64). With rows that are not whole pieces of 16 bytes its kernels for 16-bit items make NaN 0.
bool library_keeps_nan(const Product& p) {
  if (p.hidden != nullptr || p.bias == nullptr || p.dtype == DType::kF64) return false;
  const int64_t item = p.dtype == DType::kF32 ? 4 : 2;
  const auto whole = [&](const void* data, int64_t items) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && items * item % 16 == 0;
  };
  return gemm_wgmma_runs() && p.inner * item % 16 == 0 && whole(p.a, p.a_row) && whole(p.b, p.b_row) &&
         whole(p.bias, p.columns);
}

// What FASTLLM_CUDA_GEMM asks for is taken or refused. Without it the library's epilogue where it is known to be right,
// else kPlain: right for every dtype, size and NaN. On an H100 our own products are slower than either.
Gemm select_gemm(const char* op, const Product& p) {
  const std::optional<Gemm> forced = forced_gemm(op);
  if (!forced.has_value()) return library_keeps_nan(p) ? Gemm::kLibrary : Gemm::kPlain;
  if (*forced == Gemm::kPlain) return Gemm::kPlain;
  const auto refuse_unless = [&](bool possible, const char* needed) {
    TORCH_CHECK(possible, op, ": FASTLLM_CUDA_GEMM=", std::getenv("FASTLLM_CUDA_GEMM"), " needs ", needed);
  };
  if (*forced == Gemm::kLibrary) return p.hidden == nullptr ? Gemm::kLibrary : Gemm::kPlain;
  refuse_unless(p.dtype == DType::kBF16 || p.dtype == DType::kF16, "bfloat16 or float16");
  if (*forced == Gemm::kWgmma) {
    refuse_unless(gemm_wgmma_runs(), "a GPU of compute capability 9.0 and kernels built for sm_90a");
    if (p.hidden != nullptr) return Gemm::kMma;
    refuse_unless(gemm_wgmma_serves(p), "rows of input, weight and output in whole, aligned pieces of 16 bytes");
    return Gemm::kWgmma;
  }
  refuse_unless(gemm_mma_runs(), "a GPU of compute capability 8.0 or newer");
  return Gemm::kMma;
}

// Items of a row side by side, rows apart.
Tensor in_rows(const Tensor& t) {
  const bool items = t.size(1) == 1 || t.stride(1) == 1, apart = t.size(0) == 1 || t.stride(0) >= t.size(1);
  return items && apart ? t : t.contiguous();
}
int64_t row_items(const Tensor& t) { return t.size(0) == 1 ? t.size(1) : t.stride(0); }

// --- products by PyTorch's library --------------------------------------------------------------------------------

Tensor product(const Call& call, const Tensor& a, const Tensor& b) {
  Tensor out = call.empty({a.size(0), b.size(1)}, a.scalar_type());
  return at::mm_out(out, a, b);
}

// input weight^T + bias, rounded once.
Tensor linear(const Call& call, const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  if (!defined(bias)) return product(call, input, weight.t());
  Tensor out = call.empty({input.size(0), weight.size(0)}, input.scalar_type());
  return at::addmm_out(out, *bias, input, weight.t());
}

// bfloat16 and float16 add the bias to the product's float32 sums, so that they round once; float32 and float64 add it
// in the pass that takes the ReLU.
Tensor plain_linear_relu(const Call& call, const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const bool late_bias = input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble;
  const Tensor y = linear(call, input, weight, late_bias ? std::nullopt : bias);
  const Tensor b = late_bias && defined(bias) ? bias->contiguous() : Tensor();
  call.check(bias_relu({dtype_tag(y), y.size(0), y.size(1), call.out(y), call.in(b)}, call.stream()));
  return y;
}

// --- mask and sums over rows --------------------------------------------------------------------------------------

struct Masked {
  Tensor dz, sums;
};

// The sum of partial sums over their rows, rounded once.
Tensor finish(const Call& call, const Tensor& partial, at::ScalarType dtype) {
  const Tensor sums = call.empty({partial.size(1)}, dtype);
  call.check(finish_column_sums({dtype_tag(sums), partial.size(0), partial.size(1), call.in(partial), call.out(sums)},
                                call.stream()));
  return sums;
}

// dz = dy where y is not <= 0 (over dy where `in_place`), and its sum over rows where asked. Without y, dz is dy.
Masked mask(const Call& call, const Tensor& dy, const OptionalTensor& y, bool need_sums, bool in_place) {
  const Tensor from = dy.contiguous(), output = defined(y) ? y->contiguous() : Tensor();
  Masked result{!output.defined() || in_place ? from : call.empty_like(from), call.none(dy.scalar_type())};
  if (!output.defined() && !need_sums) return result;
  MaskGradient m{.dtype = dtype_tag(from),
                 .rows = from.size(0),
                 .columns = from.size(1),
                 .dy = call.in(from),
                 .y = call.in(output),
                 .dz = output.defined() ? call.out(result.dz) : nullptr,
                 .partial = nullptr};
  Tensor partial;
  if (need_sums) {
    partial = call.empty({mask_sums(m), m.columns}, acc_dtype(from.scalar_type()));
    m.partial = call.out(partial);
  }
  call.check(mask_gradient(m, call.stream()));
  if (need_sums) result.sums = finish(call, partial, from.scalar_type());
  return result;
}

// --- linear_relu: input (M, K), weight (N, K), bias (N) -----------------------------------------------------------

// relu(input weight^T + bias), rounded once.
Tensor linear_relu(const Call& call, const char* op, const Tensor& input, const Tensor& weight,
                   const OptionalTensor& bias) {
  const Tensor a = in_rows(input), b = in_rows(weight);
  if (a.numel() == 0 || b.numel() == 0) return plain_linear_relu(call, input, weight, bias);
  const Tensor c = call.empty({a.size(0), b.size(0)}, a.scalar_type());
  const Tensor added = defined(bias) ? bias->contiguous() : Tensor();
  const Product p{.dtype = dtype_tag(a),
                  .rows = a.size(0),
                  .columns = b.size(0),
                  .inner = a.size(1),
                  .a = call.in(a),
                  .a_row = row_items(a),
                  .b = call.in(b),
                  .b_row = row_items(b),
                  .b_turned = true,
                  .c = call.out(c),
                  .bias = call.in(added),
                  .relu = true,
                  .hidden = nullptr,
                  .sums = nullptr};
  switch (select_gemm(op, p)) {
    case Gemm::kPlain: return plain_linear_relu(call, input, weight, bias);
    case Gemm::kMma: call.check(gemm_mma(p, call.stream())); break;
    case Gemm::kWgmma: call.check(gemm_wgmma(p, call.stream())); break;
    case Gemm::kLibrary: {
      const Tensor b_or_zeros = added.defined() ? added : at::zeros({p.columns}, a.options());
      Tensor out = c;
      at::_addmm_activation_out(out, b_or_zeros, a, b.t());
    }
  }
  return c;
}

Tensor linear_relu_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const Call call("linear_relu", input);
  return linear_relu(call, "linear_relu", input, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_backward(const Tensor& grad_output, const Tensor& output,
                                                        const OptionalTensor& input, const OptionalTensor& weight,
                                                        bool need_input, bool need_weight, bool need_bias) {
  const Call call("linear_relu_backward", output);
  const Tensor none = call.none(output.scalar_type());
  const Masked g = mask(call, grad_output, output, need_bias, false);
  return {need_input ? product(call, g.dz, *weight) : none, need_weight ? product(call, g.dz.t(), *input) : none,
          g.sums};
}

// --- relu_mlp: input (M, K), weight1 (H, K), weight2 (N, H) -------------------------------------------------------

std::tuple<Tensor, Tensor> relu_mlp_forward(const Tensor& input, const Tensor& weight1, const OptionalTensor& bias1,
                                            const Tensor& weight2, const OptionalTensor& bias2) {
  const Call call("relu_mlp", input);
  const Tensor hidden = linear_relu(call, "relu_mlp", input, weight1, bias1);
  return {linear(call, hidden, weight2, bias2), hidden};
}

// grad_output weight2 (M, H) where the hidden activation is not <= 0, else 0, and its sum over rows where asked.
Masked hidden_gradient(const Call& call, const Tensor& grad_output, const Tensor& weight2, const Tensor& hidden,
                       bool need_sums) {
  const auto plain = [&] { return mask(call, product(call, grad_output, weight2), hidden, need_sums, true); };
  const Tensor a = in_rows(grad_output), b = in_rows(weight2), saved = hidden.contiguous();
  if (a.numel() == 0 || b.numel() == 0) return plain();
  Product p{.dtype = dtype_tag(a),
            .rows = a.size(0),
            .columns = b.size(1),
            .inner = a.size(1),
            .a = call.in(a),
            .a_row = row_items(a),
            .b = call.in(b),
            .b_row = row_items(b),
            .b_turned = false,
            .c = nullptr,
            .bias = nullptr,
            .relu = false,
            .hidden = call.in(saved),
            .sums = nullptr};
  if (select_gemm("relu_mlp_backward", p) == Gemm::kPlain) return plain();
  Masked result{call.empty({p.rows, p.columns}, a.scalar_type()), call.none(a.scalar_type())};
  p.c = call.out(result.dz);
  Tensor partial;
  if (need_sums) {
    partial = call.empty({gemm_mma_sums(p), p.columns}, at::kFloat);
    p.sums = call.out(partial);
  }
  call.check(gemm_mma(p, call.stream()));
  if (need_sums) result.sums = finish(call, partial, a.scalar_type());
  return result;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients relu_mlp_backward(const Tensor& grad_output, const OptionalTensor& hidden, const OptionalTensor& input,
                            const OptionalTensor& weight1, const OptionalTensor& weight2, bool need_input,
                            bool need_weight1, bool need_bias1, bool need_weight2, bool need_bias2) {
  const Call call("relu_mlp_backward", grad_output);
  const Tensor none = call.none(grad_output.scalar_type());
  Masked inner{none, none};
  if (need_input || need_weight1 || need_bias1)
    inner = hidden_gradient(call, grad_output, *weight2, *hidden, need_bias1);
  return {need_input ? product(call, inner.dz, *weight1) : none,
          need_weight1 ? product(call, inner.dz.t(), *input) : none, inner.sums,
          need_weight2 ? product(call, grad_output.t(), *hidden) : none,
          mask(call, grad_output, std::nullopt, need_bias2, false).sums};
}

TORCH_LIBRARY_IMPL(fastllm_cuda, FASTLLM_CUDA_KEY, m) {
  m.impl("linear_relu_forward", linear_relu_forward);
  m.impl("linear_relu_backward", linear_relu_backward);
  m.impl("relu_mlp_forward", relu_mlp_forward);
  m.impl("relu_mlp_backward", relu_mlp_backward);
}

}  // namespace
}  // namespace fastllm::cuda
