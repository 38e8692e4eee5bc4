"""embedding: rows of a table, and the table's gradient.

The gradient sums the incoming gradients of each id. PyTorch clears the table, sorts, writes partial sums and adds them;
Inductor adds by atomics, in any order. Here the sorted positions of an id are a segment, and one program of each table
row sums its segment in float32 and stores the row once, absent rows as zeros: V D items are written once, N D read
once, no atomics, the same bits every time.

A frequent id's segment is long. Sorted positions are cut into chunks of fixed length; chunks that lie within one
segment are summed first, side by side, and their row adds those sums in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.triton.common import ACCUMULATORS, ASSERTING, check_indices, constant, launch

CHUNK = 64  # sorted positions that are summed ahead, where they are of one id
TILE = 4096  # items in flight in a program
WIDTH = 1024  # columns of a program at most


@triton.jit(do_not_specialize=["count"])
def _gather(table, ids, output, count, rows, features, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    present = position < count
    row = tl.load(ids + position, mask=present, other=0).to(tl.int64)
    inside = (row >= 0) & (row < rows)
    tl.device_assert(inside, "embedding: input holds an id that is not a row of weight", mask=present)
    mask = (present & inside)[:, None] & (column < features)[None, :]
    values = tl.load(table + row[:, None] * features + column[None, :], mask=mask)
    tl.store(output + position[:, None] * features + column[None, :], values, mask=mask)


@triton.jit
def _sum_positions(total, grad_output, order, first, last, column, features, POSITIONS: tl.constexpr,
                   ACC: tl.constexpr):  # fmt: skip
    """total + the sum of grad_output's rows order[first:last]."""
    for start in tl.range(first, last, POSITIONS):
        index = start + tl.arange(0, POSITIONS)
        present = index < last
        position = tl.load(order + index, mask=present, other=0).to(tl.int64)
        mask = present[:, None] & (column < features)[None, :]
        values = tl.load(grad_output + position[:, None] * features + column[None, :], mask=mask, other=0.0)
        total += tl.sum(values.to(ACC), 0)
    return total


@triton.jit(do_not_specialize=["count"])
def _sum_chunks(grad_output, ids, order, partial, count, features, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
                POSITIONS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Sums of whole chunks that hold one id alone."""
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK
    if tl.load(ids + first) != tl.load(ids + first + CHUNK - 1):
        return
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = _sum_positions(
        tl.zeros((WIDTH,), ACC), grad_output, order, first, first + CHUNK, column, features, POSITIONS, ACC
    )
    tl.store(partial + chunk * features + column, total, mask=column < features)


@triton.jit
def _sum_rows(grad_output, order, starts, partial, grad, features, padding_idx, BY_FREQUENCY: tl.constexpr,
              CHUNK: tl.constexpr, WIDTH: tl.constexpr, POSITIONS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first, last = tl.load(starts + row), tl.load(starts + row + 1)
    occurrences = last - first
    if row == padding_idx:
        last = first
    total = tl.zeros((WIDTH,), ACC)
    if last > first:
        first_chunk = (first + CHUNK - 1) // CHUNK
        last_chunk = last // CHUNK
        if last_chunk > first_chunk:
            total = _sum_positions(
                total, grad_output, order, first, first_chunk * CHUNK, column, features, POSITIONS, ACC
            )
            for chunk in tl.range(first_chunk, last_chunk, POSITIONS):
                index = (chunk + tl.arange(0, POSITIONS)).to(tl.int64)
                mask = (index < last_chunk)[:, None] & (column < features)[None, :]
                total += tl.sum(tl.load(partial + index[:, None] * features + column[None, :], mask=mask, other=0.0), 0)
            first = last_chunk * CHUNK
        total = _sum_positions(total, grad_output, order, first, last, column, features, POSITIONS, ACC)
        if BY_FREQUENCY:
            total = total / occurrences.to(ACC)
    tl.store(grad + row.to(tl.int64) * features + column, total.to(grad.dtype.element_ty), mask=column < features)


def _tile(features: int) -> tuple[int, int]:
    """Columns of a program, and rows beside them."""
    width = min(triton.next_power_of_2(max(features, 1)), WIDTH)
    return width, max(min(TILE // width, 64), 1)


def _check(ids: Tensor, rows: int) -> None:
    check_indices("embedding", f"input must hold ids in [0, {rows}), the rows of weight", ids, rows)


def forward(weight: Tensor, input: Tensor) -> Tensor:
    """Rows (*, D) of the table (V, D)."""
    table, ids = weight.contiguous(), input.contiguous()
    rows, features = table.shape
    _check(ids, rows)
    output = table.new_empty(*ids.shape, features)
    width, together = _tile(features)
    launch(_gather, (triton.cdiv(ids.numel(), together), triton.cdiv(features, width)), table, table, ids, output,
           ids.numel(), rows, features, ROWS=together, WIDTH=width, **ASSERTING)  # fmt: skip
    return output


def backward(grad_output: Tensor, input: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    """Gradient (V, D) of the table."""
    source = grad_output.contiguous()
    features, count = source.size(-1), input.numel()
    _check(input, rows)
    grad = source.new_empty(rows, features)
    if count == 0:
        return grad.zero_()
    ids, order = torch.sort(input.flatten(), stable=True)
    starts = torch.searchsorted(ids, torch.arange(rows + 1, dtype=ids.dtype, device=ids.device))
    acc = ACCUMULATORS[source.dtype]
    width, positions = _tile(features)
    columns, chunks = triton.cdiv(features, width), count // CHUNK
    constants = dict(CHUNK=CHUNK, WIDTH=width, POSITIONS=min(positions, CHUNK), ACC=constant(acc))
    partial = torch.empty(chunks, features, dtype=acc, device=source.device)
    launch(_sum_chunks, (chunks, columns), source, source, ids, order, partial, count, features, **constants)
    launch(_sum_rows, (rows, columns), source, source, order, starts, partial, grad, features, padding_idx,
           BY_FREQUENCY=scale_grad_by_freq, **constants)  # fmt: skip
    return grad
