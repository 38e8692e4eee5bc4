"""mse_loss: ``reduction(weight (input - target)^2)``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm import eager
from fastllm.operations.checks import check_device, check_given
from fastllm.operations.declaration import DTYPES, REDUCTIONS, Autocast, Kernel, Operation
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


def definition(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
    """The loss in PyTorch's differentiable operations; ``weight`` may be of a size that input was broadcast from."""
    name = REDUCTIONS[reduction]
    return eager.mse_loss(input, target, name) if weight is None else eager.weighted(input, target, name, weight)


def _forward_fake(input, target, weight, reduction, need_grad):
    output = torch.empty_like(input) if reduction == 0 else input.new_empty(())
    return output, torch.empty_like(input) if need_grad and reduction != 0 else input.new_empty(0)


def _backward_fake(grad_output, input, target, weight, reduction):
    return torch.empty_like(input)


class MSELoss(torch.autograd.Function):
    """Under ``mean`` and ``sum`` the gradient is formed in forward, for an incoming gradient of 1.

    Another incoming gradient, a fake tensor or ``none`` computes it in backward from the saved inputs. A kernel reads the
    incoming gradient on its device, and leaves the gradient as it is if it is 1.
    """

    @staticmethod
    def forward(ctx, input: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
        early = reduction != 0 and is_concrete(input, target)
        output, grad = torch.ops.fastllm.mse_loss_forward(input, target, weight, reduction, early)
        ctx.save_for_backward(input, target, weight)
        ctx.reduction = reduction
        keep_formed(ctx, grad if early else None)
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        need_input, need_target = ctx.needs_input_grad[:2]

        def both(grad):
            return grad if need_input else None, grad.neg() if need_target else None, None, None

        formed = has_formed(ctx) and is_concrete(grad_output) and not torch.is_grad_enabled()
        if formed and is_one(grad_output):
            return both(take_formed(ctx)[0])
        input, target, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = differentiate(
                lambda x, t: definition(x, t, weight, ctx.reduction),
                (input, target),
                (need_input, need_target),
                grad_output,
            )
            drop_formed(ctx)
            return *grads, None, None
        if not formed:
            drop_formed(ctx)
            return both(torch.ops.fastllm.mse_loss_backward(grad_output, input, target, weight, ctx.reduction))
        (grad,) = take_formed(ctx)
        torch.ops.fastllm.mse_loss_correct_(grad_output, input, target, weight, ctx.reduction, grad)
        return both(grad)


def mse_loss(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
    op = "mse_loss"
    check_given(op, input=input, target=target)
    check_device(op, "target", target, "input", input.device)
    if weight is not None:
        if weight.shape != input.shape:
            raise ValueError(f"{op}: weight must have input's size {list(input.shape)}, got {list(weight.shape)}")
        check_device(op, "weight", weight, "input", input.device)
    x, t = (input, target) if input.shape == target.shape else torch.broadcast_tensors(input, target)
    dtype = torch.result_type(x, t)
    if dtype not in DTYPES:
        raise NotImplementedError(
            f"{op}: input and target must be float32, float64, bfloat16 or float16, got {input.dtype} and {target.dtype}"
        )
    x, t = x.to(dtype), t.to(dtype)
    w = None
    if weight is not None:
        wide = torch.result_type(x, weight)
        # The mean divides by the sum of the weights as given, which a broadcast would count more than once.
        if needs_grad(weight) or x.shape != weight.shape or wide not in DTYPES:
            return definition(x, t, weight, reduction)
        x, t, w = x.to(wide), t.to(wide), weight.to(wide)
    if needs_grad(x, t):
        return MSELoss.apply(x, t, w, reduction)
    return torch.ops.fastllm.mse_loss_forward(x, t, w, reduction, False)[0]


_ARGUMENTS = "Tensor input, Tensor target, Tensor? weight, int reduction"
OPERATION = Operation(
    "mse_loss",
    f"({_ARGUMENTS}) -> Tensor",
    mse_loss,
    (
        Kernel("mse_loss_forward", f"({_ARGUMENTS}, bool need_grad) -> (Tensor output, Tensor grad)", _forward_fake),
        Kernel("mse_loss_backward", f"(Tensor grad_output, {_ARGUMENTS}) -> Tensor", _backward_fake),
        Kernel("mse_loss_correct_", f"(Tensor grad_output, {_ARGUMENTS}, Tensor(a!) grad) -> ()"),
    ),
    Autocast(lower_precision=False),
)
