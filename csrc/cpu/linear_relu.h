#pragma once
#include "isa.h"
#include "types.h"

namespace fastllm::cpu {

// A product small enough that a library's set-up would cost more than its arithmetic.
struct SmallProduct {
  DType dtype;
  const void* a;  // (rows, inner), element (i, p) at i * a_row + p * a_inner
  int64_t a_row, a_inner;
  const void* b;  // (inner, columns), element (p, j) at p * b_inner + j * b_column
  int64_t b_inner, b_column;
  const void* bias;  // (columns) or null
  bool relu;
  void* c;  // (rows, columns) contiguous
  int64_t rows, inner, columns;
};
constexpr int64_t kSmallProduct = int64_t{1} << 18;  // multiply-adds
constexpr int64_t kSmallTranspose = 2048;            // items of b, where its columns are not contiguous
inline bool is_small_product(int64_t rows, int64_t inner, int64_t columns, bool b_is_transposed) {
  return rows * inner * columns <= kSmallProduct && (!b_is_transposed || inner * columns <= kSmallTranspose);
}

struct LinearReluKernels {
  // c = relu(a b + bias), sums in the accumulator, one rounding. One thread.
  void (*small_product)(const SmallProduct&);
  // y (rows, columns) = relu(y + bias) in place; bias (columns) or null.
  void (*bias_relu)(DType dtype, void* y, const void* bias, int64_t rows, int64_t columns);
  // y = bias in every row.
  void (*fill_rows)(DType dtype, void* y, const void* bias, int64_t rows, int64_t columns);
  // dz = dy where y > 0 (y null: dz is not written), and sums (columns) of dz over rows, both where not null.
  // dz may be dy. partial: column_blocks(rows) * columns acc.
  void (*mask_sum)(DType dtype, const void* dy, const void* y, void* dz, void* sums, int64_t rows, int64_t columns,
                   void* partial);
};

// Rows summed before they join the total: fixed, so that the result does not depend on the number of threads.
constexpr int64_t kColumnBlock = 256;
inline int64_t column_blocks(int64_t rows) { return (rows + kColumnBlock - 1) / kColumnBlock; }

}  // namespace fastllm::cpu

FASTLLM_DECLARE_KERNELS(LinearReluKernels, linear_relu)
