"""``cross_entropy`` and ``linear_cross_entropy`` over a vocabulary that is cut over processes."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from fastllm import functional as F
from fastllm.distributed.rows import Rows, lse_of
from fastllm.distributed.shard import Shard, checked_group, refuse_second_derivative, sum_
from fastllm.operations.checks import (
    check_class_weight,
    check_device,
    check_given,
    check_linear,
    check_loss_options,
    checked_indices,
    probability_dtype,
)
from fastllm.operations.cross_entropy import has_contiguous_rows
from fastllm.operations.declaration import DTYPES, accumulator, autocast_to
from fastllm.operations.node import needs_grad


class _Losses(torch.autograd.Function):
    """The loss of each row ``(N,)`` in the dtype of sums, and the class weight of each target (None without weights).

    Saves its inputs and a few numbers a row; backward makes the logits again.
    """

    @staticmethod
    def forward(ctx, input, linear_weight, bias, target, class_weight, shard: Shard, options: tuple, inplace: bool):
        ignore_index, smoothing, z_loss, softcap = options
        probabilities = target.is_floating_point()
        rows = Rows(shard, input, linear_weight, bias, None if probabilities else target, ignore_index, softcap)
        spread = _Spread(rows, target if probabilities else None, class_weight, smoothing)
        at_target = None
        if class_weight is not None and not probabilities:
            at_target = class_weight[rows.place] if shard.size else target.new_zeros(rows.count, dtype=rows.dtype)
        found = rows.statistics(spread.of if spread.factor else None, at_target)
        losses = torch.zeros_like(found.tail)
        if not probabilities:
            losses = losses - (1 - smoothing) * found.log_p(found.target)
            if found.of_target is not None:
                losses *= found.of_target
        if spread.factor:
            losses = losses - spread.factor / spread.classes * found.spread
        if z_loss != 0.0:
            losses = losses + z_loss * (found.lse * found.lse)
        rows.masked_(losses)
        ctx.save_for_backward(input, linear_weight, bias, target, class_weight, found.largest, found.tail,
                              found.of_target, found.spread_sum)  # fmt: skip
        ctx.shard, ctx.options, ctx.inplace, ctx.overwritten = shard, options, inplace, False
        if found.of_target is not None:
            weights = rows.masked_(found.of_target.clone())
            ctx.mark_non_differentiable(weights)
            return losses, weights
        return losses, None

    @staticmethod
    def backward(ctx, grad_losses: Tensor, _):
        op, (ignore_index, smoothing, z_loss, softcap) = ctx.shard.op, ctx.options
        refuse_second_derivative(op)
        if ctx.overwritten:
            raise RuntimeError(
                f"{op}: a second backward through logits that inplace_backward=True has overwritten with their "
                "gradient; use inplace_backward=False to keep the graph"
            )
        input, linear_weight, bias, target, class_weight, largest, tail, of_target, spread_sum = ctx.saved_tensors
        need_target = ctx.needs_input_grad[3]
        probabilities = target.is_floating_point()
        rows = Rows(ctx.shard, input, linear_weight, bias, None if probabilities else target, ignore_index, softcap)
        spread = _Spread(rows, target if probabilities else None, class_weight, smoothing)
        # dz = p a + [c = y] t + b (the weights of the sum over all classes)
        g = grad_losses.to(rows.dtype)
        a, b, t = torch.zeros_like(g), None, None
        if not probabilities:
            t = -(1 - smoothing) * g * (1 if of_target is None else of_target)
            a = a - t
        if spread.factor:
            b = -spread.factor / spread.classes * g
            a = a - b * spread_sum
        if z_loss != 0.0:
            a = a + g * (z_loss * (2 * lse_of(largest, tail)))
        grad_target = torch.empty_like(target) if need_target else None

        def of_chunk(part: slice, z: Tensor) -> Tensor:
            log_p = (z - largest[part, None]).sub_(tail[part, None])
            if need_target:
                grad = log_p * (-(1 - smoothing) * g[part, None])
                grad_target[part] = grad if class_weight is None else grad * class_weight
            if t is not None:
                place = rows.place[part, None]
                log_p_y = log_p.gather(1, place)
            grad = log_p.exp_().mul_(a[part, None])
            if t is not None:  # 1 - p without cancellation
                at, t_part = log_p_y, torch.where(rows.mine[part], t[part], 0)[:, None]
                grad.scatter_(1, place, at.exp() * (a[part, None] + t_part) - at.expm1() * t_part)
            if b is not None:
                grad += spread.of(part) * b[part, None]
            return grad

        needs = ctx.needs_input_grad[:3]
        out = None
        if ctx.inplace and needs[0]:
            out = input.detach()
        grads = rows.gradients(of_chunk, needs if not need_target else (True, *needs[1:]), out)
        if out is not None:
            torch.autograd.graph.increment_version(out)  # whoever else saved the logits is told
            ctx.overwritten = True
        return grads[0] if needs[0] else None, grads[1], grads[2], grad_target, None, None, None, None


class _Spread:
    """The part of the target that is spread over all classes: label smoothing, or class probabilities."""

    def __init__(self, rows: Rows, probabilities: Tensor | None, class_weight: Tensor | None, smoothing: float):
        self.rows, self.probabilities, self.class_weight, self.smoothing = rows, probabilities, class_weight, smoothing
        self.total = rows.shard.total.to(rows.dtype)
        if probabilities is None:
            self.factor, self.classes = smoothing, self.total
        else:
            self.factor, self.classes = 1.0, 1.0

    def of(self, part: slice) -> Tensor:
        """``(n or 1, V_local)`` weights of a chunk's classes."""
        weight = self.class_weight
        if self.probabilities is None:
            one = self.rows.input.new_ones(1, self.rows.shard.size, dtype=self.rows.dtype)
            return one if weight is None else one * weight
        q = self.probabilities[part].to(self.rows.dtype)
        if self.smoothing:
            q = q * (1 - self.smoothing) + self.smoothing / self.total
        return q if weight is None else q * weight


