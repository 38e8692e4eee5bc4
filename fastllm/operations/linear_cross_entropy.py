"""linear_cross_entropy: ``cross_entropy(input linear_weight^T + linear_bias, target)`` without the N x V logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm import invariance
from fastllm.operations.checks import (
    check_class_weight,
    check_device,
    check_given,
    check_linear,
    check_loss_options,
    checked_indices,
    probability_dtype,
)
from fastllm.operations.cross_entropy import LOSS_OPTIONS
from fastllm.operations.cross_entropy import definition as cross_entropy_definition
from fastllm.operations.declaration import Autocast, Kernel, Operation, accumulator
from fastllm.operations.flops import layer_flops
from fastllm.operations.node import (
    differentiate,
    drop_formed,
    graph_is_kept,
    has_formed,
    is_concrete,
    is_one,
    keep_formed,
    needs_grad,
    take_formed,
)


def definition(input, linear_weight, target, linear_bias, weight, options) -> Tensor:
    """The loss in PyTorch's differentiable operations, in the accumulator's dtype."""
    logits = invariance.linear(input, linear_weight, linear_bias)
    loss = cross_entropy_definition(logits, target, weight, options)
    return loss.to(accumulator(loss.dtype))


def _gradients_fake(input, linear_weight, need_input, need_weight, need_bias):
    return (
        input.new_empty(input.shape if need_input else 0),
        input.new_empty(linear_weight.shape if need_weight else 0),
        input.new_empty(linear_weight.shape[0] if need_bias else 0),
    )


def _forward_fake(input, linear_weight, target, linear_bias, weight, reduction, *options):
    loss = input.new_empty(input.shape[0] if reduction == 0 else (), dtype=accumulator(input.dtype))
    return loss, *_gradients_fake(input, linear_weight, *options[-3:])


def _backward_fake(grad_output, input, linear_weight, *arguments):
    return _gradients_fake(input, linear_weight, *arguments[-3:])


def _flops(input, linear_weight, *_, **__) -> int:
    return layer_flops(input, linear_weight)


def _forward_flops(input, linear_weight, *options, **_) -> int:
    need_input, need_weight, _need_bias = options[-3:]
    return (1 + need_input + need_weight) * layer_flops(input, linear_weight)


def _backward_flops(grad_output, *arguments, **_) -> int:
    return _forward_flops(*arguments)


class _WithNumbers(torch.autograd.Function):
    """``tensor`` in its graph, with the numbers that it had when they were copied."""

    @staticmethod
    def forward(ctx, tensor: Tensor, numbers: Tensor) -> Tensor:
        return numbers.view_as(numbers)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, None


class LinearCrossEntropy(torch.autograd.Function):
    """Gradients are formed in forward, for an incoming gradient of 1, and scaled if it is another.

    ``none`` and float16, whose range a later scale could not bring back, compute the chunks again in backward.
    """

    @staticmethod
    def forward(ctx, input, linear_weight, target, linear_bias, weight, options: tuple) -> Tensor:
        need_input, need_weight, need_target, need_bias = ctx.needs_input_grad[:4]
        early = options[0] != 0 and input.dtype != torch.float16 and not need_target
        output, *grads = torch.ops.fastllm.linear_cross_entropy_forward(
            input, linear_weight, target, linear_bias, weight, *options,
            early and need_input, early and need_weight, early and need_bias,
        )  # fmt: skip
        # An optimizer may change the bias before backward, which otherwise reads it only for second derivatives.
        bias = linear_bias if early or linear_bias is None else linear_bias.clone()
        ctx.save_for_backward(input, linear_weight, target, bias, weight)
        ctx.invariant = invariance.active()
        ctx.options, ctx.bias = options, None if early else linear_bias
        needs = (need_input, need_weight, need_bias)
        keep_formed(ctx, *(g if early and need else None for g, need in zip(grads, needs, strict=True)))
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        need_input, need_weight, need_target, need_bias = ctx.needs_input_grad[:4]
        if has_formed(ctx) and not torch.is_grad_enabled():
            grads = [_scaled(grad, grad_output) for grad in take_formed(ctx)]
            return grads[0], grads[1], None, grads[2], None, None
        input, linear_weight, target, bias, weight = ctx.saved_tensors
        if torch.is_grad_enabled() or need_target:
            if need_bias and ctx.bias is not None:
                bias = _WithNumbers.apply(ctx.bias, bias)
            grads = differentiate(
                lambda *a: definition(*a, weight, ctx.options),
                (input, linear_weight, target, bias),
                (need_input, need_weight, need_target, need_bias),
                grad_output,
            )
            _drop(ctx)
            return *grads, None, None
        needs = (need_input, need_weight, need_bias)
        with invariance.mode_of(ctx.invariant):
            found = torch.ops.fastllm.linear_cross_entropy_backward(
                grad_output, input, linear_weight, target, bias, weight, *ctx.options, *needs
            )
        grads = [g if need else None for g, need in zip(found, needs, strict=True)]
        _drop(ctx)
        return grads[0], grads[1], None, grads[2], None, None


def _drop(ctx) -> None:
    if not graph_is_kept():
        ctx.bias = None
    drop_formed(ctx)


def _scaled(grad: Tensor | None, factor: Tensor) -> Tensor | None:
    if grad is None or is_one(factor):
        return grad
    if not is_concrete(factor):
        return (grad * factor).to(grad.dtype)
    torch.ops.fastllm.linear_cross_entropy_scale_(factor, grad)
    return grad


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    lse_square_scale: float,
    softcap: float | None,
    accumulator_dtype: bool,
) -> Tensor:
    op = "linear_cross_entropy"
    check_loss_options(op, reduction, label_smoothing, softcap)
    check_given(op, input=input, target=target)
    if input.dim() not in (1, 2):
        raise RuntimeError(f"{op}: input must be 1-D or 2-D, got {input.dim()}-D {list(input.shape)}")
    check_linear(op, "input", input, "linear_weight", linear_weight, "linear_bias", linear_bias)
    single = input.dim() == 1
    x = input.unsqueeze(0) if single else input
    classes = linear_weight.shape[0]
    probabilities = target.shape == (*input.shape[:-1], classes)
    check_device(op, "target", target, "input", input.device)
    y = target.unsqueeze(0) if single else target
    w = weight
    if probabilities:
        if not target.is_floating_point():
            raise RuntimeError(f"{op}: target of class probabilities must be floating point, got {target.dtype}")
        y = y.to(x.dtype)
        w = None if weight is None else weight.to(x.dtype)
    else:
        if single and target.dim() == 1:
            y = target
        if y.dim() == 0 or y.shape[0] != x.shape[0]:
            raise ValueError(f"{op}: target must have input's batch size {x.shape[0]}, got {list(target.shape)}")
        if y.dim() != 1:
            raise RuntimeError(
                f"{op}: target must be of shape ({x.shape[0]},) or hold class probabilities of shape ({x.shape[0]}, "
                f"{classes}), got {list(target.shape)}"
            )
        y = checked_indices(op, y)
    check_class_weight(op, w, x, classes, probabilities)
    options = (reduction, ignore_index, label_smoothing, lse_square_scale, softcap)
    if probabilities and (needs_grad(w) or classes == 0):
        output = definition(x, linear_weight, y, linear_bias, w, options)
    elif needs_grad(x, linear_weight, linear_bias, y):
        output = LinearCrossEntropy.apply(x, linear_weight, y, linear_bias, w, options)
    else:
        output = torch.ops.fastllm.linear_cross_entropy_forward(
            x, linear_weight, y, linear_bias, w, *options, False, False, False
        )[0]
    if single and reduction == 0:
        output = output.squeeze(0)
    if accumulator_dtype:
        return output
    # The dtype that PyTorch gives the loss: input's, or what input, probabilities and weight are promoted to.
    return output.to(probability_dtype(input, target, weight) if target.is_floating_point() else input.dtype)


_ARGUMENTS = f"Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, {LOSS_OPTIONS}"
_NEEDS = "bool need_input, bool need_weight, bool need_bias"
_GRADIENTS = "Tensor grad_input, Tensor grad_weight, Tensor grad_bias"
OPERATION = Operation(
    "linear_cross_entropy",
    f"({_ARGUMENTS}, bool accumulator_dtype) -> Tensor",
    linear_cross_entropy,
    (
        Kernel(
            "linear_cross_entropy_forward",
            f"({_ARGUMENTS}, {_NEEDS}) -> (Tensor output, {_GRADIENTS})",
            _forward_fake,
            _forward_flops,
        ),
        Kernel(
            "linear_cross_entropy_backward",
            f"(Tensor grad_output, {_ARGUMENTS}, {_NEEDS}) -> ({_GRADIENTS})",
            _backward_fake,
            _backward_flops,
        ),
        Kernel("linear_cross_entropy_scale_", "(Tensor grad_output, Tensor(a!) grad) -> ()"),
    ),
    # The products in autocast's dtype; the loss stays in float32, and targets of class probabilities as they are.
    Autocast(lower_precision=True, keep=("target",), flag="accumulator_dtype"),
    _flops,
)
