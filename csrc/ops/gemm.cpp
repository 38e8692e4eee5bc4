// PyTorch sends float32 products to MKL, which on processors not made by Intel leaves half of the machine unused
// (measured on a two-core AMD Zen 5 machine, 2048 x 768 x 50257: MKL 190 to 230 GFLOP/s, oneDNN 380 to 475). oneDNN is
// in the same PyTorch; on Intel the two are level and MKL stays.
//
// Where the processor has no instructions for it, PyTorch multiplies bfloat16 and float16 matrices without a library: 1
// GFLOP/s on a Zen 3, a hundredth of float32. There operands are copied to float32 first, which also rounds but once.
#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>

#include "../cpu/isa.h"
#include "pool.h"

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
// Below this many, copies cost more than a product without a library.
constexpr int64_t kSmallConversion = int64_t{1} << 14;

// oneDNN copies operands of any other layout first.
bool is_plain(const at::Tensor& t) { return t.is_contiguous() || t.t().is_contiguous(); }

// MKL's kernels of AVX2 write rows that begin anywhere but at a whole vector at two thirds of the speed (measured on a
// two-core AMD Zen 3 machine, 384 x 768 x 50257: 85 GFLOP/s where rows are 50257 or 50258 items apart, 98 at 50260, 130
// at 50264). Other libraries copy such a result first, or have not been measured.
constexpr int64_t kVectorItems = 8;
bool wants_aligned_rows(at::ScalarType dtype) {
#ifdef FASTLLM_X86
  return dtype == at::kFloat && cpu::current_isa() == cpu::Isa::kAvx2;
#else
  return false;
#endif
}

bool multiplies_without_library(at::ScalarType dtype) {
#ifdef FASTLLM_X86
  static const bool serves_float16 = __builtin_cpu_supports("avx512fp16");
  return (dtype == at::kBFloat16 && !onednn_serves_bf16()) || (dtype == at::kHalf && !serves_float16);
#else
  return false;
#endif
}

void library_product(at::Tensor out, const at::Tensor& a, const at::Tensor& b, double beta) {
  if (beta == 0)
    at::mm_out(out, a, b);
  else
    at::addmm_out(out, out, a, b);
}

// MKL leaves threads waiting where a result has few rows and very many columns: each thread multiplies blocks of
// columns by itself instead (same machine, a weight of 50257 x 768: 128 rows 75 to 114 GFLOP/s, 344 rows 118 to 141,
// 512 rows 111 to 129). How columns are cut does not depend on the number of threads.
bool wants_column_blocks(const at::Tensor& out, const at::Tensor& b) {
  return wants_aligned_rows(out.scalar_type()) && out.size(0) <= 512 && out.size(1) >= 16384 && b.t().is_contiguous() &&
         out.stride(1) == 1 && out.stride(0) % kVectorItems == 0;
}

void product_by_column_blocks(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double beta) {
  const int64_t columns = out.size(1), blocks = (columns + 65535) / 65536 * 64;
  const int64_t block = ((columns + blocks - 1) / blocks + kVectorItems - 1) / kVectorItems * kVectorItems;
  at::parallel_for(0, (columns + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below;  // a thread's own: it is not inherited
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * block, size = std::min(block, columns - first);
      library_product(out.narrow(1, first, size), a, b.narrow(1, first, size), beta);
    }
  });
}

// A float32 copy in the memory order of `t`.
at::Tensor widened(const at::Tensor& t) {
  const bool turned = !t.is_contiguous() && t.t().is_contiguous();
  const at::Tensor rows = turned ? t.t() : t;
  const at::Tensor copy = pool::empty(rows.sizes(), at::kFloat).copy_(rows);
  return turned ? copy.t() : copy;
}

}  // namespace

void gemm_out(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double beta) {
  at::Tensor result = out;
  const int64_t work = a.size(0) * a.size(1) * b.size(1);
  if (work >= kSmallConversion && multiplies_without_library(out.scalar_type())) {
    const at::Tensor sums = beta == 0 ? pool::empty(out.sizes(), at::kFloat) : widened(out);
    gemm_out(sums, widened(a), widened(b), beta);
    result.copy_(sums);
  } else if (out.scalar_type() == at::kFloat && work >= kSmallProduct && out.is_contiguous() && is_plain(a) &&
             is_plain(b) && onednn_serves_float32()) {
    at::native::mkldnn_matmul(a, b, result, static_cast<float>(beta), 1.0f);
  } else if (wants_column_blocks(out, b)) {
    product_by_column_blocks(out, a, b, beta);
  } else {
    library_product(out, a, b, beta);
  }
}

int64_t fast_row_stride(int64_t columns, at::ScalarType dtype) {
  return wants_aligned_rows(dtype) ? (columns + kVectorItems - 1) / kVectorItems * kVectorItems : columns;
}

bool onednn_serves_bf16() {
  static const bool served = cpu::current_isa() >= cpu::Isa::kAvx512 && at::hasMKLDNN();
  return served && at::globalContext().userEnabledMkldnn();
}

const char* float32_gemm_library() { return onednn_serves_float32() ? "oneDNN" : "BLAS"; }

}  // namespace fastllm
