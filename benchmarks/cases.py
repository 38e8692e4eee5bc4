"""What is timed: named shapes, ours and eager PyTorch, the floor in bytes or FLOPs, and the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as TF
from torch import Tensor

import fastllm.functional as F
from fastllm.models import MLPLanguageModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Case:
    """One row of the table: forward and backward of ``ours`` against ``eager`` on the same leaves.

    ``bytes`` and ``flops`` are the least that the computation must move through memory and multiply: every input read
    once, every result written once; 2 M N K a product.
    """

    op: str
    shape: str
    dtype: str
    eager: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    leaves: list[Tensor]
    target: float | None  # ratio of eager's time to ours that was aimed at
    bytes: int = 0
    flops: int = 0
    repeats: int = 10
    reset: Callable[[], None] | None = None  # restores what a variant overwrites
    peers: dict[str, Callable[[], Tensor]] = field(default_factory=dict)  # further variants
    incoming: Tensor | None = None  # the incoming gradient, where the output is not a scalar

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {self.dtype}"


def zipf(count: int, vocabulary: int) -> Tensor:
    """Ids drawn with probability 1 / rank, the frequencies of words."""
    weights = 1.0 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    return torch.multinomial(weights, count, replacement=True)


def _leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


def cross_entropy(n: int, v: int, dtype: str, target: float | None, in_place: bool = False) -> Case:
    x, y = _leaf(n, v, dtype=DTYPES[dtype]), torch.randint(0, v, (n,))
    initial = x.detach().clone() if in_place else None
    return Case(
        "cross_entropy" + (" in place" if in_place else ""),
        f"{n} x {v}",
        dtype,
        lambda: TF.cross_entropy(x, y),
        lambda: F.cross_entropy(x, y, inplace_backward=in_place),
        [x],
        target,
        bytes=2 * n * v * x.element_size(),  # logits read, gradient written
        repeats=7 if n * v > 10**7 else 200,
        reset=(lambda: x.data.copy_(initial)) if in_place else None,
    )


def linear_cross_entropy(n: int, d: int, v: int, dtype: str, target: float | None) -> Case:
    x, w = _leaf(n, d, dtype=DTYPES[dtype]), _leaf(v, d, dtype=DTYPES[dtype], scale=d**-0.5)
    y = torch.randint(0, v, (n,))
    own = getattr(TF, "linear_cross_entropy", None)  # PyTorch 2.13's, in chunks of its own choice
    peers = {} if own is None else {"torch's own": lambda: own(x, w, y)}
    return Case(
        "linear_cross_entropy",
        f"{n}, {d} -> {v}",
        dtype,
        lambda: TF.cross_entropy(TF.linear(x, w), y),
        lambda: F.linear_cross_entropy(x, w, y),
        [x, w],
        target,
        flops=6 * n * d * v,  # three products
        repeats=3,
        peers=peers,
    )


def mse_loss(n: int, dtype: str, target: float | None) -> Case:
    x, t = _leaf(n, dtype=DTYPES[dtype]), torch.randn(n).to(DTYPES[dtype])
    return Case(
        "mse_loss",
        f"{n}",
        dtype,
        lambda: TF.mse_loss(x, t),
        lambda: F.mse_loss(x, t),
        [x],
        target,
        bytes=3 * n * x.element_size(),  # two read, one written
        repeats=12,
    )


def embedding(n: int, v: int, d: int, dtype: str, target: float | None, ids: str = "zipf") -> Case:
    w = _leaf(v, d, dtype=DTYPES[dtype])
    i = zipf(n, v) if ids == "zipf" else torch.randint(0, v, (n,))
    return Case(
        f"embedding {ids}",
        f"{n} of {v} x {d}",
        dtype,
        lambda: TF.embedding(i, w),
        lambda: F.embedding(i, w),
        [w],
        target,
        bytes=(3 * n * d + v * d) * w.element_size(),  # rows gathered, their gradients read, the table written
        incoming=torch.randn(n, d),
        repeats=12 if v * d > 10**6 else 300,
    )


def linear_relu(m: int, k: int, n: int, dtype: str, target: float | None) -> Case:
    t = DTYPES[dtype]
    x, w, b = _leaf(m, k, dtype=t), _leaf(n, k, dtype=t, scale=k**-0.5), _leaf(n, dtype=t)
    return Case(
        "linear_relu",
        f"{m}, {k} -> {n}",
        dtype,
        lambda: torch.relu(TF.linear(x, w, b)),
        lambda: F.linear_relu(x, w, b),
        [x, w, b],
        target,
        flops=6 * m * k * n,
        incoming=torch.randn(m, n),
        repeats=6 if m * k * n > 10**8 else 500,
    )


def relu_mlp(m: int, k: int, h: int, dtype: str, target: float | None) -> Case:
    t = DTYPES[dtype]
    x, w1, b1 = _leaf(m, k, dtype=t), _leaf(h, k, dtype=t, scale=k**-0.5), _leaf(h, dtype=t)
    w2, b2 = _leaf(k, h, dtype=t, scale=h**-0.5), _leaf(k, dtype=t)
    return Case(
        "relu_mlp",
        f"{m}, {k} -> {h} -> {k}",
        dtype,
        lambda: TF.linear(torch.relu(TF.linear(x, w1, b1)), w2, b2),
        lambda: F.relu_mlp(x, w1, b1, w2, b2),
        [x, w1, b1, w2, b2],
        target,
        flops=12 * m * k * h,
        incoming=torch.randn(m, k),
        repeats=5,
    )


def small_model(batch: int, target: float | None) -> Case:
    """Vocabulary 1000, embedding 10, hidden 20: forward and backward of the model's loss."""
    model = MLPLanguageModel(1000, 10, 20)
    ids, y = torch.randint(0, 1000, (batch,)), torch.randint(0, 1000, (batch,))
    table, layer, head = model.embedding.weight, model.hidden[0], model.output

    def eager() -> Tensor:
        hidden = torch.relu(TF.linear(TF.embedding(ids, table), layer.weight, layer.bias))
        return TF.cross_entropy(TF.linear(hidden, head.weight, head.bias), y)

    return Case(
        "small model",
        f"batch {batch}",
        "fp32",
        eager,
        lambda: model.loss(ids, y),
        list(model.parameters()),
        target,
        flops=6 * batch * (10 * 20 + 20 * 1000),
        repeats=400 if batch < 1000 else 150,
    )


