#pragma once
#include "launch.h"

namespace fastllm::cuda {

// Column sums of a matrix (rows, columns), its rows `stride` items apart, stride 16 bytes' multiple: blocks of rows
// leave one row of acc each. Rows of `partial` (.., columns) that a call writes:
int64_t column_sum_blocks(int64_t rows, int64_t columns);
Status column_sums(DType dtype, const void* matrix, int64_t rows, int64_t columns, int64_t stride, void* partial,
                   Stream stream);
// output (columns) of dtype = the sum of `blocks` rows of `partial`, in order.
Status finish_column_sums(DType dtype, const void* partial, int64_t blocks, int64_t columns, void* output,
                          Stream stream);

// x (count) *= factor, of dtype or acc; x is left as it is where the factor is 1.
Status scale_unless_one(DType dtype, void* x, int64_t count, const void* factor, bool factor_is_acc, Stream stream);

}  // namespace fastllm::cuda
