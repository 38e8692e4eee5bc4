// A matrix product with an epilogue, in bfloat16 or float16: sums in float32, rounded once.
#pragma once
#include "launch.h"

namespace fastllm::cuda {

// c = epilogue(a b). Rows of a, b and c lie `*_row` items apart, items of a row side by side.
struct Product {
  DType dtype;
  int64_t rows, columns, inner;
  const void* a;  // (rows, inner)
  int64_t a_row;
  const void* b;  // (columns, inner) where b_turned, so that c = a b^T; else (inner, columns)
  int64_t b_row;
  bool b_turned;
  void* c;             // (rows, columns), row by row
  const void* bias;    // (columns), added before the ReLU; null: none
  bool relu;           // NaN stays
  const void* hidden;  // (rows, columns), row by row: c is 0 where it is <= 0; null: nowhere
  void* sums;          // float32 (gemm_mma_sums(...), columns), partial sums of c over its rows; null: none
};

// By mma.sync: any sizes, any alignment.
bool gemm_mma_runs();  // on the current device
int64_t gemm_mma_sums(const Product& product);
Status gemm_mma(const Product& product, Stream stream);

// By TMA and wgmma, persistent: b turned, rows of a, b and c in whole pieces of 16 bytes; no mask, no sums.
bool gemm_wgmma_runs();  // on the current device
bool gemm_wgmma_serves(const Product& product);
Status gemm_wgmma(const Product& product, Stream stream);

}  // namespace fastllm::cuda
