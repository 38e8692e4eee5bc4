"""cross_entropy: loss, softmax statistics and gradient of rows of logits.

Fused: softcap, softmax, smoothing, weights, z-loss, the loss and its gradient. PyTorch makes a float32 copy of the
logits' size and reads and writes it several times; here a row is read once for the loss alone. In training the gradient
is written in the same launch: a row that fits a tile is read once (2 N V items moved in all), a longer one twice, the
second time from the L2 cache where the rows in flight fit it. Backward then moves nothing: a kernel that reads the
incoming gradient returns at once where it is 1.

A row of V items rarely starts at a 16-byte boundary (50257 is odd). It is walked as a few items up to the boundary,
groups of 16 bytes, and a few items after them: groups are loaded whole, without a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm import invariance
from fastllm.operations import dense
from fastllm.operations.cross_entropy import has_contiguous_rows
from fastllm.triton.common import ACCUMULATORS, ASSERTING, check_indices, constant, launch

NONE, MEAN = 0, 1
TILE_BYTES = 32768  # of one row in flight, at 16 warps; a row up to this size is read once
MOST_CLASSES = 2**30  # columns are counted in 32 bits, up to a tile beyond the last


@triton.jit
def _tanh(u, ACC: tl.constexpr):
    # Near 0 the quotient cancels: Taylor's polynomial there, to the precision of the accumulator.
    near: tl.constexpr = 0.02 if ACC == tl.float64 else 0.25
    e = tl.exp(-2 * tl.abs(u))
    quotient = (1 - e) / (1 + e)
    v = u * u
    series = u * (1 + v * (-1.0 / 3 + v * (2.0 / 15 + v * (-17.0 / 315 + v * (62.0 / 2835)))))
    # abs(u) < near is false for NaN, which the quotient keeps.
    return tl.where(tl.abs(u) < near, series, tl.where(u < 0, -quotient, quotient))


@triton.jit
def _logits(pointer, mask, softcap, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    x = tl.load(pointer, mask=mask, other=-float("inf")).to(ACC)
    if SOFTCAP:
        x = tl.where(mask, softcap * _tanh(x / softcap, ACC), x)
    return x


@triton.jit
def _online(x, top, total):
    """A tile (G, VEC) into running maxima and sums of exp(x - maximum), one of each for a group: (G,)."""
    new = tl.maximum(top, tl.max(x, 1))
    base = tl.where(new == -float("inf"), 0.0, new)  # a group of -inf adds exp(-inf) = 0
    total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base[:, None]), 1)
    return new, total


@triton.jit
def _merge(top, total, other_top, other_total):
    """Two pairs of maximum and sum as one."""
    new = tl.maximum(top, other_top)
    base = tl.where(new == -float("inf"), 0.0, new)
    return new, total * tl.exp(top - base) + other_total * tl.exp(other_top - base)


@triton.jit
def _shares(columns, mask, q_row, weight, even, y_share, y,
            PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The target's weighted share of each class: loss = sum_c share_c (lse - z_c)."""
    if PROBABILITIES:
        share = tl.load(q_row + columns, mask=mask, other=0.0).to(ACC) * y_share + even
    elif SMOOTHED:
        share = tl.where(columns == y, y_share, 0.0) + even
    else:
        share = tl.where(columns == y, y_share, 0.0)
    if WEIGHTED:
        weighted = share * tl.load(weight + columns, mask=mask, other=0.0)
        # Without smoothing another class's weight does not count, not even a NaN.
        share = weighted if PROBABILITIES or SMOOTHED else tl.where(columns == y, weighted, 0.0)
    return tl.where(mask, share, 0.0)


