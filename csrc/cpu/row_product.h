#pragma once
#include "isa.h"
#include "types.h"

namespace fastllm::cpu {

// c = relu(a b + bias), where a row of c has the same bits whatever other rows there are, wherever it stands, and
// whatever the number of threads.
struct RowProduct {
  DType dtype;
  const void* a;  // (rows, inner), element (i, p) at i * a_row + p * a_inner
  int64_t a_row, a_inner;
  const void* b;  // (inner, columns), element (p, j) at p * b_inner + j * b_column
  int64_t b_inner, b_column;
  const void* bias;  // (columns) or null
  bool relu;
  void* c;  // (rows, columns), rows c_row items apart, items side by side
  int64_t c_row;
  int64_t rows, inner, columns;
  void* workspace;  // num_threads() * workspace(*this) bytes, aligned to 64
};

struct RowProductKernels {
  int64_t (*workspace)(const RowProduct&);  // bytes of one thread
  void (*multiply)(const RowProduct&);
};

}  // namespace fastllm::cpu

FASTLLM_DECLARE_KERNELS(RowProductKernels, row_product)
