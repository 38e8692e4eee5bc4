r"""Per-token statistics of logits, for losses over chosen tokens (policy gradients, DPO, distillation).

With :math:`z = \mathrm{cap}(x) / T`, :math:`p = \mathrm{softmax}(z)`, :math:`\ell = \log\sum_c e^{z_c}` and H the entropy,
the incoming gradients g of ``log_prob``, ``entropy``, ``lse`` and ``top_log_prob`` give

.. math::
    \frac{\partial}{\partial z_c} = p_c\,\Bigl(g_\ell - g_y - \sum_k g_k - (\log p_c + H)\,g_H\Bigr)
        + [c = y]\,g_y + \sum_k [c = t_k]\,g_k

Rows are walked in chunks, in plain PyTorch on every device: there is no fused kernel yet. Backward computes the logits of
a chunk again from the saved input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as TF

from fastllm.operations import flops
from fastllm.operations.checks import as_rows, check_device, checked_indices
from fastllm.operations.chunks import chunk_rows
from fastllm.operations.declaration import Kernel, accumulator, declare_for_any_device
from fastllm.operations.node import needs_grad

WORKSPACE = 80 << 20  # bytes of logits held at once, unless FASTLLM_LOSS_WORKSPACE gives another number
LEAST = -1e4  # stands for log p of -inf: exp() of it is 0, and 0 times it is 0
MOST_TOP_IDS = 1024


class LogProbs(NamedTuple):
    """What :func:`fastllm.functional.log_probs` returns; a field that was not asked for is None."""

    log_prob: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    argmax: Tensor | None = None
    mean_logit: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    top_log_prob: Tensor | None = None


FIELDS = LogProbs._fields
DIFFERENTIABLE = ("log_prob", "entropy", "lse", "top_log_prob")


class _Rows:
    """The rows' logits, chunk by chunk, in the dtype of sums."""

    def __init__(self, input, weight, bias, target, temperature, ignore_index, number, softcap):
        self.input, self.weight, self.bias = input, weight, bias
        self.temperature, self.number, self.softcap = temperature, number, softcap
        self.classes = input.shape[1] if weight is None else weight.shape[0]
        self.dtype = accumulator(input.dtype)
        self.ignored = target == ignore_index
        self.target = target.masked_fill(self.ignored, 0).long()
        step = chunk_rows(len(target), self.classes, self.dtype.itemsize, WORKSPACE)
        self.parts = [slice(i, i + step) for i in range(0, len(target) if self.classes else 0, step)]

    def logits(self, part: slice) -> tuple[Tensor, Tensor | None]:
        """``z`` of a chunk, and ``tanh(x / softcap)``. Without a weight ``z`` may be the caller's memory."""
        x = self.input[part]
        if self.weight is not None:
            x = TF.linear(x, self.weight, self.bias)
        z, squashed = x.to(self.dtype), None
        if self.softcap is not None:
            squashed = (z / self.softcap).tanh_()
            z = squashed * self.softcap
        divisor = self.divisor(part)
        return (z if divisor is None else z / divisor), squashed

    def divisor(self, part: slice) -> Tensor | float | None:
        if self.temperature is not None:
            return self.temperature[part].to(self.dtype)[:, None]
        return None if self.number == 1.0 else self.number


def _check_values(op: str, target, temperature, top_ids, ignore_index: int, classes: int) -> None:
    """What only the numbers tell. On a GPU the indexing kernels assert the ranges; the host does not wait to look."""
    if not target.is_cpu:
        return
    counted = target != ignore_index
    bad = counted & ((target < 0) | (target >= classes))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"{op}: target must be in [0, {classes}) or ignore_index {ignore_index}, got {int(target[row])} at "
            f"position {row}"
        )
    if top_ids is not None:
        bad = counted[:, None] & ((top_ids < 0) | (top_ids >= classes))
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            raise IndexError(
                f"{op}: top_ids must be in [0, {classes}), got {int(top_ids[row, column])} at row {row}, "
                f"column {column}"
            )
    if temperature is not None:
        bad = counted & ~(temperature > 0)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(f"{op}: temperature must be positive, got {float(temperature[row])} at position {row}")


_ARGUMENTS = "Tensor input, Tensor? weight, Tensor? bias, Tensor target, Tensor? temperature, Tensor? top_ids"
_OPTIONS = "int ignore_index, float number, float? softcap"
_RESULTS = ", ".join(["Tensor"] * (len(FIELDS) + 1))


