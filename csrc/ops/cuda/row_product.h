// Products whose rows are tokens, by PyTorch's library.
#pragma once
#include "call.h"

namespace fastllm::cuda {

// out (M, N) = a (M, K) b (K, N) + bias (N): rows of out apart, its items side by side. Under fastllm.batch_invariant
// in blocks of one number of rows, the last one filled up with zeros: the library chooses its kernel, and with it the
// order of summation, by shape, strides and alignment.
void row_product_out(const Call& call, Tensor out, const Tensor& a, const Tensor& b, const OptionalTensor& bias);

// Rows that the kernels of softmax walk in one order wherever they stand: under fastllm.batch_invariant each starts at
// a 16-byte boundary, which may take a copy.
Tensor aligned_rows(const Tensor& t);

}  // namespace fastllm::cuda
