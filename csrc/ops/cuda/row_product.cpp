#include "row_product.h"

namespace fastllm::cuda {
namespace {

constexpr int64_t kRows = 128;  // blocks of contiguous rows start at whole 256 bytes

void multiply(Tensor out, const Tensor& a, const Tensor& b, const OptionalTensor& bias) {
  if (defined(bias))
    at::addmm_out(out, *bias, a, b);
  else
    at::mm_out(out, a, b);
}

bool is_aligned(const Tensor& t, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % bytes == 0;
}

}  // namespace

void row_product_out(const Call& call, Tensor out, const Tensor& a, const Tensor& b, const OptionalTensor& bias) {
  if (!batch_invariant() || out.numel() == 0) return multiply(out, a, b, bias);
  const int64_t m = a.size(0), k = a.size(1), n = out.size(1);
  // One layout of a row, whatever tensor it stands in; that of a single row may say anything.
  Tensor rows = a.contiguous().as_strided({m, k}, {k, 1});
  if (!is_aligned(rows, 64)) rows = rows.clone();
  for (int64_t first = 0; first < m; first += kRows) {
    const int64_t size = std::min(kRows, m - first);
    if (size == kRows) {
      multiply(out.narrow(0, first, size), rows.narrow(0, first, size), b, bias);
      continue;
    }
    const Tensor block = at::zeros({kRows, k}, a.options());
    block.narrow(0, 0, size).copy_(rows.narrow(0, first, size));
    const Tensor result = call.empty({kRows, out.stride(0)}, out.scalar_type()).narrow(1, 0, n);
    multiply(result, block, b, bias);
    out.narrow(0, first, size).copy_(result.narrow(0, 0, size));
  }
}

Tensor aligned_rows(const Tensor& t) {
  if (!batch_invariant() || t.numel() == 0) return t;
  const int64_t item = static_cast<int64_t>(t.element_size()), multiple = 16 / item;
  if (is_aligned(t, 16) && t.stride(0) % multiple == 0) return t;
  const int64_t columns = t.size(1), padded = (columns + multiple - 1) / multiple * multiple;
  const Tensor copy = at::empty({t.size(0), padded}, t.options()).narrow(1, 0, columns);
  copy.copy_(t);
  return copy;
}

}  // namespace fastllm::cuda