def _empty_results(input, target, top_ids, asked) -> list[Tensor]:
    """Of every field that is asked for, of target's length; of the others, of no length."""
    rows, dtype, results = target.shape[0], accumulator(input.dtype), []
    for field, ask in zip(FIELDS, asked, strict=True):
        shape = (rows if ask else 0,)
        if field == "top_log_prob" and ask:
            shape = (rows, top_ids.shape[1])
        results.append(input.new_empty(shape, dtype=torch.int64 if field == "argmax" else dtype))
    return results


def _forward(input, weight, bias, target, temperature, top_ids, ignore_index, number, softcap, asked):
    rows = _Rows(input, weight, bias, target, temperature, ignore_index, number, softcap)
    op = "log_probs" if weight is None else "linear_log_probs"
    _check_values(op, target, temperature, top_ids, ignore_index, rows.classes)
    results = _empty_results(input, target, top_ids, asked)
    for result in results:
        result.fill_(0 if result.is_floating_point() else -1)
    wanted = {field: result for field, result, ask in zip(FIELDS, results, asked, strict=True) if ask}
    # Of each row: the largest z, log(sum e^z) - max z, and the entropy. Their sum lse would round small tails off.
    saved = input.new_zeros((3, target.shape[0]), dtype=rows.dtype)
    for part in rows.parts:
        z = rows.logits(part)[0]
        largest, argmax = z.max(1)
        below = z - largest[:, None]
        exponential = below.exp().scatter_(1, argmax[:, None], 0.0)
        others = exponential.sum(1)  # the largest is 1 more
        tail = others.log1p()
        found = {}
        if "log_prob" in wanted:
            found["log_prob"] = below.gather(1, rows.target[part, None])[:, 0] - tail
        if "top_log_prob" in wanted:
            ids = top_ids[part].masked_fill(rows.ignored[part, None], 0)
            found["top_log_prob"] = below.gather(1, ids) - tail[:, None]
        if "lse" in wanted:
            found["lse"] = torch.where(largest.isinf(), largest, largest + tail)
        if "argmax" in wanted:
            found["argmax"] = argmax
        if "mean_logit" in wanted:
            found["mean_logit"] = z.mean(1)
        if "log_sum_sq_probs" in wanted:
            found["log_sum_sq_probs"] = exponential.square().sum(1).log1p() - 2 * tail
        saved[0, part], saved[1, part] = largest, tail
        if "entropy" in wanted:
            found["entropy"] = tail - exponential.mul_(below.clamp_(min=LEAST)).sum(1) / (1 + others)
            saved[2, part] = found["entropy"]
        for field, value in found.items():
            ignored = rows.ignored[part, None] if value.dim() == 2 else rows.ignored[part]
            wanted[field][part] = value.masked_fill_(ignored, -1 if field == "argmax" else 0)
    return *results, saved


def _forward_fake(input, weight, bias, target, temperature, top_ids, ignore_index, number, softcap, asked):
    saved = input.new_empty((3, target.shape[0]), dtype=accumulator(input.dtype))
    return *_empty_results(input, target, top_ids, asked), saved


def _empty_gradients(input, weight, need_input, need_weight, need_bias) -> tuple[Tensor, Tensor, Tensor]:
    return (
        input.new_empty(input.shape if need_input else 0),
        input.new_empty(weight.shape if need_weight else 0),
        input.new_empty(weight.shape[0] if need_bias else 0),
    )


