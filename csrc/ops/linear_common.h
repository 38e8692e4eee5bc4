// What linear_relu, relu_mlp and linear_cross_entropy share: a linear layer's product, mask and bias gradient, its
// checks.
#pragma once
#include "common.h"

namespace fastllm {

// What PyTorch's linear checks of its arguments; weight (out, in), bias (out) or undefined.
void check_linear(const char* op, const char* input_name, const Tensor& input, const char* weight_name,
                  const Tensor& weight, const char* bias_name, const OptionalTensor& bias);

// Whether PyTorch's linear would expand the bias to its output: any other shape than one number for each feature.
bool broadcasts_bias(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);

// input (M, K), weight (N, K): input weight^T + bias, and its ReLU where asked; rounded once.
Tensor linear_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, bool relu);

// c = relu(a b + bias) by our own kernel, and column_sums (columns), if defined, the sum of b over its rows; false, and
// nothing done, where a library is faster. Any strides.
bool try_small_product(const Tensor& c, const Tensor& a, const Tensor& b, const Tensor& bias, bool relu,
                       const Tensor& column_sums = Tensor());

// dz = dy where y > 0 (written over dy where `in_place`), and the sum of dz over rows where asked. Without y, dz is dy.
struct MaskedGradient {
  Tensor dz, bias;
};
MaskedGradient mask_gradient(const Tensor& dy, const OptionalTensor& y, bool need_bias, bool in_place);

// c = relu(a b + bias) for a of one row a token: under fastllm.batch_invariant by a kernel whose rows do not depend on
// each other (true), else nothing is done (false).
bool try_row_product(const Tensor& c, const Tensor& a, const Tensor& b, const Tensor& bias, bool relu);

// PyTorch's linear, for whatever is differentiated again; under fastllm.batch_invariant in blocks of one number of
// rows.
Tensor linear_definition(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);

// a b where a's rows are tokens: try_row_product is asked first. The second writes pooled memory.
void row_product_out(const Tensor& out, const Tensor& a, const Tensor& b);
Tensor row_product(const Tensor& a, const Tensor& b);

// a b, and a^T b, into pooled memory.
Tensor product(const Tensor& a, const Tensor& b);
Tensor product_of_turned(const Tensor& a, const Tensor& b);

// input as (rows, features): a view where its layout allows one.
Tensor as_rows(const Tensor& input);

}  // namespace fastllm