# Constructors, so that a case's tensors live only while it runs.
Constructors = list[tuple[str, Callable[[], Case]]]
CPU_CASES: Constructors = [
    ("cross_entropy", lambda: cross_entropy(2048, 50257, "fp32", 5.5)),
    ("cross_entropy", lambda: cross_entropy(2048, 50257, "fp32", 10.0, in_place=True)),
    ("cross_entropy", lambda: cross_entropy(2048, 50257, "bf16", 5.5)),
    ("cross_entropy", lambda: cross_entropy(2048, 50257, "bf16", 8.0, in_place=True)),
    ("cross_entropy", lambda: cross_entropy(2048, 1000, "fp32", None)),
    ("linear_cross_entropy", lambda: linear_cross_entropy(2048, 768, 50257, "fp32", 1.35)),
    ("linear_cross_entropy", lambda: linear_cross_entropy(2048, 768, 50257, "bf16", 2.0)),
    ("mse_loss", lambda: mse_loss(2**24, "fp32", 6.0)),
    ("mse_loss", lambda: mse_loss(2**24, "bf16", 10.0)),
    ("embedding", lambda: embedding(16384, 50257, 768, "fp32", 2.5)),
    ("embedding", lambda: embedding(16384, 50257, 768, "fp32", 2.5, "uniform")),
    ("embedding", lambda: embedding(16384, 50257, 768, "bf16", 2.5)),
    ("embedding", lambda: embedding(16384, 1000, 10, "fp32", 6.0)),
    ("embedding", lambda: embedding(32, 1000, 10, "fp32", None)),
    ("linear_relu", lambda: linear_relu(64, 10, 20, "fp32", 1.4)),
    ("linear_relu", lambda: linear_relu(2048, 1024, 4096, "fp32", 1.03)),
    ("linear_relu", lambda: linear_relu(2048, 1024, 4096, "bf16", 1.10)),
    ("relu_mlp", lambda: relu_mlp(2048, 1024, 4096, "fp32", None)),
    ("relu_mlp", lambda: relu_mlp(2048, 1024, 4096, "bf16", 1.08)),
    ("model", lambda: small_model(32, 1.75)),
    ("model", lambda: small_model(128, 2.0)),
    ("model", lambda: small_model(1024, 2.5)),
]

# Shapes of GPT-2 (768, 50257), Llama (4096, 14336, 128256) and Gemma (vocabulary 262144).
CUDA_CASES: Constructors = [
    ("cross_entropy", lambda: cross_entropy(8192, 50257, "bf16", None)),
    ("cross_entropy", lambda: cross_entropy(8192, 128256, "bf16", 3.5)),
    ("cross_entropy", lambda: cross_entropy(8192, 128256, "fp32", 3.5)),
    ("cross_entropy", lambda: cross_entropy(4096, 262144, "bf16", 3.2)),
    ("linear_cross_entropy", lambda: linear_cross_entropy(8192, 4096, 128256, "bf16", 1.08)),
    ("linear_cross_entropy", lambda: linear_cross_entropy(8192, 768, 50257, "bf16", None)),
    ("mse_loss", lambda: mse_loss(2**28, "fp32", 2.1)),
    ("mse_loss", lambda: mse_loss(2**28, "bf16", 2.1)),
    ("embedding", lambda: embedding(16384, 128256, 4096, "bf16", 1.4)),
    ("embedding", lambda: embedding(16384, 128256, 4096, "bf16", 1.4, "uniform")),
    ("linear_relu", lambda: linear_relu(8192, 768, 3072, "bf16", 1.12)),
    ("linear_relu", lambda: linear_relu(8192, 4096, 16384, "bf16", 1.03)),
    ("relu_mlp", lambda: relu_mlp(8192, 768, 3072, "bf16", 1.15)),
    ("relu_mlp", lambda: relu_mlp(8192, 4096, 16384, "bf16", 1.035)),
    ("model", lambda: small_model(128, None)),
]
CASES = {"cpu": CPU_CASES, "cuda": CUDA_CASES}
