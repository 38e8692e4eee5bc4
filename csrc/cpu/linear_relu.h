#pragma once
#include "isa.h"
#include "product.h"
#include "types.h"

namespace fastllm::cpu {

// A product small enough that a library's set-up would cost more than its arithmetic.
struct SmallProduct : Product {
  void* column_sums;  // (columns): sum of b over inner, or null
};
// Which products are taken: few multiply-adds, or a short inner or outer dimension, where a library packs more than it
// multiplies (measured against MKL and oneDNN on the shapes of the small model, batch 32 to 1024).
inline bool is_small_product(int64_t rows, int64_t inner, int64_t columns, bool b_is_turned) {
  const int64_t work = rows * inner * columns;
  const bool skinny = inner <= 32 || columns <= 32 || (rows <= 32 && !b_is_turned);
  return work <= (int64_t{1} << 18) || (work <= (int64_t{1} << 25) && skinny);
}

struct LinearReluKernels {
  // c = relu(a b + bias), sums in the accumulator, one rounding.
  void (*small_product)(const SmallProduct&);
  // y (rows, columns) = relu(y + bias) in place; bias (columns) or null.
  void (*bias_relu)(DType dtype, void* y, const void* bias, int64_t rows, int64_t columns);
  // y = bias in every row.
  void (*fill_rows)(DType dtype, void* y, const void* bias, int64_t rows, int64_t columns);
  // dz = dy where y > 0 (y null: dz is not written); dz may be dy. partial: null, or column_blocks(rows) * columns acc,
  // which become the sums of dz over blocks of rows.
  void (*mask)(DType dtype, const void* dy, const void* y, void* dz, int64_t rows, int64_t columns, void* partial);
  // sums (columns) of partial (blocks, columns) acc, in the order of blocks, rounded once.
  void (*finish_sums)(DType dtype, const void* partial, int64_t blocks, int64_t columns, void* sums);
};

// Rows summed before they join the total: fixed, so that the result does not depend on the number of threads.
constexpr int64_t kColumnBlock = 256;
inline int64_t column_blocks(int64_t rows) { return (rows + kColumnBlock - 1) / kColumnBlock; }

}  // namespace fastllm::cpu

FASTLLM_DECLARE_KERNELS(LinearReluKernels, linear_relu)
