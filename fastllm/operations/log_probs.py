r"""log_probs and linear_log_probs: per-token statistics of logits, for losses over chosen tokens.

With :math:`z = \mathrm{cap}(x) / T`, :math:`p = \mathrm{softmax}(z)`, :math:`\ell = \log\sum_c e^{z_c}` and H the entropy,
the incoming gradients g of ``log_prob``, ``entropy``, ``lse`` and ``top_log_prob`` give

.. math::
    \frac{\partial}{\partial z_c} = p_c\,\Bigl(g_\ell - g_y - \sum_k g_k - (\log p_c + H)\,g_H\Bigr)
        + [c = y]\,g_y + \sum_k [c = t_k]\,g_k

Every backend has two row kernels, which read rows of logits and write their statistics or their gradient. The loop of
``linear_log_probs`` is the same for all of them: a product makes a chunk's logits, a row kernel reads them. Backward makes
them again, the row kernel turns them into their gradient where they stand, and two products take that to ``input`` and
``weight``: four products in all. ``linear_cross_entropy`` needs three, because it knows in forward what comes in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastllm import eager, invariance
from fastllm.operations import dense, flops
from fastllm.operations.checks import as_rows, check_device, checked_indices
from fastllm.operations.chunks import WORKSPACE, chunk_rows
from fastllm.operations.cross_entropy import has_contiguous_rows
from fastllm.operations.declaration import Kernel, Operation, accumulator
from fastllm.operations.node import chosen_backend, differentiate, is_concrete, needs_grad, same_backend

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


def check_values(op: str, target, temperature, top_ids, ignore_index: int, classes: int) -> None:
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
        check_positive(op, temperature, counted)


def check_positive(op: str, temperature: Tensor, counted: Tensor) -> None:
    """ValueError for a temperature of a counted row that is not above 0; both are on the CPU."""
    bad = counted & ~(temperature > 0)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"{op}: temperature must be positive, got {float(temperature[row])} at position {row}")


_ARGUMENTS = "Tensor input, Tensor? weight, Tensor? bias, Tensor target, Tensor? temperature, Tensor? top_ids"
_OPTIONS = "int ignore_index, float number, float? softcap"
# Of the row kernels: logits (N, V) with contiguous rows that do not overlap, target (N) int64 or int32, temperature (N) of
# the sums' dtype or `number` for all rows, top_ids (N, K) int64, incoming gradients of the sums' dtype; all but the logits
# contiguous. `saved` (3, N) is read by the same backend's backward alone: the row's maximum, log(sum e^z) less that
# maximum, and the entropy (where asked). Their sum lse would round small tails off.
_ROWS = f"Tensor logits, Tensor target, Tensor? temperature, Tensor? top_ids, {_OPTIONS}"
_RESULTS = ", ".join(f"Tensor {field}" for field in FIELDS) + ", Tensor saved"
_INCOMING = ", ".join(f"Tensor? grad_{field}" for field in DIFFERENTIABLE)


def _empty_results(input, target, top_ids, asked) -> list[Tensor]:
    """Of every field that is asked for, of target's length; of the others, of no length."""
    rows, dtype, results = target.shape[0], accumulator(input.dtype), []
    for field, ask in zip(FIELDS, asked, strict=True):
        shape = (rows if ask else 0,)
        if field == "top_log_prob" and ask:
            shape = (rows, top_ids.shape[1])
        results.append(input.new_empty(shape, dtype=torch.int64 if field == "argmax" else dtype))
    return results


def _rows_forward_fake(logits, target, temperature, top_ids, ignore_index, number, softcap, asked):
    saved = logits.new_empty((3, target.shape[0]), dtype=accumulator(logits.dtype))
    return *_empty_results(logits, target, top_ids, asked), saved


class _Walk:
    """The logits of a linear layer, a chunk of rows at a time, in one buffer."""

    def __init__(self, input, weight, bias, target, temperature, top_ids):
        self.input, self.weight, self.bias = input.contiguous(), weight.contiguous(), bias
        self.of_rows = (target, temperature, top_ids)
        n, classes, item = input.shape[0], weight.shape[0], input.element_size()
        step = chunk_rows(n, classes, item, WORKSPACE)
        self.parts = [slice(i, min(i + step, n)) for i in range(0, n, step)]
        self.buffer = dense.empty_product(input, min(step, n), classes)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, tuple[Tensor | None, ...]]]:
        """Of each chunk: which rows it is, their logits, and their targets, temperatures and top_ids."""
        for part in self.parts:
            logits = self.buffer[: part.stop - part.start]
            dense.multiply_rows(logits, self.input[part], self.weight.t(), self.bias)
            yield part, logits, tuple(None if t is None else t[part] for t in self.of_rows)


