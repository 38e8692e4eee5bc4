#pragma once
#include "isa.h"
#include "product.h"

namespace fastllm::cpu {

// A product where a row of c has the same bits whatever other rows there are, wherever it stands, and whatever the
// number of threads. c_column is 1.
struct RowProduct : Product {
  void* workspace;  // num_threads() * workspace(*this) bytes, aligned to 64
};

struct RowProductKernels {
  int64_t (*workspace)(const RowProduct&);  // bytes of one thread
  void (*multiply)(const RowProduct&);
};

}  // namespace fastllm::cpu

FASTLLM_DECLARE_KERNELS(RowProductKernels, row_product)
