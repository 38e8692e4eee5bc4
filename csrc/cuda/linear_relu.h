#pragma once
#include "launch.h"

namespace fastllm::cuda {

// y = relu(y + bias) in place; y (rows, columns) row by row, bias (columns) or null. relu(NaN) is NaN.
struct BiasRelu {
  DType dtype;
  int64_t rows, columns;
  void* y;
  const void* bias;
};
Status bias_relu(const BiasRelu& arguments, Stream stream);

// dz = dy where y is not <= 0, else 0, and partial sums of dz over rows; all (rows, columns) row by row.
struct MaskGradient {
  DType dtype;
  int64_t rows, columns;
  const void *dy, *y;  // null y: sums of dy alone, no dz
  void* dz;            // may be dy
  void* partial;       // accumulators of dtype, (mask_sums(...), columns); null: no sums
};
// Rows of `partial`, which may still be null; 0 where there is nothing to add.
int64_t mask_sums(const MaskGradient& arguments);
Status mask_gradient(const MaskGradient& arguments, Stream stream);

// out (columns) of dtype = the sum of partial (count, columns) over its rows, rounded once.
struct ColumnSums {
  DType dtype;
  int64_t count, columns;
  const void* partial;
  void* out;
};
Status finish_column_sums(const ColumnSums& arguments, Stream stream);

}  // namespace fastllm::cuda
