"""Every operation once: ours, PyTorch's definition, and inputs that between them use every option."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as TF
from helpers import DTYPES
from torch import Tensor

import fastllm.functional as F

# Every combination of options, as `make test-all` takes them; else as many as it takes to try every pair of values.
EVERYTHING = os.environ.get("FASTLLM_TESTS") == "all"


@dataclass
class Case:
    """``ours(*inputs)`` and ``reference(*inputs)``; inputs that require a gradient are differentiated."""

    op: str
    name: str
    ours: Callable
    reference: Callable
    inputs: list[Tensor | None]

    def __repr__(self) -> str:
        return f"{self.op}-{self.name}"


def combinations(*options: Iterable, dtype: torch.dtype, allowed: Callable = lambda *_: True) -> list[tuple]:
    """Combinations of options in which any two values of different options meet, if they ever may; others for each dtype.

    Most faults of options show where two of them meet; all combinations are many times as many.
    """
    every = [c for c in itertools.product(*options) if allowed(*c)]
    if EVERYTHING:
        return every
    pairs = {c: set(itertools.combinations(enumerate(c), 2)) for c in every}
    missing = set().union(*pairs.values())
    first = DTYPES.index(dtype) * len(every) // len(DTYPES)
    chosen = []
    while missing:
        chosen.append(max([*every[first:], *every[:first]], key=lambda c: len(pairs[c] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


def normal(*shape: int, dtype=torch.float32, scale: float = 1.0, grad: bool = True) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).requires_grad_(grad)


def like(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A constant of the case (weights, probabilities) in the dtype that x has in this run."""
    return None if t is None else t.to(x.dtype) if t.is_floating_point() else t


def capped(z: Tensor, cap: float | None) -> Tensor:
    return z if cap is None else cap * torch.tanh(z / cap)


def z_loss(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, s: float
) -> Tensor:
    """The z-loss by its formula: s logsumexp^2 of each counted row, reduced with the divisor of the mean."""
    squares = s * torch.logsumexp(logits, 1) ** 2
    if target.is_floating_point():
        counted, divisor = torch.ones_like(squares), squares.numel()
    else:
        counted = (target != ignore_index).to(squares.dtype)
        share = counted if weight is None else counted * weight[target.clamp(min=0)]
        divisor = share.sum()
    squares = squares * counted
    if reduction == "none":
        return squares
    return squares.sum() if reduction == "sum" else squares.sum() / divisor


def reference_cross_entropy(x, t, w=None, reduction="mean", ignore_index=-100, smoothing=0.0, s=0.0, cap=None):
    z = capped(x, cap)
    y = t if t.is_floating_point() else t.long()
    loss = TF.cross_entropy(z, y, w, reduction=reduction, ignore_index=ignore_index, label_smoothing=smoothing)
    return loss + z_loss(z, y, w, reduction, ignore_index, s) if s else loss


def mse_cases(dtype: torch.dtype) -> list[Case]:
    cases = []
    for shape, reduction, weighted in combinations(
        [(5,), (), (0,), (3, 17, 2), (129, 130)], ["none", "mean", "sum"], [False, True], dtype=dtype
    ):
        w = torch.rand(shape) + 0.1 if weighted else None
        cases.append(
            Case(
                "mse_loss",
                f"{shape}-{reduction}-{weighted}",
                lambda x, t, r=reduction, w=w: F.mse_loss(x, t, reduction=r, weight=like(w, x)),
                lambda x, t, r=reduction, w=w: (
                    TF.mse_loss(x, t, reduction=r) if w is None else _weighted_mse(x, t, like(w, x), r)
                ),
                [normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)],
            )
        )
    return cases


def _weighted_mse(x: Tensor, t: Tensor, w: Tensor, reduction: str) -> Tensor:
    squares = (x - t) ** 2 * w
    if reduction == "none":
        return squares
    return squares.sum() if reduction == "sum" else squares.sum() / w.sum()