def _forward(input, weight, bias, target, temperature, top_ids, ignore_index, number, softcap, asked):
    options = (ignore_index, number, softcap)
    if weight is None:
        return torch.ops.fastllm.log_probs_rows_forward(input, target, temperature, top_ids, *options, asked)
    check_values("linear_log_probs", target, temperature, top_ids, ignore_index, weight.shape[0])
    walk = _Walk(input, weight, bias, target, temperature, top_ids)
    rows_forward = torch.ops.fastllm.log_probs_rows_forward
    found = [rows_forward(logits, *of_rows, *options, asked) for _, logits, of_rows in walk]
    if not found:
        return _rows_forward_fake(input, target, temperature, top_ids, *options, asked)
    if len(found) == 1:
        return found[0]
    *results, saved = zip(*found, strict=True)
    return *(torch.cat(parts) for parts in results), torch.cat(saved, 1)


def _forward_fake(input, weight, bias, *arguments):
    return _rows_forward_fake(input, *arguments)


def _empty_gradients(input, weight, need_input, need_weight, need_bias) -> tuple[Tensor, Tensor, Tensor]:
    return (
        dense.empty(input, *input.shape) if need_input else input.new_empty(0),
        dense.empty(weight, *weight.shape) if need_weight else input.new_empty(0),
        input.new_empty(weight.shape[0] if need_bias else 0),
    )


def _backward(
    grad_log_prob, grad_entropy, grad_lse, grad_top_log_prob, saved,
    input, weight, bias, target, temperature, top_ids, ignore_index, number, softcap, need_input, need_weight, need_bias,
):  # fmt: skip
    incoming = (grad_log_prob, grad_entropy, grad_lse, grad_top_log_prob)
    options = (ignore_index, number, softcap)
    grads = _empty_gradients(input, weight, need_input, need_weight, need_bias)
    grad_input, grad_weight, grad_bias = grads
    rows_backward = torch.ops.fastllm.log_probs_rows_backward_
    if weight is None:
        rows_backward(*incoming, saved, input, target, temperature, top_ids, *options, grad_input)
        return grads
    walk = _Walk(input, weight, bias, target, temperature, top_ids)
    if not walk.parts:
        return tuple(grad.zero_() for grad in grads)
    weight_sum = dense.Sum(grad_weight, of_several=len(walk.parts) > 1)
    bias_sum = torch.zeros_like(grad_bias, dtype=accumulator(input.dtype))
    for part, logits, of_rows in walk:
        of_part = (None if g is None else g[part] for g in incoming)
        rows_backward(*of_part, saved[:, part].contiguous(), logits, *of_rows, *options, logits)
        if need_input:
            dense.multiply_rows(grad_input[part], logits, walk.weight)
        if need_weight:
            # Rows of ignored targets have gradients of 0, and 0 times NaN is NaN.
            ignored = target[part] == ignore_index
            weight_sum.add(logits.t(), walk.input[part].masked_fill(ignored[:, None], 0))
        if need_bias:
            bias_sum += logits.sum(0, dtype=bias_sum.dtype)
    return grad_input, weight_sum.rounded() if need_weight else grad_weight, grad_bias.copy_(bias_sum)


def _backward_fake(*arguments):
    return _empty_gradients(arguments[5], arguments[6], *arguments[-3:])


def _forward_flops(input, weight, *_, **__) -> int:
    return 0 if weight is None else flops.layer_flops(input, weight)


def _backward_flops(*arguments, **_) -> int:
    input, weight = arguments[5:7]
    need_input, need_weight, _ = arguments[-3:]
    return 0 if weight is None else (1 + need_input + need_weight) * flops.layer_flops(input, weight)


OPERATION = Operation(
    "log_probs",
    None,
    None,
    (
        Kernel("log_probs_rows_forward", f"({_ROWS}, bool[] asked) -> ({_RESULTS})", _rows_forward_fake),
        Kernel(
            "log_probs_rows_backward_",
            f"({_INCOMING}, Tensor saved, {_ROWS}, Tensor(a!) grad) -> ()",  # `grad` may be the logits' own memory
        ),
        Kernel(
            "log_probs_forward",
            f"({_ARGUMENTS}, {_OPTIONS}, bool[] asked) -> ({_RESULTS})",
            _forward_fake,
            _forward_flops,
            _forward,
        ),
        Kernel(
            "log_probs_backward",
            f"({_INCOMING}, Tensor saved, {_ARGUMENTS}, {_OPTIONS}, bool need_input, bool need_weight, bool need_bias) "
            "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
            _backward_fake,
            _backward_flops,
            _backward,
        ),
    ),
)


