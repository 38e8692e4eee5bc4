"""relu_mlp: linear(relu(linear(input, weight1, bias1)), weight2, bias2).

Forward: linear_relu's product, then the library's. Backward: the hidden gradient is masked in the epilogue of the
product that makes it (bfloat16 and float16), where the column sums for bias1 are also taken: no elementwise pass is
left. float32 and float64 take linear_relu's single pass for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm import invariance
from fastllm.triton import gemm
from fastllm.triton.common import ACCUMULATORS
from fastllm.triton.linear_relu import linear, masked


def forward(input, weight1, bias1, weight2, bias2):
    """Output (M, N) and hidden activation (M, H)."""
    hidden = linear(input, weight1, bias1, relu=True)
    return linear(hidden, weight2, bias2, relu=False), hidden


def _hidden_gradient(grad_output: Tensor, weight2: Tensor, hidden: Tensor, need_bias: bool) -> tuple[Tensor, Tensor]:
    """Masked gradient (M, H) of the hidden layer, and that of its bias if needed (else an empty tensor)."""
    if gemm.serves(hidden) and hidden.numel() > 0 and grad_output.numel() > 0:
        dz, sums = gemm.product(grad_output, weight2, turned=False, hidden=hidden.contiguous(), sums=need_bias)
        return dz, sums.to(hidden.dtype) if need_bias else hidden.new_empty(0)
    return masked(invariance.product(grad_output, weight2), hidden, need_bias)


def backward(grad_output, hidden, input, weight1, weight2, need_input, need_weight1, need_bias1, need_weight2,
             need_bias2):  # fmt: skip
    """Gradients of input, weight1, bias1, weight2 and bias2, each an empty tensor where it is not needed."""
    grad_input, grad_weight1, grad_bias1, grad_weight2, grad_bias2 = (grad_output.new_empty(0) for _ in range(5))
    if need_input or need_weight1 or need_bias1:
        dz, grad_bias1 = _hidden_gradient(grad_output, weight2, hidden, need_bias1)
        if need_input:
            grad_input = invariance.product(dz, weight1)
        if need_weight1:
            grad_weight1 = torch.mm(dz.t(), input)
    if need_weight2:
        grad_weight2 = torch.mm(grad_output.t(), hidden)
    if need_bias2:
        grad_bias2 = grad_output.sum(0, dtype=ACCUMULATORS[grad_output.dtype]).to(grad_output.dtype)
    return grad_input, grad_weight1, grad_bias1, grad_weight2, grad_bias2