class _SumOfGradients(torch.autograd.Function):
    """What every process has alike and uses for its own part: gradients of all parts are added."""

    @staticmethod
    def forward(ctx, input: Tensor, op: str, group: dist.ProcessGroup) -> Tensor:
        ctx.op, ctx.group = op, group
        return input.view_as(input)

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_second_derivative(ctx.op)
        total = grad.to(accumulator(grad.dtype), memory_format=torch.contiguous_format, copy=True)
        return sum_(total, ctx.group).to(grad.dtype), None, None


def _reduced(
    op: str,
    losses: Tensor,
    divisor: Tensor | float,
    reduction: str,
    num_items: float | Tensor | None,
    all_ignored: str,
) -> Tensor:
    """The losses of rows, reduced as PyTorch does; sums are float64."""
    if reduction == "none":
        return losses
    total = losses.double().sum()
    if reduction == "mean":
        divisor = divisor if num_items is None else num_items
        if isinstance(divisor, Tensor):
            divisor = divisor.to(total.dtype)
        if all_ignored == "zero":  # a sum divided by infinity is 0, and so are its gradients
            if isinstance(divisor, Tensor):
                divisor = torch.where(divisor == 0, math.inf, divisor)
            elif divisor == 0:
                divisor = math.inf
        if not isinstance(divisor, Tensor):
            divisor = total.new_full((), divisor)  # 0 / 0 is NaN
        total = total / divisor
    return total.to(losses.dtype)


def _check_options(op, reduction, ignore_index, label_smoothing, lse_square_scale, softcap, num_items, all_ignored,
                   device) -> int:  # fmt: skip
    """Of every loss; ``ignore_index`` as an int."""
    if all_ignored not in F._ALL_IGNORED:
        raise ValueError(f"{op}: all_ignored must be 'nan' or 'zero', got {all_ignored!r}")
    if num_items is not None:
        F._check_num_items(op, num_items, reduction, device)
    F._check_numbers(op, label_smoothing, lse_square_scale, softcap)
    check_loss_options(op, F._REDUCTIONS[reduction], label_smoothing, softcap)
    return F._integer(op, "ignore_index", ignore_index)


def _loss_of_rows(
    op, x, linear_weight, bias, y, class_weight, shard, reduction, options, num_items, all_ignored, inplace=False
) -> Tensor:
    """The loss of rows ``x`` in the dtype of sums; under ``none``, of each row."""
    if y.is_floating_point():
        count = y.shape[0]
    else:
        counted = y != options[0]
        shard.check_ids("target", y, counted)
        count = counted.sum()
    with torch.autocast(x.device.type, enabled=False):
        losses, weights = _Losses.apply(x, linear_weight, bias, y, class_weight, shard, options, inplace)
    divisor = count if weights is None else weights.double().sum()
    return _reduced(op, losses, divisor, reduction, num_items, all_ignored)