def _backward(
    grad_log_prob, grad_entropy, grad_lse, grad_top_log_prob, saved,
    input, weight, bias, target, temperature, top_ids, ignore_index, number, softcap, need_input, need_weight, need_bias,
):  # fmt: skip
    rows = _Rows(input, weight, bias, target, temperature, ignore_index, number, softcap)
    grads = _empty_gradients(input, weight, need_input, need_weight, need_bias)
    if not rows.parts:
        return tuple(grad.zero_() for grad in grads)
    # Several chunks in bfloat16 or float16 are added up in float32, and rounded once.
    sums = [grad if grad.dtype == rows.dtype else grad.new_empty(grad.shape, dtype=rows.dtype) for grad in grads[1:]]
    for total in sums:
        total.zero_()
    for part in rows.parts:
        z, squashed = rows.logits(part)
        ignored, y = rows.ignored[part, None], rows.target[part, None]
        log_p = (z - saved[0, part, None]).sub_(saved[1, part, None])
        del z
        p = log_p.exp()
        log_p_y = log_p.gather(1, y)
        factor = log_p.new_zeros((len(log_p), 1))  # of p, at the target's place without the part of log_prob
        if grad_lse is not None:
            factor = factor + grad_lse[part, None]
        if grad_top_log_prob is not None:
            factor = factor - grad_top_log_prob[part].sum(1, keepdim=True)
        g_y = None if grad_log_prob is None else grad_log_prob[part, None]
        everywhere = factor if g_y is None else factor - g_y
        if grad_entropy is None:
            grad = p.mul_(everywhere)
        else:
            g, entropy = grad_entropy[part, None], saved[2, part, None]
            factor = factor - (log_p_y.clamp(min=LEAST) + entropy) * g
            grad = p.mul_(log_p.clamp_(min=LEAST).add_(entropy).mul_(-g).add_(everywhere))
        del log_p, p
        if g_y is not None:  # 1 - p without cancellation
            grad.scatter_(1, y, log_p_y.exp() * factor - log_p_y.expm1() * g_y)
        if grad_top_log_prob is not None:
            ids = top_ids[part].masked_fill(ignored, 0)
            row = torch.arange(len(ids), device=ids.device)[:, None]
            grad.index_put_((row, ids), grad_top_log_prob[part], accumulate=True)  # repeated ids: in a fixed order
        divisor = rows.divisor(part)
        if divisor is not None:
            grad.div_(divisor)
        if squashed is not None:
            grad.mul_(squashed.square_().neg_().add_(1))
        grad.masked_fill_(ignored, 0)
        if weight is None:
            grads[0][part] = grad
            continue
        if need_bias:
            sums[1] += grad.sum(0)
        if need_input or need_weight:
            grad = grad.to(input.dtype)
        if need_input:
            torch.mm(grad, weight, out=grads[0][part])
        if need_weight:
            sums[0] += grad.t() @ input[part].masked_fill(ignored, 0)  # an ignored row may hold NaN
    return grads[0], sums[0].to(input.dtype), sums[1].to(input.dtype)


def _backward_fake(*arguments):
    return _empty_gradients(arguments[5], arguments[6], *arguments[-3:])


def _forward_flops(input, weight, *_, **__) -> int:
    return 0 if weight is None else flops.layer_flops(input, weight)


def _backward_flops(*arguments, **_) -> int:
    input, weight = arguments[5:7]
    need_input, need_weight, _ = arguments[-3:]
    return 0 if weight is None else (1 + need_input + need_weight) * flops.layer_flops(input, weight)


FORWARD = Kernel(
    "log_probs_forward",
    f"({_ARGUMENTS}, {_OPTIONS}, bool[] asked) -> ({_RESULTS})",
    _forward_fake,
    _forward_flops,
)
BACKWARD = Kernel(
    "log_probs_backward",
    "(Tensor? grad_log_prob, Tensor? grad_entropy, Tensor? grad_lse, Tensor? grad_top_log_prob, Tensor saved, "
    f"{_ARGUMENTS}, {_OPTIONS}, bool need_input, bool need_weight, bool need_bias) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _backward_fake,
    _backward_flops,
)
declare_for_any_device(FORWARD, _forward)
declare_for_any_device(BACKWARD, _backward, "log_probs and linear_log_probs: second derivatives are not implemented")


class LogProbsNode(torch.autograd.Function):
    """Saves its inputs and three numbers a row; without ``weight``, ``input`` holds the logits."""

    @staticmethod
    def forward(ctx, input, weight, bias, target, temperature, top_ids, options: tuple, asked: tuple):
        *results, saved = torch.ops.fastllm.log_probs_forward(
            input, weight, bias, target, temperature, top_ids, *options, asked
        )
        ctx.save_for_backward(saved, input, weight, bias, target, temperature, top_ids)
        ctx.options = options
        wanted = [(field, result) for field, result, ask in zip(FIELDS, results, asked, strict=True) if ask]
        ctx.fields = [field for field, _ in wanted]
        ctx.mark_non_differentiable(*(result for field, result in wanted if field not in DIFFERENTIABLE))
        ctx.set_materialize_grads(False)
        return tuple(result for _, result in wanted)

    @staticmethod
    def backward(ctx, *grad_outputs):
        given = dict(zip(ctx.fields, grad_outputs, strict=True))
        incoming = [given.get(field) for field in DIFFERENTIABLE]
        needs = ctx.needs_input_grad[:3]
        grads = torch.ops.fastllm.log_probs_backward(*incoming, *ctx.saved_tensors, *ctx.options, *needs)
        found = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return *found, None, None, None, None, None


