"""cross_entropy: softmax cross-entropy of logits, with label smoothing, class weights, z-loss and soft cap."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm import eager
from fastllm.operations.checks import (
    check_class_weight,
    check_device,
    check_given,
    check_loss_options,
    checked_indices,
    probability_dtype,
)
from fastllm.operations.declaration import DTYPES, REDUCTIONS, Autocast, Kernel, Operation, accumulator
from fastllm.operations.node import (
    differentiate,
    drop_formed,
    has_formed,
    is_concrete,
    is_one,
    keep_formed,
    needs_grad,
    take_formed,
)

# The options of a loss over rows, in the order in which every operation takes them.
LOSS_OPTIONS = "int reduction, int ignore_index, float label_smoothing, float lse_square_scale, float? softcap"


def definition(logits: Tensor, target: Tensor, weight: Tensor | None, options: tuple) -> Tensor:
    """The loss in PyTorch's differentiable operations; ``options`` as in :data:`LOSS_OPTIONS`."""
    reduction, ignore_index, label_smoothing, lse_square_scale, softcap = options
    return eager.cross_entropy(
        logits, target, weight, ignore_index, REDUCTIONS[reduction], label_smoothing, lse_square_scale, softcap
    )


def _forward_fake(
    input, target, weight, reduction, ignore_index, label_smoothing, lse_square_scale, softcap, need_grad
):
    loss = input.new_empty(input.shape[0] if reduction == 0 else ())
    softmax = input.new_empty(2, input.shape[0], dtype=accumulator(input.dtype))
    return loss, softmax, input.new_empty(input.shape if need_grad and reduction != 0 else (0, 0))


def _backward_fake(grad_output, input, *_):
    return input.new_empty(input.shape)


def has_contiguous_rows(logits: Tensor) -> bool:
    """Whether a kernel can walk the rows where they lie: contiguous, and apart from each other."""
    apart = logits.shape[0] < 2 or logits.stride(0) >= logits.shape[1]
    return apart and (logits.stride(1) == 1 or logits.shape[1] < 2)


class CrossEntropy(torch.autograd.Function):
    """Under ``mean`` and ``sum`` the gradient is formed in forward, for an incoming gradient of 1.

    Another incoming gradient, a fake tensor, ``none`` or ``inplace_backward`` forms it in backward from the saved logits
    and their rows' maximum and sum: never by scaling what was rounded before, which in float16 may have vanished. A kernel
    reads the incoming gradient on its device, and leaves the gradient as it is if it is 1.
    """

    @staticmethod
    def forward(ctx, input: Tensor, target: Tensor, weight: Tensor | None, options: tuple, inplace: bool) -> Tensor:
        need_input, need_target = ctx.needs_input_grad[:2]
        early = options[0] != 0 and not inplace and need_input and not need_target and is_concrete(input, target)
        output, softmax, grad = torch.ops.fastllm.cross_entropy_forward(input, target, weight, *options, early)
        ctx.save_for_backward(input, target, weight, softmax)
        ctx.options, ctx.inplace, ctx.overwritten = options, inplace, False
        keep_formed(ctx, grad if early else None)
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        if ctx.overwritten:
            raise RuntimeError(
                "cross_entropy: a second backward through logits that inplace_backward=True has overwritten with their "
                "gradient; use inplace_backward=False to keep the graph"
            )
        need_input, need_target = ctx.needs_input_grad[:2]
        formed = has_formed(ctx) and is_concrete(grad_output) and not torch.is_grad_enabled() and not need_target
        if formed and is_one(grad_output):
            return *take_formed(ctx), None, None, None, None
        input, target, weight, softmax = ctx.saved_tensors
        arguments = (grad_output, input, target, weight, softmax, *ctx.options)
        if torch.is_grad_enabled() or need_target:
            # Second derivatives, and the gradient of class probabilities: by the definition.
            grads = differentiate(
                lambda x, t: definition(x, t, weight, ctx.options),
                (input, target),
                (need_input, need_target),
                grad_output,
            )
            drop_formed(ctx)
            return *grads, None, None, None
        if ctx.inplace and is_concrete(input, grad_output):
            storage = input.detach()
            torch.ops.fastllm.cross_entropy_backward_(grad_output, storage, *arguments[2:])
            torch.autograd.graph.increment_version(storage)  # whoever else saved the logits is told
            ctx.overwritten = True
            return storage, None, None, None, None
        if formed:
            (grad,) = take_formed(ctx)
            torch.ops.fastllm.cross_entropy_correct_(*arguments, grad)
        else:
            drop_formed(ctx)
            grad = torch.ops.fastllm.cross_entropy_backward(*arguments)
        return grad, None, None, None, None


