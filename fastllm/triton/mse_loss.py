"""mse_loss: loss and gradient in one pass over input and target.

PyTorch writes the differences, their squares and the gradient in kernels of their own; here input and target are read
once and the gradient is written while they are in registers: 3 items moved for each element instead of 7. Partial sums
are one for each program, added up by a single program in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.triton.common import ACCUMULATORS, constant, launch, multiprocessors

NONE, MEAN, SUM = 0, 1, 2
BLOCK = 2048
PROGRAMS = 8  # a multiprocessor


@triton.jit
def _mse(
    x, t, w, output, partial, grad, incoming, divisor,
    count, per_program,
    NONE_REDUCED: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr, CORRECT: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    if CORRECT:
        if tl.load(incoming).to(ACC) == 1.0:
            return
    program = tl.program_id(0)
    start = program.to(tl.int64) * per_program
    scale = tl.full((), 2.0, ACC)
    if GRAD and not NONE_REDUCED:
        if incoming is not None:
            scale *= tl.load(incoming).to(ACC)
        if divisor is not None:
            scale /= tl.load(divisor)
    total = tl.zeros((BLOCK,), ACC)
    for first in tl.range(0, per_program, BLOCK):
        offsets = start + first + tl.arange(0, BLOCK)
        mask = offsets < count
        d = tl.load(x + offsets, mask=mask, other=0.0).to(ACC) - tl.load(t + offsets, mask=mask, other=0.0).to(ACC)
        wd = d
        if w is not None:
            wd = d * tl.load(w + offsets, mask=mask, other=0.0).to(ACC)
        if LOSS:
            if NONE_REDUCED:
                tl.store(output + offsets, (wd * d).to(output.dtype.element_ty), mask=mask)
            else:
                total += wd * d
        if GRAD:
            if NONE_REDUCED:
                g = wd * (2 * tl.load(incoming + offsets, mask=mask, other=0.0).to(ACC))
            else:
                g = wd * scale
            tl.store(grad + offsets, g.to(grad.dtype.element_ty), mask=mask)
    if LOSS and not NONE_REDUCED:
        tl.store(partial + program, tl.sum(total, 0))


@triton.jit
def _finish(partial, divisor, output, programs, BLOCK: tl.constexpr, ACC: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(partial + lane, mask=lane < programs, other=0.0), 0)
    if divisor is not None:
        total = total / tl.load(divisor)
    tl.store(output, total.to(output.dtype.element_ty))


def _in_order(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """A tensor in the memory order of another, so that both are walked as flat arrays."""
    if tensor is None or tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _divisor(input: Tensor, weight: Tensor | None, reduction: int) -> Tensor | None:
    if reduction != MEAN:
        return None
    acc = ACCUMULATORS[input.dtype]
    if weight is not None:
        return weight.sum(dtype=acc)
    return torch.full((), input.numel(), dtype=acc, device=input.device)


def _run(input, target, weight, reduction, output, grad, incoming, correct=False) -> None:
    """One pass: the loss into ``output`` and the gradient into ``grad``, each unless it is None."""
    like = input if input.is_contiguous() else torch.empty_like(input)
    x, t, w = (_in_order(tensor, like) for tensor in (input, target, weight))
    if reduction == NONE and incoming is not None:
        incoming = _in_order(incoming.expand(input.shape), like)
    count, acc = input.numel(), ACCUMULATORS[input.dtype]
    programs = max(min(triton.cdiv(count, BLOCK), PROGRAMS * multiprocessors(input.device)), 1)
    per_program = triton.cdiv(triton.cdiv(count, programs), BLOCK) * BLOCK
    divisor = _divisor(input, weight, reduction)
    partial = None
    if output is not None and reduction != NONE:
        partial = torch.empty(programs, dtype=acc, device=input.device)
    launch(
        _mse, (programs,), input, x, t, w, output, partial, grad, incoming, divisor, count, per_program,
        NONE_REDUCED=reduction == NONE, LOSS=output is not None, GRAD=grad is not None, CORRECT=correct, BLOCK=BLOCK,
        ACC=constant(acc), num_warps=4,
    )  # fmt: skip
    if partial is not None:
        launch(_finish, (1,), input, partial, divisor, output, programs, BLOCK=triton.next_power_of_2(programs),
               ACC=constant(acc))  # fmt: skip


def forward(input, target, weight, reduction, need_grad):
    """Loss, and under ``mean`` and ``sum`` the gradient for an incoming gradient of 1."""
    output = torch.empty_like(input) if reduction == NONE else input.new_empty(())
    grad = torch.empty_like(input) if need_grad and reduction != NONE else None
    _run(input, target, weight, reduction, output, grad, None)
    return output, input.new_empty(0) if grad is None else grad


def backward(grad_output, input, target, weight, reduction):
    """Gradient of ``input``; that of ``target`` is its negative."""
    grad = torch.empty_like(input)
    _run(input, target, weight, reduction, None, grad, grad_output)
    return grad


def correct_(grad_output, input, target, weight, reduction, grad):
    """The gradient that forward formed for an incoming gradient of 1, formed anew on the device for another."""
    _run(input, target, weight, reduction, None, grad, grad_output, correct=True)
