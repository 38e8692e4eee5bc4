// The public operations: each checks its arguments and applies its autograd node. fastllm/operations declares them.
#pragma once
#include <ATen/core/Tensor.h>

#include "operation.h"

namespace fastllm {

at::Tensor embedding(const at::Tensor& input, const at::Tensor& weight, int64_t padding_idx, bool scale_grad_by_freq,
                     bool sparse);
at::Tensor linear_relu(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias);
at::Tensor relu_mlp(const at::Tensor& input, const at::Tensor& weight1, const std::optional<at::Tensor>& bias1,
                    const at::Tensor& weight2, const std::optional<at::Tensor>& bias2);
at::Tensor mse_loss(const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
                    int64_t reduction);
at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
                         const LossOptions& options, bool inplace_backward);
at::Tensor linear_cross_entropy(const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
                                const std::optional<at::Tensor>& linear_bias, const std::optional<at::Tensor>& weight,
                                const LossOptions& options, bool accumulator_dtype);

// Registers a public operation: it differentiates by itself, and is called directly in inference mode.
#define FASTLLM_OPERATION(name)                                                                  \
  TORCH_LIBRARY_IMPL(fastllm, Autograd, m) { m.impl(#name, ::fastllm::flat<&::fastllm::name>); } \
  TORCH_LIBRARY_IMPL(fastllm, CompositeExplicitAutograd, m) { m.impl(#name, ::fastllm::flat<&::fastllm::name>); }

}  // namespace fastllm