@triton.jit
def _slope(pointer, mask, softcap, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """The derivative of softcap tanh(x / softcap) by x."""
    if SOFTCAP:
        u = tl.load(pointer, mask=mask, other=0.0).to(ACC) / softcap
        if ACC == tl.float64:  # as PyTorch takes it: the yardstick of the other dtypes
            tanh = _tanh(u, ACC)
            slope = 1 - tanh * tanh
        else:  # keeps its digits near the cap
            e = tl.exp(-2 * tl.abs(u))
            slope = 4 * e / ((1 + e) * (1 + e))
    else:
        slope = tl.full((), 1.0, ACC)
    return slope


@triton.jit
def _gradient(x, top, log_sum, pull, share, scale, slope):
    """Gradient of scale * loss: pull is sum_c share_c + 2 s lse; slope, the softcap's at x."""
    return (tl.exp(x - top - log_sum) * pull - share) * slope * scale


@triton.jit
def _z_loss(lse, scale):
    """scale lse^2, infinite where the definition's square is."""
    return tl.where(scale == 0, 0.0, scale * (lse * lse))


@triton.jit
def _z_slope(lse, scale):
    """Its derivative, infinite where the definition's is."""
    return tl.where(scale == 0, 0.0, scale * (2 * lse))


@triton.jit
def _row_start(row, stride, base, classes, VEC: tl.constexpr):
    """Where a row starts, its items up to the first 16-byte boundary, and its whole groups of VEC."""
    start = row.to(tl.int64) * stride
    head = ((VEC - (start + base) % VEC) % VEC).to(tl.int32)
    head = tl.minimum(head, classes)
    return start, head, (classes - head) // VEC


@triton.jit
def _edge_columns(head, groups, classes, VEC: tl.constexpr):
    """The items outside whole groups, head and tail together: (2 VEC,) columns and their mask."""
    lane = tl.arange(0, 2 * VEC)
    columns = tl.where(lane < VEC, lane, head + groups * VEC + lane - VEC)
    return columns, tl.where(lane < VEC, lane < head, columns < classes)


@triton.jit
def _group_columns(first, head, groups, GROUPS: tl.constexpr, VEC: tl.constexpr):
    """A tile (GROUPS, VEC) of columns, and the mask of its whole groups."""
    group = first + tl.arange(0, GROUPS)
    columns = head + group[:, None] * VEC + tl.arange(0, VEC)[None, :]
    return columns, (group < groups)[:, None] & (tl.arange(0, VEC)[None, :] >= 0)


@triton.jit
def _aligned(row_pointer, head, first, GROUPS: tl.constexpr, VEC: tl.constexpr, BYTES: tl.constexpr):
    """Pointers of a tile of groups, known to be aligned to 16 bytes."""
    boundary = tl.multiple_of(row_pointer + head, BYTES)
    return boundary + (first + tl.arange(0, GROUPS))[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def _write_gradient(logits_row, grad_row, q_row, weight, head, groups, classes, top, log_sum, pull, even, y_share, y,
                    scale, softcap, GROUPS: tl.constexpr, VEC: tl.constexpr, BYTES: tl.constexpr,
                    PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr,
                    SOFTCAP: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    edge_columns, edge_mask = _edge_columns(head, groups, classes, VEC)
    x_edge = _logits(logits_row + edge_columns, edge_mask, softcap, SOFTCAP, ACC)
    edge_share = _shares(
        edge_columns, edge_mask, q_row, weight, even, y_share, y, PROBABILITIES, WEIGHTED, SMOOTHED, ACC
    )
    edge_slope = _slope(logits_row + edge_columns, edge_mask, softcap, SOFTCAP, ACC)
    d_edge = _gradient(x_edge, top, log_sum, pull, edge_share, scale, edge_slope)
    tl.store(grad_row + edge_columns, d_edge.to(grad_row.dtype.element_ty), mask=edge_mask)
    for first in tl.range(0, groups, GROUPS):
        columns, mask = _group_columns(first, head, groups, GROUPS, VEC)
        x = _logits(_aligned(logits_row, head, first, GROUPS, VEC, BYTES), mask, softcap, SOFTCAP, ACC)
        share = _shares(columns, mask, q_row, weight, even, y_share, y, PROBABILITIES, WEIGHTED, SMOOTHED, ACC)
        slope = _slope(_aligned(logits_row, head, first, GROUPS, VEC, BYTES), mask, softcap, SOFTCAP, ACC)
        d = _gradient(x, top, log_sum, pull, share, scale, slope)
        tl.store(_aligned(grad_row, head, first, GROUPS, VEC, BYTES), d.to(grad_row.dtype.element_ty), mask=mask)


@triton.jit
def _write_zeros(grad_row, classes, BLOCK: tl.constexpr):
    for first in tl.range(0, classes, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        tl.store(grad_row + columns, tl.zeros((BLOCK,), grad_row.dtype.element_ty), mask=columns < classes)


@triton.jit
def _over_divisor(x, divisor):
    """x over the divisor of the mean: NaN for 0, where the definition divides 0 by 0 in one of its terms."""
    d = tl.load(divisor)
    return tl.where(d == 0, float("nan"), x / d)


@triton.jit
def _scale(incoming, incoming_stride, divisor, row, ACC: tl.constexpr):
    """Factor of a row's gradient: its incoming gradient over the divisor of the mean; a null pointer counts as 1."""
    scale = tl.full((), 1.0, ACC)
    if incoming is not None:
        scale = tl.load(incoming + row.to(tl.int64) * incoming_stride).to(ACC)
    if divisor is not None:
        scale = _over_divisor(scale, divisor)
    return scale


@triton.jit
def _forward(
    logits, logits_stride, base,  # (N, C) rows; items from the pointer back to a 16-byte boundary
    target, weight, weight_sum,  # (N,) indices or (N, C) probabilities; (C,) acc; () acc
    loss, top_row, log_sum_row,  # (N,) acc each
    grad, grad_stride, incoming, incoming_stride, divisor,
    classes, ignore_index, smoothing: tl.float64, lse_square_scale: tl.float64, softcap: tl.float64,
    GROUPS: tl.constexpr, VEC: tl.constexpr, BYTES: tl.constexpr, ONE_TILE: tl.constexpr,
    PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr, SOFTCAP: tl.constexpr,
    GRAD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    smoothing = tl.full((), smoothing, ACC)
    lse_square_scale = tl.full((), lse_square_scale, ACC)
    softcap = tl.full((), softcap, ACC)
    row = tl.program_id(0)
    start, head, groups = _row_start(row, logits_stride, base, classes, VEC)
    logits_row = logits + start
    grad_row = grad + row.to(tl.int64) * grad_stride
    y = 0
    q_row = target
    if PROBABILITIES:
        q_row = target + row.to(tl.int64) * classes
    else:
        label = tl.load(target + row)
        if label == ignore_index:
            tl.store(loss + row, 0.0)
            tl.store(top_row + row, 0.0)
            tl.store(log_sum_row + row, 0.0)
            if GRAD:
                _write_zeros(grad_row, classes, GROUPS * VEC)
            return
        inside = (label >= 0) & (label < classes)
        tl.device_assert(inside, "cross_entropy: target is neither a class nor ignore_index")
        y = tl.where(inside, label, 0).to(tl.int32)

    # Maximum and sum of exponentials.
    columns, mask = _edge_columns(head, groups, classes, VEC)
    x_edge = _logits(logits_row + columns, mask, softcap, SOFTCAP, ACC)
    edge_top = tl.max(x_edge, 0)
    edge_total = tl.sum(tl.exp(x_edge - tl.where(edge_top == -float("inf"), 0.0, edge_top)), 0)
    tops = tl.full((GROUPS,), -float("inf"), ACC)
    totals = tl.zeros((GROUPS,), ACC)
    if ONE_TILE:
        tile_columns, tile_mask = _group_columns(0, head, groups, GROUPS, VEC)
        x = _logits(_aligned(logits_row, head, 0, GROUPS, VEC, BYTES), tile_mask, softcap, SOFTCAP, ACC)
        tops, totals = _online(x, tops, totals)
    else:
        for first in tl.range(0, groups, GROUPS):
            tile_columns, tile_mask = _group_columns(first, head, groups, GROUPS, VEC)
            x = _logits(_aligned(logits_row, head, first, GROUPS, VEC, BYTES), tile_mask, softcap, SOFTCAP, ACC)
            tops, totals = _online(x, tops, totals)
    top = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp(tops - tl.where(top == -float("inf"), 0.0, top)), 0)
    top, total = _merge(top, total, edge_top, edge_total)
    # Whatever is NaN in a row is in its sum of exponentials. A row of +inf or -inf alone: NaN, as in PyTorch.
    log_sum = tl.log(total)
    lse = top + log_sum

    # The target's side.
    even = smoothing / classes
    y_share = 1 - smoothing
    if PROBABILITIES or SMOOTHED:
        edge_share = _shares(columns, mask, q_row, weight, even, y_share, y, PROBABILITIES, WEIGHTED, SMOOTHED, ACC)
        value = tl.sum(tl.where(mask, edge_share * (top - x_edge + log_sum), 0.0), 0)
        shares = tl.sum(edge_share, 0)
        for first in tl.range(0, groups, GROUPS):
            c, m = _group_columns(first, head, groups, GROUPS, VEC)
            z = _logits(_aligned(logits_row, head, first, GROUPS, VEC, BYTES), m, softcap, SOFTCAP, ACC)
            share = _shares(c, m, q_row, weight, even, y_share, y, PROBABILITIES, WEIGHTED, SMOOTHED, ACC)
            value += tl.sum(tl.sum(tl.where(m, share * (top - z + log_sum), 0.0), 1), 0)
            shares += tl.sum(tl.sum(share, 1), 0)
    else:
        z = tl.load(logits_row + y).to(ACC)
        if SOFTCAP:
            z = softcap * _tanh(z / softcap, ACC)
        shares = tl.full((), 1.0, ACC)
        if WEIGHTED:
            shares = tl.load(weight + y)
        value = shares * (top - z + log_sum)
    tl.store(loss + row, value + _z_loss(lse, lse_square_scale))
    tl.store(top_row + row, top)
    tl.store(log_sum_row + row, log_sum)

    if GRAD:
        # The gradient may overwrite the logits: not before every warp has read its own.
        tl.debug_barrier()
        scale = _scale(incoming, incoming_stride, divisor, row, ACC)
        pull = shares + _z_slope(lse, lse_square_scale)
        if ONE_TILE:
            share = _shares(columns, mask, q_row, weight, even, y_share, y, PROBABILITIES, WEIGHTED, SMOOTHED, ACC)
            slope = _slope(logits_row + columns, mask, softcap, SOFTCAP, ACC)
            d = _gradient(x_edge, top, log_sum, pull, share, scale, slope)
            tl.store(grad_row + columns, d.to(grad.dtype.element_ty), mask=mask)
            share = _shares(
                tile_columns, tile_mask, q_row, weight, even, y_share, y, PROBABILITIES, WEIGHTED, SMOOTHED, ACC
            )
            slope = _slope(_aligned(logits_row, head, 0, GROUPS, VEC, BYTES), tile_mask, softcap, SOFTCAP, ACC)
            d = _gradient(x, top, log_sum, pull, share, scale, slope)
            tl.store(_aligned(grad_row, head, 0, GROUPS, VEC, BYTES), d.to(grad.dtype.element_ty), mask=tile_mask)
        else:
            _write_gradient(
                logits_row, grad_row, q_row, weight, head, groups, classes, top, log_sum, pull, even, y_share, y, scale,
                softcap, GROUPS, VEC, BYTES, PROBABILITIES, WEIGHTED, SMOOTHED, SOFTCAP, ACC,
            )  # fmt: skip


@triton.jit
def _backward(
    logits, logits_stride, base,
    target, weight, weight_sum, top_row, log_sum_row,
    grad, grad_stride, incoming, incoming_stride, divisor,
    classes, ignore_index, smoothing: tl.float64, lse_square_scale: tl.float64, softcap: tl.float64,
    GROUPS: tl.constexpr, VEC: tl.constexpr, BYTES: tl.constexpr,
    PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr, SOFTCAP: tl.constexpr,
    CORRECT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    if CORRECT:
        if tl.load(incoming).to(ACC) == 1.0:
            return
    smoothing = tl.full((), smoothing, ACC)
    lse_square_scale = tl.full((), lse_square_scale, ACC)
    softcap = tl.full((), softcap, ACC)
    row = tl.program_id(0)
    start, head, groups = _row_start(row, logits_stride, base, classes, VEC)
    logits_row = logits + start
    grad_row = grad + row.to(tl.int64) * grad_stride
    even = smoothing / classes
    y_share = 1 - smoothing
    y = 0
    q_row = target
    if PROBABILITIES:
        q_row = target + row.to(tl.int64) * classes
        shares = tl.zeros((), ACC)
        for first in tl.range(0, classes, GROUPS * VEC):
            c = first + tl.arange(0, GROUPS * VEC)
            share = _shares(c, c < classes, q_row, weight, even, y_share, y, PROBABILITIES, WEIGHTED, SMOOTHED, ACC)
            shares += tl.sum(share, 0)
    else:
        label = tl.load(target + row)
        if label == ignore_index:
            _write_zeros(grad_row, classes, GROUPS * VEC)
            return
        inside = (label >= 0) & (label < classes)
        tl.device_assert(inside, "cross_entropy: target is neither a class nor ignore_index")
        y = tl.where(inside, label, 0).to(tl.int32)
        shares = y_share
        if WEIGHTED:
            shares *= tl.load(weight + y)
        if SMOOTHED:
            if WEIGHTED:
                shares += even * tl.load(weight_sum)
            else:
                shares += smoothing
    top = tl.load(top_row + row)
    log_sum = tl.load(log_sum_row + row)
    pull = shares + _z_slope(top + log_sum, lse_square_scale)
    scale = _scale(incoming, incoming_stride, divisor, row, ACC)
    _write_gradient(
        logits_row, grad_row, q_row, weight, head, groups, classes, top, log_sum, pull, even, y_share, y, scale,
        softcap, GROUPS, VEC, BYTES, PROBABILITIES, WEIGHTED, SMOOTHED, SOFTCAP, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _divisor(target, weight, divisor, rows, classes, ignore_index, WEIGHTED: tl.constexpr, ACC: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """The number of counted rows, or the sum of their weights; by one program, in a fixed order."""
    total = tl.zeros((BLOCK,), ACC)
    for first in tl.range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        label = tl.load(target + row, mask=row < rows, other=ignore_index)
        counted = (row < rows) & (label != ignore_index)
        if WEIGHTED:
            inside = counted & (label >= 0) & (label < classes)  # the row's own kernel asserts it
            total += tl.load(weight + tl.where(inside, label, 0), mask=inside, other=0.0)
        else:
            total += tl.where(counted, 1.0, 0.0)
    tl.store(divisor, tl.sum(total, 0))


@triton.jit(do_not_specialize=["rows"])
def _reduce(loss, divisor, output, rows, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the rows' losses over the divisor (null: 1), in a fixed order."""
    total = tl.zeros((BLOCK,), ACC)
    for first in tl.range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        total += tl.load(loss + row, mask=row < rows, other=0.0)
    mean = tl.sum(total, 0)
    if divisor is not None:
        mean = _over_divisor(mean, divisor)
    tl.store(output, mean.to(output.dtype.element_ty))


class RowLoss:
    """A loss over rows: its targets checked, its class weights and the divisor of its mean on the device."""

    def __init__(self, op: str, dtype: torch.dtype, classes: int, target: Tensor, weight: Tensor | None,
                 reduction: int, ignore_index: int, smoothing: float, lse_square_scale: float, softcap: float | None):  # fmt: skip
        if classes > MOST_CLASSES:
            raise RuntimeError(f"{op}: the backend triton serves at most 2^30 classes, got {classes}")
        acc = ACCUMULATORS[dtype]
        self.acc, self.classes, self.reduction = acc, classes, reduction
        self.target = target.contiguous()
        self.probabilities = target.is_floating_point()
        self.weight = None if weight is None else weight.to(acc).contiguous()
        self.weight_sum = self.weight.sum() if weight is not None and smoothing else None
        self.ignore_index, self.smoothing, self.lse_square_scale = ignore_index, smoothing, lse_square_scale
        self.softcap = softcap
        self.divisor = None
        if not self.probabilities:
            expected = f"target must be in [0, {classes}) or ignore_index {ignore_index}"
            check_indices(op, expected, self.target, classes, ignore_index)
        if reduction == MEAN:
            self.divisor = self._divisor(target.size(0))

    def _divisor(self, rows: int) -> Tensor:
        if self.probabilities:
            return torch.full((), rows, dtype=self.acc, device=self.target.device)
        divisor = torch.empty((), dtype=self.acc, device=self.target.device)
        launch(_divisor, (1,), divisor, self.target, self.weight, divisor, rows, self.classes, self.ignore_index,
               WEIGHTED=self.weight is not None, ACC=constant(self.acc), BLOCK=4096, num_warps=16)  # fmt: skip
        return divisor

    def _shared(self, logits: Tensor, grad: Tensor, first: int) -> tuple[tuple, tuple, dict]:
        """Arguments and constants that both kernels take; rows are ``[first, first + len(logits))`` of the whole."""
        item = logits.element_size()
        vec = 16 // item
        # One walk serves both tensors only where their rows start at the same distance from a boundary.
        if (logits.data_ptr() - grad.data_ptr()) % 16 or (logits.stride(0) - grad.stride(0)) % vec:
            vec = 1
        # Softcap, shares and weights keep more in registers for each item: a quarter of a tile, no loads ahead.
        plain = not (self.probabilities or self.smoothing or self.softcap or self.weight is not None)
        most = TILE_BYTES if plain else TILE_BYTES // 4
        tile = triton.next_power_of_2(max(min(self.classes, most // item), 16))
        target = self.target[first : first + logits.size(0)]
        rows = (logits, logits.stride(0), logits.data_ptr() % 16 // item, target, self.weight, self.weight_sum)
        options = (self.classes, self.ignore_index, self.smoothing, self.lse_square_scale, self.softcap or 1.0)
        constants = dict(
            GROUPS=max(tile // vec, 1), VEC=vec, BYTES=vec * item, PROBABILITIES=self.probabilities,
            WEIGHTED=self.weight is not None, SMOOTHED=self.smoothing > 0, SOFTCAP=self.softcap is not None,
            ACC=constant(self.acc), num_warps=4 if tile * item < most else 16, num_stages=3 if plain else 1, **ASSERTING,
        )  # fmt: skip
        return rows, options, constants

    def forward(self, logits: Tensor, loss: Tensor, softmax: Tensor, grad: Tensor | None, incoming: Tensor | None = None,
                first: int = 0) -> None:  # fmt: skip
        """Write loss (N,), softmax (2, N) and, where given, grad (N, C), which may be the logits."""
        target = logits if grad is None else grad
        rows, options, constants = self._shared(logits, target, first)
        launch(
            _forward, (logits.size(0),), logits, *rows, loss, softmax[0], softmax[1], target, target.stride(0),
            incoming, *_stride(incoming), self.divisor, *options,
            ONE_TILE=self.classes <= constants["GROUPS"] * constants["VEC"], GRAD=grad is not None, **constants,
        )  # fmt: skip

    def backward(self, logits: Tensor, softmax: Tensor, grad: Tensor, incoming: Tensor, correct: bool = False) -> None:
        """Write grad (N, C), which may be the logits; ``correct``: unless the incoming gradient is 1."""
        rows, options, constants = self._shared(logits, grad, 0)
        launch(
            _backward, (logits.size(0),), logits, *rows, softmax[0], softmax[1], grad, grad.stride(0),
            incoming, *_stride(incoming), self.divisor, *options, CORRECT=correct, **constants,
        )  # fmt: skip

    def reduced(self, loss: Tensor, dtype: torch.dtype) -> Tensor:
        """The reduced loss, or for ``none`` the rows' losses."""
        if self.reduction == NONE:
            return loss.to(dtype)
        output = torch.empty((), dtype=dtype, device=loss.device)
        launch(_reduce, (1,), loss, loss, self.divisor, output, loss.size(0), ACC=constant(self.acc), BLOCK=4096,
               num_warps=16)  # fmt: skip
        return output


def _stride(incoming: Tensor | None) -> tuple[int]:
    return (0 if incoming is None or incoming.dim() == 0 else incoming.stride(0),)


def _walkable(logits: Tensor) -> Tensor:
    """Logits whose rows are contiguous and apart; batch-invariant: each at a 16-byte boundary, from which it is summed."""
    logits = logits if has_contiguous_rows(logits) else logits.contiguous()
    if not invariance.active() or (logits.data_ptr() | logits.stride(0) * logits.element_size()) % 16 == 0:
        return logits
    return dense.in_pieces(logits, *logits.shape).copy_(logits)


def forward(input, target, weight, reduction, ignore_index, label_smoothing, lse_square_scale, softcap, need_grad):
    """Loss (reduced, or (N,)), softmax (2, N) and gradient (N, C) for an incoming gradient of 1; see the schema."""
    rows = RowLoss("cross_entropy", input.dtype, input.size(1), target, weight, reduction, ignore_index,
                   label_smoothing, lse_square_scale, softcap)  # fmt: skip
    logits = _walkable(input)
    loss = torch.empty(input.size(0), dtype=rows.acc, device=input.device)
    softmax = torch.empty(2, input.size(0), dtype=rows.acc, device=input.device)
    with_grad = need_grad and reduction != NONE
    grad = torch.empty(input.shape, dtype=input.dtype, device=input.device) if with_grad else None
    rows.forward(logits, loss, softmax, grad)
    return rows.reduced(loss, input.dtype), softmax, input.new_empty(0, 0) if grad is None else grad


def _backward_into(grad, grad_output, input, target, weight, softmax, options, correct=False):
    rows = RowLoss("cross_entropy", input.dtype, input.size(1), target, weight, *options)
    rows.backward(_walkable(input), softmax, grad, grad_output, correct)


def backward(grad_output, input, target, weight, softmax, *options):
    """Gradient (N, C) from the logits and their softmax statistics."""
    grad = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    _backward_into(grad, grad_output, input, target, weight, softmax, options)
    return grad


def backward_(grad_output, input, target, weight, softmax, *options):
    """As :func:`backward`, over the logits."""
    if not has_contiguous_rows(input):
        raise RuntimeError(
            f"cross_entropy_backward_: input's rows must be contiguous and apart, got strides {input.stride()}"
        )
    _backward_into(input, grad_output, input, target, weight, softmax, options)


def correct_(grad_output, input, target, weight, softmax, *options_and_grad):
    """The gradient that forward formed for an incoming gradient of 1, formed anew on the device for another."""
    *options, grad = options_and_grad
    _backward_into(grad, grad_output, input, target, weight, softmax, options, correct=True)
