"""``linear_log_probs`` of an output layer whose classes are cut over processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastllm import functional as F
from fastllm.distributed import shard as shard_module
from fastllm.distributed.rows import LEAST, Rows
from fastllm.distributed.shard import Shard, refuse_second_derivative
from fastllm.operations import log_probs as checks
from fastllm.operations.checks import as_rows, check_given, check_linear, checked_indices
from fastllm.operations.declaration import autocast_to
from fastllm.operations.log_probs import DIFFERENTIABLE, LogProbs


class _LogProbs(torch.autograd.Function):
    """Saves its inputs and a few numbers a row; backward makes the logits again."""

    @staticmethod
    def forward(ctx, input, weight, bias, target, temperature, top_ids, shard: Shard, options: tuple, fields: tuple):
        ignore_index, number, softcap = options
        rows = Rows(
            shard, input, weight, bias, target, ignore_index, softcap, number if temperature is None else temperature
        )
        if top_ids is not None:
            top_ids = top_ids.masked_fill(rows.ignored[:, None], 0)
        moments = any(name in fields for name in ("argmax", "entropy", "mean_logit", "log_sum_sq_probs"))
        found = rows.statistics(top_ids=top_ids, moments=moments)
        values = {
            "log_prob": lambda: found.log_p(found.target),
            "entropy": lambda: found.entropy.clone(),
            "lse": lambda: found.lse,
            "argmax": lambda: found.argmax,
            "mean_logit": lambda: found.sum / shard.total,
            "log_sum_sq_probs": lambda: found.log_sum_squares,
            "top_log_prob": lambda: found.log_p(found.top),
        }
        results = []
        for name in fields:
            value = values[name]()
            results.append(value.masked_fill_(rows.ignored, -1) if name == "argmax" else rows.masked_(value))
        ctx.save_for_backward(
            input, weight, bias, target, temperature, top_ids, found.largest, found.tail, found.entropy
        )
        ctx.shard, ctx.options, ctx.fields = shard, options, fields
        ctx.mark_non_differentiable(*(r for n, r in zip(fields, results, strict=True) if n not in DIFFERENTIABLE))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx, *grad_outputs):
        refuse_second_derivative(ctx.shard.op)
        shard, (ignore_index, number, softcap) = ctx.shard, ctx.options
        input, weight, bias, target, temperature, top_ids, largest, tail, entropy = ctx.saved_tensors
        rows = Rows(
            shard, input, weight, bias, target, ignore_index, softcap, number if temperature is None else temperature
        )
        given = dict(zip(ctx.fields, grad_outputs, strict=True))
        g_y, g_h, g_lse, g_top = (given.get(name) for name in DIFFERENTIABLE)
        # dz = p (a - (log p + entropy) g_h) + [c = y] g_y + sum_k [c = t_k] g_k
        a = torch.zeros_like(tail)
        for part in (g_lse, None if g_y is None else -g_y, None if g_top is None else -g_top.sum(1)):
            a = a if part is None else a + part
        if g_y is not None:
            g_y = torch.where(rows.mine, g_y, 0)
        if g_top is not None:
            top_mine, top_place = shard.here(top_ids)
            g_top = torch.where(top_mine, g_top, 0)

        def of_chunk(part: slice, z: Tensor) -> Tensor:
            log_p = (z - largest[part, None]).sub_(tail[part, None])
            log_p_y = log_p.gather(1, rows.place[part, None])
            p, factor, at_target = log_p.exp(), a[part, None], a[part, None]
            if g_h is not None:
                h, g = entropy[part, None], g_h[part, None]
                at_target = at_target - (log_p_y.clamp(min=LEAST) + h) * g
                factor = log_p.clamp_(min=LEAST).add_(h).mul_(-g).add_(factor)
            grad = p.mul_(factor)
            if g_y is not None:  # 1 - p without cancellation
                g = g_y[part, None]
                grad.scatter_(1, rows.place[part, None], log_p_y.exp() * (at_target + g) - log_p_y.expm1() * g)
            if g_top is not None:
                row = torch.arange(len(grad), device=grad.device)[:, None]
                grad.index_put_((row, top_place[part]), g_top[part], accumulate=True)  # repeated ids: in a fixed order
            return grad

        return *rows.gradients(of_chunk, ctx.needs_input_grad[:3]), *[None] * 6


@torch.compiler.disable
def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    outputs: tuple[str, ...] = ("log_prob",),
    top_ids: Tensor | None = None,
) -> LogProbs:
    """:func:`fastllm.functional.linear_log_probs` of an output layer whose classes are cut over processes.

    Two collectives forward and one backward, the sum of the input's gradient, however many chunks of logits there are.

    Parameters
    ----------
    input : Tensor
        ``(*, D)``, the same in every process.
    linear_weight, linear_bias : Tensor
        ``(V_local, D)`` and ``(V_local,)``: this process's classes.
    target : Tensor
        ``(*)`` class indices of the whole vocabulary, the same in every process.
    vocab_start : int
        The first class that this process holds. The parts are of any size, also of none, and together the whole.
    group : ProcessGroup, optional
        The processes; all of them if not given.
    top_ids : Tensor, optional
        ``(*, K)`` ids of the whole vocabulary. Each process receives K numbers a row from each.
    ignore_index, temperature, softcap, outputs
        As for :func:`fastllm.functional.linear_log_probs`, and the same in every process.

    Returns
    -------
    LogProbs
        The same bits in every process; ``argmax`` is the lowest id of the whole vocabulary. Incoming gradients must be
        the same in every process, too.

    Raises
    ------
    As the plain function; no process group or one without this process, and a second derivative: RuntimeError; on the CPU
    parts with gaps or overlaps: ValueError. An error that one process alone finds leaves the others waiting for it.
    """
    op = "linear_log_probs"
    check_given(op, input=input, linear_weight=linear_weight, target=target)
    ignore_index, temperature = F._check_log_probs(op, ignore_index, temperature, softcap, input, linear_weight, target)
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        input, linear_weight, linear_bias = (autocast_to(t, dtype, kind) for t in (input, linear_weight, linear_bias))
    check_linear(op, "input", input, "linear_weight", linear_weight, "linear_bias", linear_bias)
    checks.check_target(op, input, target)
    per_token = isinstance(temperature, Tensor)
    if per_token:
        checks.check_temperature(op, temperature, target)
    if top_ids is not None:
        checks.check_top_ids(op, top_ids, target)
    asked = checks.asked_fields(op, outputs, top_ids)
    fields = tuple(name for name, ask in zip(LogProbs._fields, asked, strict=True) if ask)
    y = checked_indices(op, target).reshape(-1)
    shard = Shard.of(op, vocab_start, linear_weight.shape[0], group, input.device)
    counted = y != ignore_index
    shard.check_ids("target", y, counted)
    if top_ids is not None:
        shard.check_ids("top_ids", as_rows(top_ids), counted[:, None])
    if per_token and shard_module.may_look(y.device):
        checks.check_positive(op, temperature.reshape(-1), counted)
    with torch.autocast(kind, enabled=False):
        found = _LogProbs.apply(
            as_rows(input),
            linear_weight,
            linear_bias,
            y,
            temperature.detach().reshape(-1) if per_token else None,
            None if top_ids is None else as_rows(top_ids),
            shard,
            (ignore_index, 1.0 if per_token else temperature, softcap),
            fields,
        )
    shapes = [top_ids.shape if name == "top_log_prob" else target.shape for name in fields]
    return LogProbs(**{name: r.reshape(shape) for name, r, shape in zip(fields, found, shapes, strict=True)})
