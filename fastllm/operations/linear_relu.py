"""linear_relu: ``relu(input weight^T + bias)``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm import eager, invariance
from fastllm.operations.checks import as_rows, broadcasts_bias, check_given, check_linear
from fastllm.operations.declaration import Autocast, Kernel, Operation
from fastllm.operations.flops import layer_flops
from fastllm.operations.node import needs_grad


def _forward_fake(input, weight, bias):
    return input.new_empty(input.shape[0], weight.shape[0])


def _backward_fake(grad_output, output, input, weight, need_input, need_weight, need_bias):
    rows, features = output.shape
    return (
        output.new_empty((rows, weight.shape[1]) if need_input else 0),
        output.new_empty((features, input.shape[1]) if need_weight else 0),
        output.new_empty(features if need_bias else 0),
    )


def _flops(input, weight, bias=None, **_) -> int:
    return layer_flops(input, weight)


def _backward_flops(grad_output, output, input, weight, need_input, need_weight, need_bias, **_) -> int:
    features = weight[1] if need_input else input[1] if need_weight else 0
    return (need_input + need_weight) * layer_flops(output, (output[1], features))


class LinearReLU(torch.autograd.Function):
    """Keeps the output, which tells where the gradient passes, and what the gradients asked for are products of."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = torch.ops.fastllm.linear_relu_forward(input, weight, bias)
        need_input, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(output, input if need_weight else None, weight if need_input else None)
        ctx.invariant = invariance.active()
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        output, input, weight = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # The ReLU has no second derivative: the mask is a constant.
            masked = torch.where(output.detach() <= 0, 0, grad_output)
            return (
                invariance.linear(masked, weight.t()) if need_input else None,
                masked.t() @ input if need_weight else None,
                masked.sum(0) if need_bias else None,
            )
        with invariance.mode_of(ctx.invariant):
            grads = torch.ops.fastllm.linear_relu_backward(
                grad_output, output, input, weight, need_input, need_weight, need_bias
            )
        return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=True))


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_given("linear_relu", weight=weight)
    # One feature without a dimension, or a bias to be expanded: PyTorch's.
    if weight.dim() == 1 or broadcasts_bias(input, weight, bias):
        return eager.linear_relu(input, weight, bias)
    check_linear("linear_relu", "input", input, "weight", weight, "bias", bias)
    rows = as_rows(input)
    if needs_grad(rows, weight, bias):
        output = LinearReLU.apply(rows, weight, bias)
    else:
        output = torch.ops.fastllm.linear_relu_forward(rows, weight, bias)
    return output if input.dim() == 2 else output.view(*input.shape[:-1], weight.shape[0])


OPERATION = Operation(
    "linear_relu",
    "(Tensor input, Tensor weight, Tensor? bias) -> Tensor",
    linear_relu,
    (
        Kernel("linear_relu_forward", "(Tensor input, Tensor weight, Tensor? bias) -> Tensor", _forward_fake, _flops),
        Kernel(
            "linear_relu_backward",
            "(Tensor grad_output, Tensor output, Tensor? input, Tensor? weight, bool need_input, bool need_weight, "
            "bool need_bias) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
            _backward_fake,
            _backward_flops,
        ),
    ),
    Autocast(lower_precision=True),
    _flops,
)