@torch.compiler.disable
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    num_items: float | Tensor | None = None,
    all_ignored: str = "nan",
    inplace_backward: bool = False,
) -> Tensor:
    """:func:`fastllm.functional.cross_entropy` of logits whose classes are cut over processes.

    Two collectives forward, none backward.

    Parameters
    ----------
    input : Tensor
        ``(C_local)``, ``(N, C_local)`` or ``(N, C_local, d1, ...)``: the logits of this process's classes; of all other
        sizes the same in every process.
    target : Tensor
        Class indices of the whole vocabulary, the same in every process; or the class probabilities of this process's
        classes, of input's shape.
    weight : Tensor, optional
        ``(C_local,)`` weights of this process's classes.
    vocab_start : int
        The first class that this process holds. The parts are of any size, also of none, and together the whole.
    group : ProcessGroup, optional
        The processes; all of them if not given.
    label_smoothing : float
        Spread over the classes of all processes.
    size_average, ignore_index, reduce, reduction, lse_square_scale, softcap, num_items, all_ignored, inplace_backward
        As for :func:`fastllm.functional.cross_entropy`, and the same in every process.

    Returns
    -------
    Tensor
        The same bits in every process.

    Raises
    ------
    RuntimeError
        No process group, or one without this process; ``weight`` that requires a gradient; a second derivative.
    ValueError
        On the CPU, parts with gaps or overlaps.
    As :func:`fastllm.functional.cross_entropy`. An error that one process alone finds leaves the others waiting for it.
    """
    op = "cross_entropy"
    reduction = F._reduction_name(op, reduction, size_average, reduce)
    check_given(op, input=input, target=target)
    ignore_index = _check_options(
        op, reduction, ignore_index, label_smoothing, lse_square_scale, softcap, num_items, all_ignored, input.device
    )
    if inplace_backward:
        F._check_overwritable(input)
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        input, target, weight = (autocast_to(t, torch.float32, kind) for t in (input, target, weight))
    if input.dtype not in DTYPES:
        raise NotImplementedError(f"{op}: input must be float32, float64, bfloat16 or float16, got {input.dtype}")
    if input.dim() < 1:
        raise IndexError(f"{op}: input must have at least 1 dimension, got 0")
    check_device(op, "target", target, "input", input.device)
    probabilities = target.is_floating_point()
    classes = input.shape[0 if input.dim() == 1 else 1]
    x, w = input, weight
    if probabilities:
        if ignore_index >= 0:
            raise RuntimeError(f"{op}: ignore_index is not supported for class probabilities, got {ignore_index}")
        dtype = probability_dtype(input, target, weight)
        x, target, w = (None if t is None else t.to(dtype) for t in (x, target, w))
        expected = input.shape
    else:
        target = checked_indices(op, target)
        expected = (input.shape[0], *input.shape[2:]) if input.dim() > 1 else ()
    if target.shape != torch.Size(expected) and not (expected == () and target.shape == (1,)):
        raise (RuntimeError if target.dim() and target.shape[:1] == expected[:1] else ValueError)(
            f"{op}: target must be of shape {tuple(expected)} for input of shape {tuple(input.shape)}, "
            f"got {tuple(target.shape)}"
        )
    check_class_weight(op, w, x, classes, False)
    shard = Shard.of(op, vocab_start, classes, group, input.device)
    y = target
    if input.dim() == 1:
        x, y = x[None], y[None] if probabilities else y.reshape(1)
    elif input.dim() > 2:
        x = x.movedim(1, -1).flatten(0, -2)
        y = y.movedim(1, -1).flatten(0, -2) if probabilities else y.flatten()
    if inplace_backward and not has_contiguous_rows(x):
        x = x.contiguous()  # only rows that lie apart can be overwritten: others get a copy of their own
    options = (ignore_index, label_smoothing, lse_square_scale, softcap)
    output = _loss_of_rows(
        op, x, None, None, y, w, shard, reduction, options, num_items, all_ignored,
        inplace_backward and needs_grad(x) and not needs_grad(y),
    ).to(x.dtype)  # fmt: skip
    if reduction != "none":
        return output
    return output.reshape(
        (input.shape[0], *input.shape[2:]) if input.dim() > 1 else (() if probabilities else target.shape)
    )


