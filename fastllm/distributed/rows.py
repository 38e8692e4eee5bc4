r"""Rows of logits whose classes are cut over processes: their statistics, and their gradient.

Every process walks its own part of each row and keeps a few numbers of it: the maximum :math:`m_r`, the sum of
:math:`e^{z - m_r}`, what belongs to the target. One collective hands all of them to everyone; every process then combines
the same numbers in the same order, so that results are the same bits everywhere. With :math:`M = \max_r m_r` and
:math:`T = \log\sum_r e^{m_r - M} \sum_c e^{z_c - m_r}`, the log-probability of a class is :math:`z_c - M - T`.

M and T are saved; backward makes a chunk's logits again and needs nobody for their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as TF

from fastllm.distributed.shard import Shard
from fastllm.operations.chunks import WORKSPACE, chunk_rows
from fastllm.operations.declaration import accumulator

LEAST = -1e4  # stands for log p of -inf: exp() of it is 0, and 0 times it is 0


class Rows:
    """This process's logits, a chunk of rows at a time, in the dtype of sums.

    Parameters
    ----------
    input, weight, bias : Tensor
        ``(N, D)``, ``(V_local, D)`` and ``(V_local,)``; without ``weight``, ``input`` holds logits ``(N, V_local)``.
    target : Tensor
        ``(N,)`` class indices, or None for class probabilities.
    temperature : Tensor, float or None
        ``(N,)``, or one number.
    """

    def __init__(
        self,
        shard: Shard,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        target: Tensor | None,
        ignore_index: int,
        softcap: float | None,
        temperature: Tensor | float | None = None,
    ) -> None:
        self.shard, self.input, self.weight = shard, input, weight
        self.softcap, self.temperature = softcap, temperature
        self.count = input.shape[0]
        self.dtype = accumulator(input.dtype)
        if weight is not None:
            self.product_dtype = _product_dtype(input)
            self.factor = weight.to(self.product_dtype)
            self.added = None if bias is None else bias.to(self.product_dtype)
        self.ignored = None
        if target is not None:
            self.ignored = target == ignore_index
            self.mine, self.place = shard.here(target.masked_fill(self.ignored, -1))
        item = self.dtype.itemsize
        step = chunk_rows(self.count, shard.size, item, WORKSPACE)
        self.parts = [slice(k, k + step) for k in range(0, self.count if shard.size else 0, step)]

    def logits(self, part: slice) -> tuple[Tensor, Tensor | None]:
        """``z`` of a chunk, and ``x / softcap``. Without a weight ``z`` may be the caller's memory."""
        x = self.input[part]
        if self.weight is not None:
            x = TF.linear(x.to(self.product_dtype), self.factor, self.added).to(x.dtype)
        z, ratio = x.to(self.dtype), None
        if self.softcap is not None:
            ratio = z / self.softcap
            z = ratio.tanh() * self.softcap
        divisor = self.divisor(part)
        return (z if divisor is None else z / divisor), ratio

    def divisor(self, part: slice) -> Tensor | float | None:
        if isinstance(self.temperature, Tensor):
            return self.temperature[part].to(self.dtype)[:, None]
        return None if self.temperature in (None, 1.0) else self.temperature

    def masked_(self, values: Tensor, part: slice | None = None) -> Tensor:
        """0 in the rows that do not count."""
        if self.ignored is None:
            return values
        ignored = self.ignored if part is None else self.ignored[part]
        return values.masked_fill_(ignored if values.dim() == 1 else ignored[:, None], 0)

    # --- statistics

    def statistics(
        self,
        spread: Callable[[slice], Tensor] | None = None,
        of_target: Tensor | None = None,
        top_ids: Tensor | None = None,
        moments: bool = False,
    ) -> Statistics:
        """Of every row, over all processes: one collective.

        Parameters
        ----------
        spread : callable, optional
            Of a chunk, the weights ``(n or 1, V_local)`` of a sum over all classes.
        of_target : Tensor, optional
            ``(N,)``, something else that the target's process knows.
        top_ids : Tensor, optional
            ``(N, K)`` ids whose logits are wanted.
        moments : bool
            Whether argmax, entropy, mean and the sum of squares are wanted.
        """
        tops = 0 if top_ids is None else top_ids.shape[1]
        names = ["largest", "others", "target"]
        names += ["of_target"] if of_target is not None else []
        names += ["spread", "spread_sum"] if spread is not None else []
        names += ["argmax", "entropy", "sum", "squares"] if moments else []
        own = self.input.new_zeros((len(names) + tops, self.count), dtype=self.dtype)
        table = dict(zip(names, own, strict=False))
        table["largest"].fill_(-torch.inf)
        table["others"].fill_(-1)  # 1 + others is 0: a part without classes
        if of_target is not None:
            table["of_target"].copy_(torch.where(self.mine, of_target, 0))
        for part in self.parts:
            z = self.logits(part)[0]
            largest, argmax = z.max(1)
            # A part of -inf alone is nothing beside others; its maximum may not be subtracted.
            empty = largest == -torch.inf
            reference = largest.masked_fill(empty, 0)
            below = z - reference[:, None]
            exponential = below.exp() if moments or spread is not None else below.exp_()
            exponential.scatter_(1, argmax[:, None], 0.0)
            table["largest"][part] = largest
            table["others"][part] = exponential.sum(1).masked_fill_(empty, -1)
            if self.ignored is not None:
                at_target = z.gather(1, self.place[part, None])[:, 0]
                table["target"][part] = torch.where(self.mine[part], at_target, 0)
            if spread is not None:
                weights = spread(part)
                table["spread"][part] = (below * weights).sum(1)
                table["spread_sum"][part] = weights.sum(1)
            if tops:
                mine, place = self.shard.here(top_ids[part])
                own[len(names) :, part] = torch.where(mine, z.gather(1, place), 0).t()
            if moments:
                table["argmax"][part] = _as_numbers(argmax + self.shard.start, self.dtype)
                table["entropy"][part] = (exponential * below.clamp(min=LEAST)).sum(1)
                table["sum"][part] = z.sum(1)
                table["squares"][part] = exponential.square_().sum(1)
        parts = self.shard.gather(own)
        found = dict(zip(names, parts.unbind(1), strict=False))
        return _combined(found, parts[:, len(names) :].sum(0).t() if tops else None)

    # --- gradients

    def gradients(
        self,
        of_chunk: Callable[[slice, Tensor], Tensor],
        needs: tuple[bool, bool, bool],
        out: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of input, weight and bias. ``of_chunk(part, z)`` gives the gradient of ``z``, in a tensor of its own.

        The input's, to which every process adds its classes, costs one collective. ``out`` takes that of logits.
        """
        need_input, need_weight, need_bias = needs
        linear = self.weight is not None
        grad_input = out
        if need_input and out is None:
            dtype = self.dtype if linear else self.input.dtype
            grad_input = torch.zeros_like(self.input, dtype=dtype, memory_format=torch.contiguous_format)
        grad_weight = self.weight.new_zeros(self.weight.shape, dtype=self.dtype) if need_weight else None
        grad_bias = self.weight.new_zeros(self.shard.size, dtype=self.dtype) if need_bias else None
        for part in self.parts if any(needs) else []:
            z, ratio = self.logits(part)
            grad = of_chunk(part, z)
            divisor = self.divisor(part)
            if divisor is not None:
                grad.div_(divisor)
            if ratio is not None:
                grad.mul_(ratio.cosh_().square_().reciprocal_())  # 1 - tanh^2, without its rounding near the cap
            self.masked_(grad, part)
            if not linear:
                grad_input[part] = grad
                continue
            if need_bias:
                grad_bias += grad.sum(0)
            grad = grad.to(self.input.dtype).to(self.product_dtype)
            if need_input:
                grad_input[part] = grad @ self.factor
            if need_weight:
                rows = self.input[part].to(self.product_dtype)
                if self.ignored is not None:  # an ignored row may hold NaN
                    rows = rows.masked_fill(self.ignored[part, None], 0)
                if grad.dtype == self.dtype:
                    grad_weight.addmm_(grad.t(), rows)
                else:
                    grad_weight += grad.t() @ rows
        if linear and need_input:
            self.shard.sum_(grad_input)
        dtype = self.input.dtype
        return tuple(None if grad is None else grad.to(dtype) for grad in (grad_input, grad_weight, grad_bias))


def _product_dtype(tensor: Tensor) -> torch.dtype:
    """That of copies to multiply: float32 where the processor has no instructions for a lower precision."""
    if not tensor.is_cpu or tensor.dtype not in (torch.bfloat16, torch.float16):
        return tensor.dtype
    bfloat16 = tensor.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    return tensor.dtype if bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def _as_numbers(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Ids as bits of floating-point numbers, to travel beside these."""
    return ids.view(dtype) if dtype == torch.float64 else ids.to(torch.int32).view(dtype)


def _as_ids(numbers: Tensor) -> Tensor:
    numbers = numbers.contiguous()
    return numbers.view(torch.int64) if numbers.dtype == torch.float64 else numbers.view(torch.int32).long()


def lse_of(largest: Tensor, tail: Tensor) -> Tensor:
    """M + T; of a row without a softmax, M."""
    return torch.where(largest.isinf(), largest, largest + tail)


@dataclass
class Statistics:
    """Of every row, over all processes."""

    largest: Tensor  # M
    tail: Tensor  # T
    target: Tensor  # z of the target
    of_target: Tensor | None
    spread: Tensor | None  # the weighted sum of log p
    spread_sum: Tensor | None  # the sum of the weights
    argmax: Tensor | None
    entropy: Tensor | None
    sum: Tensor | None  # of z
    log_sum_squares: Tensor | None  # log of the sum of p^2
    top: Tensor | None  # (N, K) z of top_ids

    def log_p(self, z: Tensor) -> Tensor:
        """Of logits ``(N,)`` or ``(N, K)``. M is subtracted first: the sum M + T would round small tails off."""
        if z.dim() == 2:
            return (z - self.largest[:, None]) - self.tail[:, None]
        return (z - self.largest) - self.tail

    @property
    def lse(self) -> Tensor:
        return lse_of(self.largest, self.tail)


def _combined(found: dict[str, Tensor], top: Tensor | None) -> Statistics:
    """From the numbers ``(processes, N)``."""
    parts, others = found["largest"], found["others"]
    largest = parts.amax(0)
    scale = (parts - largest).exp()
    # The maximum counts as 1, and only what is beside it is added to it: log1p keeps small tails.
    holds = parts == largest
    if "argmax" in found:
        ids = _as_ids(found["argmax"])
        argmax = torch.where(holds | parts.isnan(), ids, torch.iinfo(torch.int64).max).amin(0)
    first = holds & (holds.cumsum(0) == 1)
    beside = torch.where(first, others, (1 + others) * scale).sum(0)
    beside = beside.masked_fill(largest.isinf(), torch.nan)  # such a row has no softmax
    tail = beside.log1p()
    statistics = Statistics(largest, tail, found["target"].sum(0), *[None] * 7, top)
    if "of_target" in found:
        statistics.of_target = found["of_target"].sum(0)
    if "spread" in found:
        # Each part was taken against its own maximum, or against 0 where that is -inf.
        shift = torch.where(parts == -torch.inf, 0, parts) - largest
        statistics.spread_sum = found["spread_sum"].sum(0)
        statistics.spread = (found["spread"] + shift * found["spread_sum"]).sum(0) - tail * statistics.spread_sum
    if "argmax" in found:
        statistics.argmax = argmax
        below = (parts - largest).clamp(min=LEAST)
        sums = (scale * (found["entropy"] + below * (1 + others))).sum(0)
        statistics.entropy = tail - sums / (1 + beside)
        statistics.sum = found["sum"].sum(0)
        squares = torch.where(first, found["squares"], (1 + found["squares"]) * scale.square())
        statistics.log_sum_squares = squares.sum(0).log1p() - 2 * tail
    return statistics
