"""log_probs and linear_log_probs: statistics of rows of logits, and their gradient.

A row is read once forward, whatever is asked for, and read and written once backward; plain PyTorch writes
log-probabilities in float32 and reads them again for every statistic.

A row's result has the same bits wherever the row stands. Column c of a row belongs to element c % BLOCK of the running
sums, whatever boundary the row starts at, and BLOCK follows from the row's length and dtype. How threads share the
elements does depend on the alignment: the elements are therefore added at the end as integers, in any order the same
sum. Products that are part of a sum are fused by name. In backward nothing is summed over a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.operations.log_probs import check_values
from fastllm.triton.common import ACCUMULATORS, ASSERTING, CHECKED, constant, launch
from fastllm.triton.cross_entropy import (
    MOST_CLASSES,
    _aligned,
    _edge_columns,
    _group_columns,
    _row_start,
    _slope,
    _tanh,
    _write_zeros,
)

LEAST = tl.constexpr(-1e4)  # stands for log p of -inf: exp() of it is 0, and 0 times it is 0
NOWHERE = tl.constexpr(2**31 - 1)
FORWARD_WARPS = 8
BACKWARD_BYTES = 16384  # of one row in flight, at 8 warps
MATCHES = 8192  # pairs of top_ids compared at once


@triton.jit
def _z(x, inverse, softcap, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """softcap tanh(x / softcap) / temperature. Rounded: the zeros keep a later addition from being fused with it."""
    x = x.to(ACC)
    if SOFTCAP:
        x = tl.fma(tl.zeros_like(x) + softcap, _tanh(x / softcap, ACC), 0.0)
    if inverse is not None:
        x = tl.fma(x, tl.zeros_like(x) + inverse, 0.0)
    return x


@triton.jit
def _exp(d, FINE: tl.constexpr):
    """e^d for d from LEAST to 0. FINE: without the rounding of d log2 e, 2^-24 |d| of the result."""
    if FINE:
        high = d * 1.4426950216293335
        low = tl.fma(d, tl.zeros_like(d) + 1.4426950216293335, -high)
        low = tl.fma(d, tl.zeros_like(d) + 1.925963033500e-08, low)
        e = tl.exp2(high)
        e = tl.fma(e, low * 0.6931471805599453, e)
    else:
        e = tl.exp(d)
    return e


@triton.jit
def _log1p(x, ACC: tl.constexpr):
    s = x / (2 + x)  # log(1 + x) = 2 artanh(s), at most 1/9 where the series is used
    square, series = s * s, tl.zeros((), ACC)
    for i in tl.static_range(9):
        series = series * square + 1.0 / (19 - 2 * i)
    return tl.where(x < 0.25, 2 * s * (series * square + 1), tl.log(1 + x))


@triton.jit
def _expm1(x, ACC: tl.constexpr):
    """For x of at most 0."""
    series = tl.zeros_like(x) + 1.0
    for i in tl.static_range(16):
        series = 1 + series * x / (17 - i)
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1)


@triton.jit
def _lesser(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _below(a, b):
    """a - b, at least LEAST."""
    return tl.maximum(a - b, LEAST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _sum(x, SCALE: tl.constexpr):
    """The sum in whole parts of the largest magnitude over SCALE: the same bits in any order of the elements."""
    plain = tl.sum(x, 0)  # NaN and infinity
    finite = plain - plain == 0
    largest = tl.max(tl.abs(x), 0)
    largest = tl.where(finite & (largest > 0), largest, 1.0)
    parts = tl.where(finite, x / largest, 0.0) * SCALE
    parts += tl.where(parts < 0, -0.5, 0.5)  # the conversion cuts off
    return tl.where(finite, tl.sum(parts.to(tl.int64), 0).to(x.dtype) / SCALE * largest, plain)


@triton.jit
def _store_row(row, value, field):
    if field is not None:
        tl.store(field + row, value)


@triton.jit
def _label(target, row, classes):
    label = tl.load(target + row)
    inside = (label >= 0) & (label < classes)
    return label, inside, tl.where(inside, label, 0).to(tl.int32)


@triton.jit
def _top_ids(top_ids, row, k, classes, TOP: tl.constexpr):
    id = tl.load(top_ids + row.to(tl.int64) * TOP + k, mask=k < TOP, other=0)
    inside = (id >= 0) & (id < classes)
    tl.device_assert(inside, "log_probs: an id of top_ids is not a class")
    return tl.where(inside, id, 0).to(tl.int32)


@triton.jit
def _inverse(temperature, number, row, SCALED: tl.constexpr, ACC: tl.constexpr):
    """1 / temperature; None where it is 1 for all rows."""
    inverse = None
    if temperature is not None:
        inverse = 1 / tl.load(temperature + row).to(ACC)
    elif SCALED:
        inverse = 1 / tl.full((), number, ACC)
    return inverse


@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["logits"])
def _statistics(
    logits, stride, target, temperature, top_ids,  # (N, V) rows; (N,); (N,) acc or None; (N, TOP)
    log_prob, entropy, lse, argmax, mean_logit, log_sum_sq_probs,  # (N,), None where not asked for
    top_log_prob, saved_top, saved_tail, saved_entropy,  # (N, TOP) or None; (N,) each
    classes, ignore_index, number: tl.float64, softcap: tl.float64,
    BLOCK: tl.constexpr, VEC: tl.constexpr, BYTES: tl.constexpr, TOP: tl.constexpr, IDS: tl.constexpr,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, FINE: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    softcap = tl.full((), softcap, ACC)
    row = tl.program_id(0)
    k = tl.arange(0, IDS)
    label, inside, y = _label(target, row, classes)
    zero = tl.zeros((), ACC)
    if label == ignore_index:
        _store_row(row, zero, log_prob)
        _store_row(row, zero, entropy)
        _store_row(row, zero, lse)
        _store_row(row, -1, argmax)
        _store_row(row, zero, mean_logit)
        _store_row(row, zero, log_sum_sq_probs)
        if top_log_prob is not None:
            tl.store(top_log_prob + row.to(tl.int64) * TOP + k, tl.zeros((IDS,), ACC), mask=k < TOP)
        tl.store(saved_top + row, 0.0)
        tl.store(saved_tail + row, 0.0)
        tl.store(saved_entropy + row, 0.0)
        return
    tl.device_assert(inside, "log_probs: target is neither a class nor ignore_index")
    inverse = _inverse(temperature, number, row, SCALED, ACC)
    logits_row = tl.multiple_of(logits + row.to(tl.int64) * stride, BYTES)  # BYTES: of an item where rows lie anywhere
    classes = tl.multiple_of(classes, VEC)

    # Of the columns of each element, largest z apart: sums of e^d, d e^d and e^2d for d = z - largest; sum of z.
    lane = tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), -float("inf"), ACC)
    others, fall, squares = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    total, index, first_nan = tl.zeros((BLOCK,), ACC), lane, tl.full((BLOCK,), NOWHERE, tl.int32)
    for first in tl.range(0, classes, 4 * BLOCK):
        c0 = first + lane
        c1, c2, c3 = c0 + BLOCK, c0 + 2 * BLOCK, c0 + 3 * BLOCK
        m0, m1, m2, m3 = c0 < classes, c1 < classes, c2 < classes, c3 < classes
        x0 = tl.load(logits_row + c0, mask=m0, other=-float("inf"))
        x1 = tl.load(logits_row + c1, mask=m1, other=-float("inf"))
        x2 = tl.load(logits_row + c2, mask=m2, other=-float("inf"))
        x3 = tl.load(logits_row + c3, mask=m3, other=-float("inf"))
        x0, x1 = _z(x0, inverse, softcap, SOFTCAP, ACC), _z(x1, inverse, softcap, SOFTCAP, ACC)
        x2, x3 = _z(x2, inverse, softcap, SOFTCAP, ACC), _z(x3, inverse, softcap, SOFTCAP, ACC)
        if SOFTCAP:  # makes -inf finite
            x0, x1 = tl.where(m0, x0, -float("inf")), tl.where(m1, x1, -float("inf"))
            x2, x3 = tl.where(m2, x2, -float("inf")), tl.where(m3, x3, -float("inf"))
        if mean_logit is not None:
            total += (tl.where(m0, x0, 0.0) + tl.where(m1, x1, 0.0)) + (tl.where(m2, x2, 0.0) + tl.where(m3, x3, 0.0))
        # A tournament: `new` the largest of four and of what was, the others each the lesser of a pair.
        high, higher = tl.maximum(x0, x1), tl.maximum(x2, x3)
        largest = tl.maximum(high, higher)
        new = tl.maximum(tops, largest)
        if argmax is not None:
            column = tl.where(x0 == largest, c0, tl.where(x1 == largest, c1, tl.where(x2 == largest, c2, c3)))
            index = tl.where(largest > tops, column, index)
            nan = tl.where(x3 != x3, c3, NOWHERE)
            nan = tl.where(x0 != x0, c0, tl.where(x1 != x1, c1, tl.where(x2 != x2, c2, nan)))
            first_nan = tl.minimum(first_nan, nan)
        base = tl.where(new == -float("inf"), 0.0, new)
        d0, d1 = _below(_lesser(x0, x1), base), _below(_lesser(x2, x3), base)
        d2, d3 = _below(_lesser(high, higher), base), _below(_lesser(tops, largest), base)
        e0, e1, e2, e3 = _exp(d0, FINE), _exp(d1, FINE), _exp(d2, FINE), _exp(d3, FINE)
        shift = _below(tops, base)
        factor = _exp(shift, FINE)
        if entropy is not None:
            fall = tl.fma(tl.fma(shift, others, fall), factor, e0 * d0)
            fall = tl.fma(e3, d3, tl.fma(e2, d2, tl.fma(e1, d1, fall)))
        if log_sum_sq_probs is not None:
            squares = tl.fma(squares, factor * factor, e0 * e0)
            squares = tl.fma(e3, e3, tl.fma(e2, e2, tl.fma(e1, e1, squares)))
        others = tl.fma(others, factor, (e0 + e1) + (e2 + e3))
        tops = new

    top = tl.max(tops, 0)
    champion = lane == tl.min(tl.where(tops == top, lane, BLOCK), 0)  # whose largest is the row's, and is left out
    shift = _below(tops, tl.where(top == -float("inf"), 0.0, top))
    factor = _exp(shift, FINE)
    with_top = others + 1
    other = _sum(tl.where(champion, others, with_top * factor), SCALE)
    endless = tl.abs(top) == float("inf")
    tail = tl.where(top == -float("inf"), float("nan"), _log1p(other, ACC))
    z_y = _z(tl.load(logits_row + y), inverse, softcap, SOFTCAP, ACC)
    _store_row(row, (z_y - top) - tail, log_prob)
    _store_row(row, tl.where(endless & (other == other), top, top + tail), lse)
    uncertainty = zero
    if entropy is not None:
        fallen = _sum(tl.where(champion, fall, tl.fma(shift, with_top, fall) * factor), SCALE)
        uncertainty = tl.where(endless, float("nan"), tail - fallen / (1 + other))
        tl.store(entropy + row, uncertainty)
    if argmax is not None:
        nan = tl.min(first_nan, 0)
        column = tl.min(tl.where(tops == top, index, NOWHERE), 0)
        tl.store(argmax + row, tl.where(nan < NOWHERE, nan, column).to(tl.int64))
    if mean_logit is not None:
        tl.store(mean_logit + row, _sum(total, SCALE) / classes)
    if log_sum_sq_probs is not None:
        square = _sum(tl.where(champion, squares, (squares + 1) * (factor * factor)), SCALE)
        tl.store(log_sum_sq_probs + row, tl.fma(tail, -2.0, _log1p(square, ACC)))
    if top_log_prob is not None:
        z = _z(tl.load(logits_row + _top_ids(top_ids, row, k, classes, TOP)), inverse, softcap, SOFTCAP, ACC)
        tl.store(top_log_prob + row.to(tl.int64) * TOP + k, (z - top) - tail, mask=k < TOP)
    tl.store(saved_top + row, top)
    tl.store(saved_tail + row, tail)
    tl.store(saved_entropy + row, uncertainty)


@triton.jit
def _gradient(pointer, mask, inverse, softcap, top, scaled, g_scaled, offset,
              WITH_ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, FINE: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """p (everywhere - (log p + H) g_H) / temperature, where scaled and g_scaled hold exp(-tail) / temperature."""
    x = tl.load(pointer, mask=mask, other=-float("inf"))
    d = _below(_z(x, inverse, softcap, SOFTCAP, ACC), top)
    slope = scaled
    if WITH_ENTROPY:
        slope = tl.fma(d + offset, tl.zeros_like(d) - g_scaled, scaled)
    return _exp(d, FINE) * slope * _slope(pointer, mask, softcap, SOFTCAP, ACC)


@triton.jit
def _gradient_at(pointer, own, rest, inverse, softcap, top, tail, g_entropy, entropy, SOFTCAP: tl.constexpr,
                 ACC: tl.constexpr):  # fmt: skip
    """At columns with incoming gradients ``own``, which ``rest`` leaves out; 1 - p without cancellation."""
    log_p = (_z(tl.load(pointer), inverse, softcap, SOFTCAP, ACC) - top) - tail
    log_p = tl.maximum(log_p, LEAST, propagate_nan=tl.PropagateNan.ALL)
    slope = tl.fma(log_p + entropy, tl.zeros_like(log_p) - g_entropy, rest)
    gradient = tl.fma(tl.exp(log_p), slope, -_expm1(log_p, ACC) * own)
    if inverse is not None:
        gradient *= inverse
    return gradient * _slope(pointer, tl.full(gradient.shape, 1, tl.int1), softcap, SOFTCAP, ACC)


@triton.jit
def _incoming(field, row, ACC: tl.constexpr):
    value = tl.zeros((), ACC)
    if field is not None:
        value = tl.load(field + row)
    return value


@triton.jit
def _statistics_gradient(
    logits, stride, base, target, temperature, top_ids,
    grad_log_prob, grad_entropy, grad_lse, grad_top_log_prob,  # of acc, None where there is none
    saved_top, saved_tail, saved_entropy, grad, grad_stride,
    classes, ignore_index, number: tl.float64, softcap: tl.float64,
    GROUPS: tl.constexpr, VEC: tl.constexpr, BYTES: tl.constexpr, TOP: tl.constexpr, IDS: tl.constexpr,
    TOGETHER: tl.constexpr, SCALED: tl.constexpr, SOFTCAP: tl.constexpr, FINE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    softcap = tl.full((), softcap, ACC)
    row = tl.program_id(0)
    start, head, groups = _row_start(row, stride, base, classes, VEC)
    logits_row = logits + start
    grad_row = grad + row.to(tl.int64) * grad_stride
    label, inside, y = _label(target, row, classes)
    if label == ignore_index:
        _write_zeros(grad_row, classes, GROUPS * VEC)
        return
    tl.device_assert(inside, "log_probs: target is neither a class nor ignore_index")
    inverse = _inverse(temperature, number, row, SCALED, ACC)
    top, tail, entropy = tl.load(saved_top + row), tl.load(saved_tail + row), tl.load(saved_entropy + row)
    g_y, g_lse = _incoming(grad_log_prob, row, ACC), _incoming(grad_lse, row, ACC)
    g_entropy = _incoming(grad_entropy, row, ACC)
    if grad_entropy is None:
        entropy = tl.zeros((), ACC)

    # Columns with incoming gradients of their own, the target and top_ids: read before anything is written, because the
    # gradient may take the logits' place. A repeated id finds the same sums, and so the same bits, at all its places.
    everywhere = g_lse - g_y
    own_y, rest_y = g_y, g_lse
    if grad_top_log_prob is not None:
        k = tl.arange(0, IDS)
        id = _top_ids(top_ids, row, k, classes, TOP)
        g = tl.load(grad_top_log_prob + row.to(tl.int64) * TOP + k, mask=k < TOP, other=0.0)
        everywhere -= tl.sum(g, 0)
        own_y += tl.sum(tl.where(id == y, g, 0.0), 0)
        rest_y -= tl.sum(tl.where(id == y, 0.0, g), 0)
        own, rest = tl.zeros((IDS,), ACC), tl.zeros((IDS,), ACC)
        for first in tl.range(0, TOP, TOGETHER):
            j = first + tl.arange(0, TOGETHER)
            other = _top_ids(top_ids, row, j, classes, TOP)
            g_other = tl.load(grad_top_log_prob + row.to(tl.int64) * TOP + j, mask=j < TOP, other=0.0)
            same = id[:, None] == other[None, :]
            own += tl.sum(tl.where(same, g_other[None, :], 0.0), 1)
            rest += tl.sum(tl.where(same, 0.0, g_other[None, :]), 1)
        at_ids = _gradient_at(
            logits_row + id, own, g_lse - g_y - rest, inverse, softcap, top, tail, g_entropy, entropy, SOFTCAP, ACC
        )
        places = k < TOP
        if grad_log_prob is not None:
            places = places & (id != y)
    if grad_log_prob is not None:
        at_y = _gradient_at(
            logits_row + y, own_y, rest_y, inverse, softcap, top, tail, g_entropy, entropy, SOFTCAP, ACC
        )
    tl.debug_barrier()

    scale = tl.exp(-tail)
    if inverse is not None:
        scale *= inverse
    scaled, g_scaled, offset = everywhere * scale, g_entropy * scale, entropy - tail
    edge_columns, edge_mask = _edge_columns(head, groups, classes, VEC)
    d_edge = _gradient(logits_row + edge_columns, edge_mask, inverse, softcap, top, scaled, g_scaled, offset,
                       grad_entropy is not None, SOFTCAP, FINE, ACC)  # fmt: skip
    tl.store(grad_row + edge_columns, d_edge.to(grad.dtype.element_ty), mask=edge_mask)
    for first in tl.range(0, groups, GROUPS):
        _columns, mask = _group_columns(first, head, groups, GROUPS, VEC)
        d = _gradient(_aligned(logits_row, head, first, GROUPS, VEC, BYTES), mask, inverse, softcap, top, scaled,
                      g_scaled, offset, grad_entropy is not None, SOFTCAP, FINE, ACC)  # fmt: skip
        tl.store(_aligned(grad_row, head, first, GROUPS, VEC, BYTES), d.to(grad.dtype.element_ty), mask=mask)

    tl.debug_barrier()
    if grad_top_log_prob is not None:
        tl.store(grad_row + id, at_ids.to(grad.dtype.element_ty), mask=places)
    if grad_log_prob is not None:
        tl.store(grad_row + y, at_y.to(grad.dtype.element_ty))


def _prepared(logits: Tensor, target: Tensor, temperature: Tensor | None, top_ids: Tensor | None, ignore_index: int,
              number: float, softcap: float | None) -> tuple[tuple, tuple, dict]:  # fmt: skip
    """Checked arguments that both kernels take: tensors of the rows, options, constants."""
    classes = logits.size(1)
    if classes > MOST_CLASSES:
        raise RuntimeError(f"log_probs: the backend triton serves at most 2^30 classes, got {classes}")
    if CHECKED:
        on_host = (None if t is None else t.cpu() for t in (target, temperature, top_ids))
        check_values("log_probs", *on_host, ignore_index, classes)
    top = 0 if top_ids is None else top_ids.size(1)
    tensors = (target, temperature, top_ids if top else None)
    constants = dict(
        TOP=top, IDS=triton.next_power_of_2(max(top, 1)), SCALED=number != 1.0, SOFTCAP=softcap is not None,
        FINE=logits.dtype == torch.float32, ACC=constant(ACCUMULATORS[logits.dtype]), **ASSERTING,
    )  # fmt: skip
    return tensors, (classes, ignore_index, number, softcap or 1.0), constants


def rows_forward(logits, target, temperature, top_ids, ignore_index, number, softcap, asked):
    """The fields asked for and what backward reads; see the schema."""
    tensors, options, constants = _prepared(logits, target, temperature, top_ids, ignore_index, number, softcap)
    (rows, classes), item = logits.shape, logits.element_size()
    acc, top = ACCUMULATORS[logits.dtype], constants["TOP"]
    empty = logits.new_empty if classes else logits.new_zeros
    shapes = [(rows, top) if i == 6 else (rows,) for i in range(7)]
    results = [empty(shape if ask else 0, dtype=torch.int64 if i == 3 else acc)
               for i, (shape, ask) in enumerate(zip(shapes, asked, strict=True))]  # fmt: skip
    saved = empty((3, rows), dtype=acc)
    if not classes:  # every target is ignored
        results[3].fill_(-1)
        return *results, saved
    fields = [result if ask else None for result, ask in zip(results, asked, strict=True)]
    if not top:
        fields[6] = None
    vec = 16 // item
    block = min(triton.next_power_of_2(max(classes, 32)), 32 * FORWARD_WARPS * vec)
    aligned = logits.data_ptr() % 16 == 0 and classes % vec == 0 and (rows == 1 or logits.stride(0) % vec == 0)
    launch(
        _statistics, (rows,), logits, logits, logits.stride(0), *tensors, *fields, *saved.unbind(0), *options,
        BLOCK=block, VEC=vec if aligned else 1, BYTES=16 if aligned else item,
        SCALE=2.0 ** (53 if acc == torch.float64 else 40), num_warps=max(block // (32 * vec), 1), num_stages=1,
        **constants,
    )  # fmt: skip
    return *results, saved


def rows_backward_(grad_log_prob, grad_entropy, grad_lse, grad_top_log_prob, saved, logits, target, temperature, top_ids,
                   ignore_index, number, softcap, grad):  # fmt: skip
    """Write the gradient of the logits into ``grad``, which may be the logits; see the schema."""
    tensors, options, constants = _prepared(logits, target, temperature, top_ids, ignore_index, number, softcap)
    (rows, classes), item = logits.shape, logits.element_size()
    if not classes:
        return
    vec = 16 // item
    # One walk serves both tensors only where their rows start at the same distance from a boundary.
    if (logits.data_ptr() - grad.data_ptr()) % 16 or (logits.stride(0) - grad.stride(0)) % vec:
        vec = 1
    tile = triton.next_power_of_2(max(min(classes, BACKWARD_BYTES // item), 32))
    ids = constants["IDS"]
    launch(
        _statistics_gradient, (rows,), logits, logits, logits.stride(0), logits.data_ptr() % 16 // item, *tensors,
        grad_log_prob, grad_entropy, grad_lse, grad_top_log_prob if constants["TOP"] else None,
        *saved.unbind(0), grad, grad.stride(0), *options,
        GROUPS=max(tile // vec, 1), VEC=vec, BYTES=vec * item, TOGETHER=min(max(MATCHES // ids, 1), ids),
        num_warps=8 if tile * item == BACKWARD_BYTES else 4, num_stages=1, **constants,
    )  # fmt: skip