@torch.compiler.disable
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    num_items: float | Tensor | None = None,
    all_ignored: str = "nan",
    shift: bool = False,
) -> Tensor:
    """:func:`fastllm.functional.linear_cross_entropy` of an output layer whose classes are cut over processes.

    Two collectives forward and one backward, the sum of the input's gradient, however many chunks of logits there are.
    Backward makes the logits of a chunk again. The memory of logits is bounded as in the plain function.

    Parameters
    ----------
    input : Tensor
        ``(N, D)`` or ``(D,)``; under ``shift``, ``(B, T, D)`` or ``(T, D)``. The same in every process.
    linear_weight, linear_bias : Tensor
        ``(V_local, D)`` and ``(V_local,)``: this process's classes. With ``(V_local, d1, ..., D)``, a K-dimensional loss,
        this process's logits are held.
    target : Tensor
        Class indices of the whole vocabulary, the same in every process; or ``(N, V_local)`` class probabilities of this
        process's classes.
    weight : Tensor, optional
        ``(V_local,)`` weights of this process's classes.
    vocab_start : int
        The first class that this process holds. The parts are of any size, also of none, and together the whole.
    group : ProcessGroup, optional
        The processes; all of them if not given.
    label_smoothing : float
        Spread over the classes of all processes.
    reduction, ignore_index, lse_square_scale, softcap, num_items, all_ignored, shift
        As for :func:`fastllm.functional.linear_cross_entropy`, and the same in every process.

    Returns
    -------
    Tensor
        The same bits in every process. Its backward gives each process the gradient of its classes, and all of them the
        input's.

    Raises
    ------
    As :func:`cross_entropy`, and RuntimeError for shapes as in the plain function.
    """
    op = "linear_cross_entropy"
    check_given(op, input=input, linear_weight=linear_weight, target=target)
    reduction = F._reduction_name(op, reduction)
    ignore_index = -100 if ignore_index is None else ignore_index
    ignore_index = _check_options(
        op, reduction, ignore_index, label_smoothing, lse_square_scale, softcap, num_items, all_ignored, input.device
    )
    F._check_type(op, "shift", shift, bool)
    probabilities = target.is_floating_point()
    if probabilities and ignore_index != -100:
        raise RuntimeError(f"{op}: ignore_index must be None for class probabilities, got {ignore_index}")
    shape = target.shape
    if shift:
        F._check_shift(input, linear_weight, target)
        input, target = input.flatten(0, -2), F._next_targets(target, ignore_index).flatten()
    kind = input.device.type
    autocast = torch.is_autocast_enabled(kind)
    if autocast:
        dtype = torch.get_autocast_dtype(kind)
        input, linear_weight, linear_bias, weight = (
            autocast_to(t, dtype, kind) for t in (input, linear_weight, linear_bias, weight)
        )
    F._check_linear(input, linear_weight, linear_bias)
    if linear_weight.dim() > 2:
        shared = _SumOfGradients.apply(input, op, checked_group(op, group))
        logits = F._spatial_logits(shared, linear_weight, linear_bias)
        return cross_entropy(
            logits, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
            vocab_start=vocab_start, group=group, lse_square_scale=lse_square_scale, softcap=softcap,
            num_items=num_items, all_ignored=all_ignored,
        )  # fmt: skip
    check_linear(op, "input", input, "linear_weight", linear_weight, "linear_bias", linear_bias)
    check_device(op, "target", target, "input", input.device)
    expected = (*input.shape[:-1], linear_weight.shape[0]) if probabilities else input.shape[:-1]
    if target.shape != torch.Size(expected) and not (input.dim() == 1 and target.shape == (1,) and not probabilities):
        raise (RuntimeError if target.dim() and target.shape[:1] == expected[:1] else ValueError)(
            f"{op}: target must be of shape {tuple(expected)} for input of shape {tuple(input.shape)} and linear_weight "
            f"{tuple(linear_weight.shape)}, got {tuple(target.shape)}"
        )
    x = input[None] if input.dim() == 1 else input
    w = weight
    if probabilities:
        y = target.reshape(x.shape[0], linear_weight.shape[0]).to(x.dtype)
        w = None if weight is None else weight.to(x.dtype)
    else:
        y = checked_indices(op, target).reshape(x.shape[0])
    check_class_weight(op, w, x, linear_weight.shape[0], False)
    shard = Shard.of(op, vocab_start, linear_weight.shape[0], group, input.device)
    options = (ignore_index, label_smoothing, lse_square_scale, softcap)
    output = _loss_of_rows(op, x, linear_weight, linear_bias, y, w, shard, reduction, options, num_items, all_ignored)
    if not autocast:
        output = output.to(probability_dtype(input, target, weight) if probabilities else input.dtype)
    if reduction != "none":
        return output
    return output.reshape(shape if not probabilities else shape[:-1])