def apply(
    op: str,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    temperature: float | Tensor,
    softcap: float | None,
    outputs: tuple[str, ...],
    top_ids: Tensor | None,
) -> LogProbs:
    """Check the tensors, bring them to rows, and apply the node. ``input`` holds logits where ``weight`` is None."""
    _check_target(op, input, target)
    if isinstance(temperature, Tensor):
        _check_temperature(op, temperature, target)
    if top_ids is not None:
        _check_top_ids(op, top_ids, target)
    asked = _asked(op, outputs, top_ids)
    per_token = isinstance(temperature, Tensor)
    found = LogProbsNode.apply(
        as_rows(input),
        weight,
        bias,
        checked_indices(op, target).reshape(-1),
        temperature.detach().reshape(-1) if per_token else None,
        None if top_ids is None else as_rows(top_ids),
        (ignore_index, 1.0 if per_token else temperature, softcap),
        asked,
    )
    names = [field for field, ask in zip(FIELDS, asked, strict=True) if ask]
    shapes = [top_ids.shape if name == "top_log_prob" else target.shape for name in names]
    return LogProbs(**{name: r.reshape(shape) for name, r, shape in zip(names, found, shapes, strict=True)})


def _check_target(op: str, input: Tensor, target: Tensor) -> None:
    check_device(op, "target", target, "input", input.device)
    if target.shape == input.shape[:-1]:
        return
    same_batch = input.dim() > 1 and target.dim() > 0 and target.shape[0] == input.shape[0]
    raise (RuntimeError if same_batch else ValueError)(
        f"{op}: target must be of input's shape without its last dimension, {list(input.shape[:-1])}, "
        f"got {list(target.shape)}"
    )


def _check_temperature(op: str, temperature: Tensor, target: Tensor) -> None:
    if not temperature.is_floating_point():
        raise RuntimeError(f"{op}: temperature must be floating point, got a tensor of {temperature.dtype}")
    if temperature.shape != target.shape:
        raise RuntimeError(
            f"{op}: temperature must be a number or of target's shape {list(target.shape)}, "
            f"got {list(temperature.shape)}"
        )
    check_device(op, "temperature", temperature, "target", target.device)
    if needs_grad(temperature):
        raise RuntimeError(
            f"{op}: temperature must not require a gradient (pass temperature.detach()), got one that does"
        )


def _check_top_ids(op: str, top_ids: Tensor, target: Tensor) -> None:
    if not isinstance(top_ids, Tensor):
        raise TypeError(f"{op}: top_ids must be a tensor or None, got {type(top_ids).__name__}")
    if top_ids.dtype != torch.int64:
        raise RuntimeError(f"{op}: top_ids must be int64, got {top_ids.dtype}")
    if top_ids.dim() == 0 or top_ids.shape[:-1] != target.shape:
        raise RuntimeError(
            f"{op}: top_ids must be of target's shape and one more dimension, ({', '.join(map(str, target.shape))}, K), "
            f"got {list(top_ids.shape)}"
        )
    if top_ids.shape[-1] > MOST_TOP_IDS:
        raise ValueError(f"{op}: top_ids must hold at most {MOST_TOP_IDS} ids a row, got {top_ids.shape[-1]}")
    check_device(op, "top_ids", top_ids, "target", target.device)


def _asked(op: str, outputs: tuple[str, ...], top_ids: Tensor | None) -> tuple[bool, ...]:
    """Of every field, whether it is asked for."""
    if not isinstance(outputs, (tuple, list)):
        raise TypeError(f"{op}: outputs must be a tuple of names, got {outputs!r}")
    for name in outputs:
        if name not in FIELDS:
            raise ValueError(f"{op}: outputs must be among {', '.join(map(repr, FIELDS))}, got {name!r}")
    if "top_log_prob" in outputs and top_ids is None:
        raise ValueError(f"{op}: outputs may name 'top_log_prob' only with top_ids, got top_ids=None")
    return tuple(field in outputs or (field == "top_log_prob" and top_ids is not None) for field in FIELDS)