def _check_shapes(input: Tensor, target: Tensor, probabilities: bool) -> None:
    op = "cross_entropy"
    if input.dim() < 1:
        raise IndexError(f"{op}: input must have at least 1 dimension, got 0")
    check_device(op, "target", target, "input", input.device)
    if probabilities:
        return
    if input.dim() == 1:
        if not (target.dim() == 0 or (target.dim() == 1 and target.shape[0] == 1)):
            raise ValueError(
                f"{op}: target must be of shape () or (1,) for input of shape {list(input.shape)}, "
                f"got {list(target.shape)}"
            )
        return
    if target.dim() == 0 or input.shape[0] != target.shape[0]:
        raise ValueError(f"{op}: target must have input's batch size {input.shape[0]}, got {list(target.shape)}")
    if target.shape != (input.shape[0], *input.shape[2:]):
        raise RuntimeError(
            f"{op}: target must be of input's shape {list(input.shape)} without its class dimension, or of that shape "
            f"with class probabilities, got {list(target.shape)}"
        )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    lse_square_scale: float,
    softcap: float | None,
    inplace_backward: bool,
) -> Tensor:
    op = "cross_entropy"
    check_loss_options(op, reduction, label_smoothing, softcap)
    check_given(op, input=input, target=target)
    probabilities = input.shape == target.shape
    if probabilities and not target.is_floating_point():
        raise RuntimeError(f"{op}: target of class probabilities must be floating point, got {target.dtype}")
    _check_shapes(input, target, probabilities)
    if input.dtype not in DTYPES:
        raise NotImplementedError(f"{op}: input must be float32, float64, bfloat16 or float16, got {input.dtype}")
    classes = input.shape[0 if input.dim() == 1 else 1]
    x, y, w = input, target, weight
    if probabilities:
        if ignore_index >= 0:
            raise RuntimeError(f"{op}: ignore_index is not supported for class probabilities, got {ignore_index}")
        dtype = probability_dtype(input, target, weight)
        x, y = x.to(dtype), y.to(dtype)
        w = None if w is None else w.to(dtype)
    else:
        y = checked_indices(op, target)
    check_class_weight(op, w, x, classes, probabilities)
    # Rows of classes: (C) -> (1, C), (N, C, d1, ...) -> (N d1 ..., C).
    spatial = input.dim() > 2
    if input.dim() == 1:
        x = x.unsqueeze(0)
        y = y.unsqueeze(0) if probabilities or y.dim() == 0 else y
    elif spatial:
        x = x.movedim(1, -1).flatten(0, -2)
        y = y.movedim(1, -1).flatten(0, -2) if probabilities else y.flatten()
    options = (reduction, ignore_index, label_smoothing, lse_square_scale, softcap)
    if probabilities and (needs_grad(w) or classes == 0):
        output = definition(x, y, w, options)  # PyTorch differentiates by the weights here, but not with class indices
    elif needs_grad(x, y):
        # In place only over rows that a kernel can walk: other layouts get a copy of their own to overwrite.
        if inplace_backward and is_concrete(x) and not has_contiguous_rows(x):
            x = x.contiguous()
        output = CrossEntropy.apply(x, y, w, options, inplace_backward)
    else:
        output = torch.ops.fastllm.cross_entropy_forward(x, y, w, *options, False)[0]
    if reduction != 0:
        return output
    if input.dim() == 1:
        return output.squeeze(0)
    return output.reshape(input.shape[0], *input.shape[2:]) if spatial else output


_ARGUMENTS = "Tensor input, Tensor target, Tensor? weight"
_SAVED = f"{_ARGUMENTS}, Tensor softmax, {LOSS_OPTIONS}"
OPERATION = Operation(
    "cross_entropy",
    f"({_ARGUMENTS}, {LOSS_OPTIONS}, bool inplace_backward) -> Tensor",
    cross_entropy,
    (
        Kernel(
            "cross_entropy_forward",
            f"({_ARGUMENTS}, {LOSS_OPTIONS}, bool need_grad) -> (Tensor output, Tensor softmax, Tensor grad)",
            _forward_fake,
        ),
        Kernel("cross_entropy_backward", f"(Tensor grad_output, {_SAVED}) -> Tensor", _backward_fake),
        Kernel(
            "cross_entropy_backward_",
            f"(Tensor grad_output, {_SAVED.replace('Tensor input', 'Tensor(a!) input')}) -> ()",
        ),
        Kernel("cross_entropy_correct_", f"(Tensor grad_output, {_SAVED}, Tensor(a!) grad) -> ()"),
    ),
    Autocast(lower_precision=False),
)