def embedding_cases(dtype: torch.dtype) -> list[Case]:
    cases = []
    shapes = [((7,), 10, 3), ((4, 3), 5, 33), ((), 4, 8), ((0,), 3, 2), ((5000,), 40, 10), ((2, 900), 3, 130)]
    options = [(None, False), (2, False), (-1, True)]
    for (ids_shape, rows, features), (pad, freq), ids_dtype in combinations(
        shapes, options, [torch.int64, torch.int32], dtype=dtype
    ):
        ids = torch.randint(0, rows, ids_shape).to(ids_dtype)
        cases.append(
            Case(
                "embedding",
                f"{ids_shape}-{rows}x{features}-{pad}-{freq}-{ids_dtype}",
                lambda w, ids=ids, p=pad, f=freq: F.embedding(ids, w, p, scale_grad_by_freq=f),
                # PyTorch's CUDA kernel fails in backward of no ids.
                (lambda w, ids=ids, p=pad, f=freq: TF.embedding(ids, w, p, scale_grad_by_freq=f))
                if ids.numel()
                else (lambda w, ids=ids: w[ids.long()]),
                [normal(rows, features, dtype=dtype)],
            )
        )
    return cases


def linear_cases(dtype: torch.dtype) -> list[Case]:
    cases = []
    shapes = [(5,), (7, 10), (0, 4), (2, 3, 33), (300, 64), (64, 10), (600, 20)]
    for shape, n, bias in combinations(shapes, [1, 20, 130], [True, False], dtype=dtype):
        k = shape[-1]
        x, w = normal(*shape, dtype=dtype), normal(n, k, dtype=dtype, scale=k**-0.5)
        b = normal(n, dtype=dtype) if bias else None
        w2, b2 = normal(9, n, dtype=dtype, scale=n**-0.5), normal(9, dtype=dtype) if bias else None
        name = f"{shape}-{n}-{bias}"
        cases.append(
            Case("linear_relu", name, F.linear_relu, lambda x, w, b: torch.relu(TF.linear(x, w, b)), [x, w, b])
        )
        cases.append(
            Case(
                "relu_mlp",
                name,
                F.relu_mlp,
                lambda x, w, b, w2, b2: TF.linear(torch.relu(TF.linear(x, w, b)), w2, b2),
                [x, w, b, w2, b2],
            )
        )
    return cases


