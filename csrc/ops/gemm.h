// Matrix products by PyTorch's own libraries, into memory that the caller chose.
#pragma once
#include <ATen/core/Tensor.h>

namespace fastllm {

// out = a b + beta out, for 2-D CPU tensors of one dtype; beta is 0 or 1. Sums in float32 (float64 for float64), one
// rounding. Any strides; fastest where each operand is contiguous or the transpose of a contiguous matrix.
void gemm_out(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double beta = 0);

// Items between the rows of a result of `columns` columns that gemm_out writes fastest: `columns`, or a few more.
int64_t fast_row_stride(int64_t columns, at::ScalarType dtype);

// Whether oneDNN multiplies bfloat16 matrices on this processor by more than emulation.
bool onednn_serves_bf16();

// Which library gemm_out takes for float32 here: "oneDNN" or "BLAS".
const char* float32_gemm_library();

}  // namespace fastllm
