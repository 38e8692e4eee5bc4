"""linear_cross_entropy: cross_entropy(input linear_weight^T + linear_bias, target) without the N x V logits.

Rows are taken in few large chunks: a product writes a chunk's logits, the row kernel of cross_entropy turns them into
their gradient where they stand, and two more products take that gradient to input and linear_weight. Three products in
all, by the library; the rest moves 2 chunk x V items. The gradient of linear_weight is added up in float32 and rounded
once. Small chunks would stream linear_weight and its gradient from memory more often than they save.

Without a gradient there are no gradient buffers: one chunk of logits is all that is held.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm import invariance
from fastllm.operations import dense
from fastllm.operations.chunks import GPU_WORKSPACE, chunk_rows
from fastllm.triton.common import ACCUMULATORS, constant, launch
from fastllm.triton.cross_entropy import NONE, RowLoss

SCALE_BLOCK = 4096


@triton.jit
def _scale_unless_one(x, factor, count, BLOCK: tl.constexpr, ACC: tl.constexpr):
    f = tl.load(factor).to(ACC)
    if f == 1.0:
        return
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offsets, mask=offsets < count).to(ACC) * f
    tl.store(x + offsets, value.to(x.dtype.element_ty), mask=offsets < count)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (float32 or the operands' dtype) = a b, added unless it is the first."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif a.is_cuda and torch.version.cuda is not None:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=0 if first else 1, out=total)
    else:
        part = torch.mm(a, b)
        total.copy_(part) if first else total.add_(part)


def _walk(input, linear_weight, linear_bias, rows: RowLoss, incoming, needs) -> tuple[Tensor, list[Tensor]]:
    """Losses (N,) and the gradients asked for, each an empty tensor where it is not."""
    need_input, need_weight, need_bias = needs
    n, classes = input.size(0), linear_weight.size(0)
    dtype, acc = input.dtype, ACCUMULATORS[input.dtype]
    item = input.element_size()
    beside = 2 * linear_weight.numel() if need_weight and item == 2 else 0  # a sum in float32, not dtype
    chunk = chunk_rows(n, classes, item, GPU_WORKSPACE, beside)
    one = chunk >= n
    loss = input.new_empty(n, dtype=acc)
    softmax = input.new_empty(2, min(chunk, n), dtype=acc)
    buffer = dense.in_pieces(input, min(chunk, n), classes)
    grad_input = torch.empty_like(input, memory_format=torch.contiguous_format) if need_input else input.new_empty(0)
    grad_weight = (
        input.new_zeros(linear_weight.shape, dtype=dtype if one else acc) if need_weight else input.new_empty(0)
    )
    grad_bias = input.new_zeros(classes, dtype=acc) if need_bias else input.new_empty(0)
    for first in range(0, n, chunk):
        x = input[first : first + chunk]
        z = buffer[: x.size(0)]
        invariance.product(x, linear_weight.t(), linear_bias, out=z)
        by_row = incoming if incoming is None or incoming.dim() == 0 else incoming[first : first + chunk]
        rows.forward(z, loss[first : first + chunk], softmax[:, : x.size(0)], z if any(needs) else None, by_row, first)
        if need_input:
            invariance.product(z, linear_weight, out=grad_input[first : first + chunk])
        if need_weight:
            _add_product(grad_weight, z.t(), x, first == 0)
        if need_bias:
            grad_bias += z.sum(0, dtype=acc)
    return loss, [grad_input, grad_weight.to(dtype), grad_bias.to(dtype)]


def forward(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing,
            lse_square_scale, softcap, need_input, need_weight, need_bias):  # fmt: skip
    """Loss in the accumulator's dtype, and the gradients asked for, for an incoming gradient of 1."""
    rows = RowLoss("linear_cross_entropy", input.dtype, linear_weight.size(0), target, weight, reduction, ignore_index,
                   label_smoothing, lse_square_scale, softcap)  # fmt: skip
    loss, grads = _walk(input, linear_weight, linear_bias, rows, None, (need_input, need_weight, need_bias))
    return rows.reduced(loss, rows.acc), *grads


def backward(grad_output, input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing,
             lse_square_scale, softcap, need_input, need_weight, need_bias):  # fmt: skip
    """The gradients asked for, by a walk over the chunks again."""
    rows = RowLoss("linear_cross_entropy", input.dtype, linear_weight.size(0), target, weight, reduction, ignore_index,
                   label_smoothing, lse_square_scale, softcap)  # fmt: skip
    incoming = grad_output.contiguous() if reduction == NONE else grad_output
    return tuple(_walk(input, linear_weight, linear_bias, rows, incoming, (need_input, need_weight, need_bias))[1])


def scale_(grad_output, grad):
    """``grad *= grad_output``; a kernel reads the factor on the device and returns at once where it is 1."""
    launch(_scale_unless_one, (triton.cdiv(grad.numel(), SCALE_BLOCK),), grad, grad, grad_output, grad.numel(),
           BLOCK=SCALE_BLOCK, ACC=constant(ACCUMULATORS[grad.dtype]))  # fmt: skip
