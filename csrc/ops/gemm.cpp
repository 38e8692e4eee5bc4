// PyTorch sends float32 products to MKL, which on processors not made by Intel leaves half of the machine unused
// (measured on a two-core AMD Zen 5 machine, 2048 x 768 x 50257: MKL 190 to 230 GFLOP/s, oneDNN 380 to 475). oneDNN is
// in the same PyTorch; on Intel the two are level and MKL stays.
#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>

#include "../cpu/isa.h"

// Exported by libtorch_cpu, declared in no installed header. Weak: absent from a PyTorch built without it.
namespace at::native {
__attribute__((weak)) void mkldnn_matmul(const Tensor& mat1, const Tensor& mat2, const Tensor& result, float beta,
                                         float alpha);
}  // namespace at::native

namespace fastllm {
namespace {

bool prefers_onednn() {
#ifdef FASTLLM_X86
  __builtin_cpu_init();
  return cpu::current_isa() >= cpu::Isa::kAvx512 && !__builtin_cpu_is("intel") && at::hasMKLDNN() &&
         at::native::mkldnn_matmul != nullptr;
#else
  return false;
#endif
}

bool onednn_serves_float32() {
  static const bool preferred = prefers_onednn();
  return preferred && at::globalContext().userEnabledMkldnn();
}

// Below this many multiply-adds the library's set-up costs more than its speed returns.
constexpr int64_t kSmallProduct = int64_t{1} << 21;

// oneDNN copies operands of any other layout first.
bool is_plain(const at::Tensor& t) { return t.is_contiguous() || t.t().is_contiguous(); }

}  // namespace

void gemm_out(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double beta) {
  at::Tensor result = out;
  const int64_t work = a.size(0) * a.size(1) * b.size(1);
  if (out.scalar_type() == at::kFloat && work >= kSmallProduct && out.is_contiguous() && is_plain(a) && is_plain(b) &&
      onednn_serves_float32()) {
    at::native::mkldnn_matmul(a, b, result, static_cast<float>(beta), 1.0f);
  } else if (beta == 0) {
    at::mm_out(result, a, b);
  } else {
    at::addmm_out(result, result, a, b);
  }
}

bool onednn_serves_bf16() {
  static const bool served = cpu::current_isa() >= cpu::Isa::kAvx512 && at::hasMKLDNN();
  return served && at::globalContext().userEnabledMkldnn();
}

const char* float32_gemm_library() { return onednn_serves_float32() ? "oneDNN" : "BLAS"; }

}  // namespace fastllm