class LogProbsNode(torch.autograd.Function):
    """Saves its inputs and three numbers a row; without ``weight``, ``input`` holds the logits."""

    @staticmethod
    def forward(ctx, input, weight, bias, target, temperature, top_ids, options: tuple, asked: tuple):
        *results, saved = torch.ops.fastllm.log_probs_forward(
            input, weight, bias, target, temperature, top_ids, *options, asked
        )
        ctx.save_for_backward(saved, input, weight, bias, target, temperature, top_ids)
        ctx.options, ctx.backend, ctx.invariant = options, chosen_backend(), invariance.active()
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
        if torch.is_grad_enabled():
            found = _differentiable_gradients(ctx, incoming, needs)
        else:
            arguments = (*(None if g is None else g.contiguous() for g in incoming), *ctx.saved_tensors, *ctx.options)
            if ctx.backend is None:
                grads = torch.ops.fastllm.log_probs_backward(*arguments, *needs)
            else:
                with same_backend(ctx.backend), invariance.mode_of(ctx.invariant):
                    grads = torch.ops.fastllm.log_probs_backward(*arguments, *needs)
            found = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return *found, None, None, None, None, None


def _differentiable_gradients(ctx, incoming: list[Tensor | None], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """By the definition, in PyTorch's differentiable operations."""
    _, input, weight, bias, target, temperature, top_ids = ctx.saved_tensors
    ignore_index, number, softcap = ctx.options
    names = [field for field, g in zip(DIFFERENTIABLE, incoming, strict=True) if g is not None]

    def definition(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        found = _definition(
            input,
            weight,
            bias,
            target,
            ignore_index,
            number if temperature is None else temperature,
            softcap,
            names,
            top_ids,
        )
        return tuple(found[name] for name in names)

    return differentiate(definition, (input, weight, bias), needs, tuple(g for g in incoming if g is not None))


def _definition(input, weight, bias, target, *arguments) -> dict[str, Tensor]:
    if weight is None:
        return eager.log_probs(input, target, *arguments)
    return eager.linear_log_probs(input, weight, target, bias, *arguments)


def apply(
    kernels: bool,
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
    check_target(op, input, target)
    per_token = isinstance(temperature, Tensor)
    if per_token:
        check_temperature(op, temperature, target)
    if top_ids is not None:
        check_top_ids(op, top_ids, target)
    asked = asked_fields(op, outputs, top_ids)
    names = [field for field, ask in zip(FIELDS, asked, strict=True) if ask]
    target = checked_indices(op, target)
    if not kernels:
        temperature = temperature.detach() if per_token else temperature
        if not torch.compiler.is_compiling() and is_concrete(target):
            classes = input.shape[-1] if weight is None else weight.shape[0]
            of_rows = (temperature.reshape(-1) if per_token else None, None if top_ids is None else as_rows(top_ids))
            check_values(op, target.reshape(-1), *of_rows, ignore_index, classes)
        return LogProbs(**_definition(input, weight, bias, target, ignore_index, temperature, softcap, names, top_ids))
    x = as_rows(input)
    found = LogProbsNode.apply(
        x if weight is not None or has_contiguous_rows(x) else x.contiguous(),
        weight,
        bias,
        target.reshape(-1),
        temperature.detach().to(accumulator(input.dtype)).reshape(-1) if per_token else None,
        None if top_ids is None else as_rows(top_ids).contiguous(),
        (ignore_index, 1.0 if per_token else temperature, softcap),
        asked,
    )
    shapes = [top_ids.shape if name == "top_log_prob" else target.shape for name in names]
    return LogProbs(**{name: r.reshape(shape) for name, r, shape in zip(names, found, shapes, strict=True)})


def check_target(op: str, input: Tensor, target: Tensor) -> None:
    check_device(op, "target", target, "input", input.device)
    if target.shape == input.shape[:-1]:
        return
    same_batch = input.dim() > 1 and target.dim() > 0 and target.shape[0] == input.shape[0]
    raise (RuntimeError if same_batch else ValueError)(
        f"{op}: target must be of input's shape without its last dimension, {list(input.shape[:-1])}, "
        f"got {list(target.shape)}"
    )


def check_temperature(op: str, temperature: Tensor, target: Tensor) -> None:
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


def check_top_ids(op: str, top_ids: Tensor, target: Tensor) -> None:
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


def asked_fields(op: str, outputs: tuple[str, ...], top_ids: Tensor | None) -> tuple[bool, ...]:
    """Of every field, whether it is asked for."""
    if not isinstance(outputs, (tuple, list)):
        raise TypeError(f"{op}: outputs must be a tuple of names, got {outputs!r}")
    for name in outputs:
        if name not in FIELDS:
            raise ValueError(f"{op}: outputs must be among {', '.join(map(repr, FIELDS))}, got {name!r}")
    if "top_log_prob" in outputs and top_ids is None:
        raise ValueError(f"{op}: outputs may name 'top_log_prob' only with top_ids, got top_ids=None")
    return tuple(field in outputs or (field == "top_log_prob" and top_ids is not None) for field in FIELDS)
