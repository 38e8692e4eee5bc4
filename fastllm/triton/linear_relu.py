"""linear_relu: relu(input weight^T + bias).

bfloat16 and float16: bias and ReLU in the product's epilogue (gemm.py), so that the output is written once and never
read. float32 and float64: the library's product, then one pass over its output. Backward: one pass reads the incoming
gradient and the output, writes the masked gradient and leaves column sums for the bias; PyTorch takes a pass for the
mask and another for the sums. Then two products by the library.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm import invariance
from fastllm.triton import gemm
from fastllm.triton.common import ACCUMULATORS, constant, launch

ROWS, COLUMNS = 64, 64  # of a tile of the elementwise kernels


@triton.jit(do_not_specialize=["rows"])
def _bias_relu(y, bias, rows, columns, BIAS: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr,
               COLUMNS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    column_tiles = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = row[:, None] * columns + column[None, :]
    value = tl.load(y + offsets, mask=mask, other=0.0).to(ACC)
    if BIAS:
        value += tl.load(bias + column, mask=column < columns, other=0.0).to(ACC)[None, :]
    if RELU:
        value = tl.where(value <= 0, 0.0, value)  # NaN stays
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _mask(dy, y, dz, partial, rows, columns, SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
          ACC: tl.constexpr):  # fmt: skip
    column_tiles = tl.cdiv(columns, COLUMNS)
    block = (tl.program_id(0) // column_tiles).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = row[:, None] * columns + column[None, :]
    d = tl.load(dy + offsets, mask=mask, other=0.0)
    d = tl.where(tl.load(y + offsets, mask=mask, other=0.0) <= 0, tl.zeros_like(d), d)  # NaN passes, as in PyTorch
    tl.store(dz + offsets, d, mask=mask)
    if SUMS:
        tl.store(partial + block * columns + column, tl.sum(d.to(ACC), 0), mask=column < columns)


def _grid(rows: int, columns: int) -> tuple[int]:
    """Programs of a matrix's tiles, row by row, in one dimension: CUDA counts to 65535 in the others."""
    return (triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS),)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """input (M, K) weight (N, K)^T + bias (N,), and its ReLU where asked."""
    if relu and gemm.serves(input) and input.numel() > 0 and weight.numel() > 0:
        bias = None if bias is None else bias.contiguous()
        return gemm.product(input, weight, turned=True, bias=bias, relu=True)[0]
    if not relu:
        return invariance.product(input, weight.t(), bias)
    y = invariance.product(input, weight.t())
    bias = None if bias is None else bias.contiguous()
    launch(_bias_relu, _grid(*y.shape), y, y, bias, *y.shape,
           BIAS=bias is not None, RELU=True, ROWS=ROWS, COLUMNS=COLUMNS, ACC=constant(ACCUMULATORS[y.dtype]))  # fmt: skip
    return y


def masked(grad_output: Tensor, output: Tensor, need_bias: bool) -> tuple[Tensor, Tensor]:
    """The gradient where the output is not <= 0, and its column sums if asked for (else an empty tensor)."""
    dy, y = grad_output.contiguous(), output.contiguous()
    rows, columns = dy.shape
    acc = ACCUMULATORS[dy.dtype]
    dz = torch.empty_like(dy)
    blocks = triton.cdiv(rows, ROWS)
    partial = dy.new_empty(blocks, columns, dtype=acc) if need_bias else None
    launch(_mask, _grid(rows, columns), dy, dy, y, dz, partial, rows, columns, SUMS=need_bias, ROWS=ROWS,
           COLUMNS=COLUMNS, ACC=constant(acc))  # fmt: skip
    return dz, partial.sum(0).to(dy.dtype) if need_bias else dy.new_empty(0)


def forward(input, weight, bias):
    """relu(input weight^T + bias): (M, N)."""
    return linear(input, weight, bias, relu=True)


def backward(grad_output, output, input, weight, need_input, need_weight, need_bias):
    """Gradients of input, weight and bias, each an empty tensor where it is not needed."""
    dz, grad_bias = masked(grad_output, output, need_bias)
    grad_input = invariance.product(dz, weight) if need_input else output.new_empty(0)
    grad_weight = torch.mm(dz.t(), input) if need_weight else output.new_empty(0)
    return grad_input, grad_weight, grad_bias