def _targets(kind: str, n: int, classes: int) -> Tensor:
    if kind == "probabilities":
        return torch.softmax(torch.randn(n, classes), 1)
    t = torch.randint(0, classes, (n,))
    if kind == "ignored" and n > 1:
        t[n // 2] = -100
    return t.int() if kind == "int32" else t


_REDUCTIONS = ["none", "mean", "sum"]
_LOSS_OPTIONS = [
    # smoothing, z-loss, softcap, weighted
    (0.0, 0.0, None, False),
    (0.1, 0.0, None, True),
    (0.0, 1e-2, None, True),
    (0.3, 1e-2, 5.0, False),
    (1.0, 0.0, 2.0, True),
]
# Nearly all logits at the cap. Not in float64: in this gradient PyTorch's float64, the truth, is as wrong as ours.
_AT_THE_CAP = (0.0, 0.0, 0.25, False)


def cross_entropy_cases(dtype: torch.dtype) -> list[Case]:
    cases = []
    kinds = ["indices", "ignored", "int32", "probabilities"]

    def allowed(classes, reduction, options, kind):
        return options is not _AT_THE_CAP or (kind == "indices" and dtype != torch.float64)

    for classes, reduction, (e, s, cap, weighted), kind in combinations(
        [2, 16, 33, 1025], _REDUCTIONS, [*_LOSS_OPTIONS, _AT_THE_CAP], kinds, dtype=dtype, allowed=allowed
    ):
        t = _targets(kind, 7, classes)
        w = torch.rand(classes) + 0.5 if weighted else None
        cases.append(
            Case(
                "cross_entropy",
                f"{classes}-{reduction}-{e}-{s}-{cap}-{weighted}-{kind}",
                lambda x, t=t, w=w, r=reduction, e=e, s=s, c=cap: F.cross_entropy(
                    x, like(t, x), like(w, x), reduction=r, label_smoothing=e, lse_square_scale=s, softcap=c
                ),
                lambda x, t=t, w=w, r=reduction, e=e, s=s, c=cap: reference_cross_entropy(
                    x, like(t, x), like(w, x), r, -100, e, s, c
                ),
                [normal(7, classes, dtype=dtype, scale=3)],
            )
        )
    return cases


def linear_cross_entropy_cases(dtype: torch.dtype) -> list[Case]:
    cases = []
    shapes, kinds = [(7, 5, 11), (70, 40, 300)], ["ignored", "probabilities"]
    for (n, d, v), reduction, (e, s, cap, weighted), kind, bias in combinations(
        shapes, _REDUCTIONS, _LOSS_OPTIONS, kinds, [True, False], dtype=dtype
    ):
        t = _targets(kind, n, v)
        cw = torch.rand(v) + 0.5 if weighted else None
        cases.append(
            Case(
                "linear_cross_entropy",
                f"{n}x{d}x{v}-{reduction}-{e}-{s}-{cap}-{weighted}-{kind}-{bias}",
                lambda x, w, b, t=t, cw=cw, r=reduction, e=e, s=s, c=cap: F.linear_cross_entropy(
                    x,
                    w,
                    like(t, x),
                    linear_bias=b,
                    weight=like(cw, x),
                    reduction=r,
                    label_smoothing=e,
                    lse_square_scale=s,
                    softcap=c,
                ),
                lambda x, w, b, t=t, cw=cw, r=reduction, e=e, s=s, c=cap: reference_cross_entropy(
                    TF.linear(x, w, b), like(t, x), like(cw, x), r, -100, e, s, c
                ),
                [
                    normal(n, d, dtype=dtype),
                    normal(v, d, dtype=dtype, scale=2 * d**-0.5),
                    normal(v, dtype=dtype) if bias else None,
                ],
            )
        )
    return cases


ALL = {
    "mse_loss": mse_cases,
    "embedding": embedding_cases,
    "linear": linear_cases,
    "cross_entropy": cross_entropy_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
}


def cases_of(op: str, dtype: torch.dtype) -> list[Case]:
    torch.manual_seed(0)
    family = "linear" if op in ("linear_relu", "relu_mlp") else op
    return [case for case in ALL[family](dtype) if case.op == op]


def small_cases(dtype: torch.dtype = torch.float64) -> list[Case]:
    """A few cases of every operation, for checks that are slow."""
    torch.manual_seed(0)
    x, t = normal(3, 4, dtype=dtype), normal(3, 4, dtype=dtype)
    ids = torch.tensor([[1, 4, 1], [0, 2, 4]])
    y = torch.tensor([1, -100, 4])
    q = torch.softmax(torch.randn(3, 5), 1)
    cw = torch.rand(5) + 0.5
    logits = normal(3, 5, dtype=dtype)
    image, labels = normal(2, 5, 3, dtype=dtype), torch.tensor([[0, 1, -100], [4, 3, 2]])
    w1, b1, w2, b2 = (normal(*s, dtype=dtype) for s in [(6, 4), (6,), (2, 6), (2,)])
    lw, lb = normal(5, 4, dtype=dtype), normal(5, dtype=dtype)
    cases = []
    for r in ("none", "mean", "sum"):
        cases += [
            Case("mse_loss", r, lambda a, b, r=r: F.mse_loss(a, b, reduction=r), None, [x, t]),
            Case(
                "cross_entropy",
                f"indices-{r}",
                lambda a, r=r: F.cross_entropy(
                    a, y, like(cw, a), reduction=r, label_smoothing=0.1, lse_square_scale=0.1, softcap=3.0
                ),
                None,
                [logits],
            ),
            Case(
                "cross_entropy",
                f"probabilities-{r}",
                lambda a, r=r: F.cross_entropy(a, like(q, a), like(cw, a), reduction=r, lse_square_scale=0.1),
                None,
                [logits],
            ),
            Case(
                "cross_entropy",
                f"spatial-{r}",
                lambda a, r=r: F.cross_entropy(a, labels, reduction=r),
                None,
                [image],
            ),
            Case(
                "linear_cross_entropy",
                r,
                lambda a, w, b, r=r: F.linear_cross_entropy(a, w, y, linear_bias=b, reduction=r, label_smoothing=0.1),
                None,
                [x, lw, lb],
            ),
        ]
    cases += [
        Case(
            "mse_loss",
            "weight",
            lambda a, b: F.mse_loss(a, b, weight=torch.ones_like(a).detach() * 0.3),
            None,
            [x, t],
        ),
        Case("embedding", "plain", lambda w: F.embedding(ids, w), None, [lw]),
        Case("linear_relu", "bias", F.linear_relu, None, [x, w1, b1]),
        Case("linear_relu", "no bias", lambda a, w: F.linear_relu(a, w), None, [x, w1]),
        Case("relu_mlp", "bias", F.relu_mlp, None, [x, w1, b1, w2, b2]),
        Case("relu_mlp", "no bias", lambda a, w, v: F.relu_mlp(a, w, None, v, None), None, [x, w1, w2]),
    ]
    return cases


def plain_calls() -> Iterator[tuple]:
    """Every registered operation with arguments for one call."""
    x, t, w = torch.randn(3, 4), torch.randn(3, 4), torch.rand(3, 4)
    ids, y = torch.tensor([1, 4, 0]), torch.tensor([1, -100, 4])
    logits, cw = torch.randn(3, 5), torch.rand(5)
    w1, b1, w2, b2 = torch.randn(6, 4), torch.randn(6), torch.randn(2, 6), torch.randn(2)
    head, hb = torch.randn(5, 4), torch.randn(5)
    ops = torch.ops.fastllm
    grad = lambda t: t.clone().requires_grad_()  # noqa: E731
    loss = (-100, 0.1, 0.01, 3.0)
    z = 3 * torch.tanh(logits / 3)
    softmax = torch.stack([z.amax(1), (z - z.amax(1, keepdim=True)).exp().sum(1).log()])
    for reduction in (0, 1, 2):
        g = torch.randn(3) if reduction == 0 else torch.tensor(1.5)
        yield ops.mse_loss, (grad(x), grad(t), None, reduction)
        yield ops.mse_loss, (grad(x), t.t().contiguous().t(), w, reduction)
        yield ops.mse_loss_forward, (x, t, w, reduction, True)
        yield ops.mse_loss_backward, (torch.randn(3, 4) if reduction == 0 else g, x, t, None, reduction)
        yield ops.cross_entropy, (grad(logits), y, cw, reduction, *loss, False)
        yield (
            ops.cross_entropy,
            (grad(torch.randn(2, 5, 3)), torch.tensor([[1, 2, 0]] * 2), None, reduction, *loss, False),
        )
        yield ops.cross_entropy_forward, (logits, y, cw, reduction, *loss, True)
        yield ops.cross_entropy_backward, (g, logits, y, cw, softmax, reduction, *loss)
        yield ops.cross_entropy_backward_, (g, logits.clone(), y, cw, softmax, reduction, *loss)
        yield ops.linear_cross_entropy, (grad(x), grad(head), y, grad(hb), cw, reduction, *loss, False)
        yield ops.linear_cross_entropy_forward, (x, head, y, hb, cw, reduction, *loss, True, True, True)
        yield ops.linear_cross_entropy_backward, (g, x, head, y, None, None, reduction, *loss, True, False, True)
        if reduction != 0:  # a gradient that forward has formed
            yield ops.cross_entropy_correct_, (g, logits, y, cw, softmax, reduction, *loss, torch.randn(3, 5))
            yield ops.mse_loss_correct_, (g, x, t, None, reduction, torch.randn(3, 4))
            yield ops.linear_cross_entropy_scale_, (g, torch.randn(5, 4))
    tops, row = torch.tensor([[0, 4], [9, 9], [4, 4]]), torch.rand(3) + 0.5
    for temperature, places in ((None, None), (row, tops)):
        rows = (logits, y, temperature, places, -100, 1.0, 3.0)
        yield ops.log_probs_rows_forward, (*rows, [True] * 6 + [places is not None])
        incoming = (row, row, None, None if places is None else torch.rand(3, 2))
        yield ops.log_probs_rows_backward_, (*incoming, torch.rand(3, 3), *rows, torch.randn(3, 5))
    yield ops.embedding, (ids, grad(head), -1, False, False)
    yield ops.embedding, (ids.view(1, 3), grad(head), 2, True, False)
    yield ops.embedding_forward, (head, ids)
    yield ops.embedding_backward, (torch.randn(3, 4), ids, 5, 1, True)
    yield ops.linear_relu, (grad(x), grad(w1), grad(b1))
    yield ops.linear_relu, (grad(torch.randn(2, 3, 4)), grad(w1), None)
    yield ops.linear_relu_forward, (x, w1, b1)
    yield ops.linear_relu_backward, (torch.randn(3, 6), torch.randn(3, 6), x, w1, True, True, True)
    yield ops.relu_mlp, (grad(x), grad(w1), grad(b1), grad(w2), grad(b2))
    yield ops.relu_mlp_forward, (x, w1, None, w2, b2)
    yield ops.relu_mlp_backward, (torch.randn(3, 2), torch.randn(3, 6), x, w1, w2, True, True, True, True, False)
