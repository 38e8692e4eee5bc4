#pragma once
#include "types.h"

namespace fastllm::cpu {

// c = relu(a b + bias): sums in the accumulator, one rounding.
struct Product {
  DType dtype;
  const void* a;  // (rows, inner), element (i, p) at i * a_row + p * a_inner
  int64_t a_row, a_inner;
  const void* b;  // (inner, columns), element (p, j) at p * b_inner + j * b_column
  int64_t b_inner, b_column;
  const void* bias;  // (columns) or null
  bool relu;
  void* c;  // (rows, columns), element (i, j) at i * c_row + j * c_column
  int64_t c_row, c_column;
  int64_t rows, inner, columns;
};

}  // namespace fastllm::cpu
