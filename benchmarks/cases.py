"""What is timed: named shapes, ours and eager PyTorch, the floor in bytes or FLOPs, and the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as TF
from torch import Tensor

import fastllm.functional as F
from fastllm.models import MLPLanguageModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Sizes(NamedTuple):
    """Embedding D, hidden layer H and vocabulary V of a model."""

    d: int
    h: int
    v: int


SHAPES = {
    "small": Sizes(10, 20, 1000),
    "gpt2": Sizes(768, 3072, 50257),
    "llama": Sizes(4096, 14336, 128256),
    "gemma": Sizes(1152, 6912, 262144),
    "qwen": Sizes(4096, 12288, 151936),
    "aim": Sizes(1024, 4096, 16384),  # no model's: the shapes for which a target was set
}


@dataclass
class Case:
    """One row of the table: forward and backward of ``ours`` against ``eager`` on the same arguments.

    ``bytes`` and ``flops`` are the least that the computation must move through memory and multiply: every input read
    once, every result written once; 2 M N K a product.
    """

    op: str
    shape: str
    dtype: str
    eager: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    leaves: list[Tensor]
    bytes: int = 0
    flops: int = 0
    repeats: int = 10  # at most
    reset: Callable[[], None] | None = None  # restores what a variant overwrites
    incoming: Tensor | None = None  # the incoming gradient, where the output is not a scalar
    floor: Callable[[], Callable[[], None]] | None = None  # makes what nobody can save, in memory that it holds


@dataclass(frozen=True)
class Entry:
    """A case to be: its tensors live only while it runs."""

    make: Callable[..., Case]
    named: str  # of SHAPES
    dtype: str
    n: int  # rows, or ids
    aim: float | None = None  # ratio of eager's time to ours that was aimed at
    quick: bool = False  # part of --quick
    options: dict = field(default_factory=dict)

    @property
    def op(self) -> str:
        return self.make.__name__

    @property
    def name(self) -> str:
        return " ".join([self.op, *map(str, self.options.values()), self.named, str(self.n), self.dtype])

    def case(self, rows: int | None = None, sizes: Sizes | None = None) -> Case:
        """The case; with ``rows`` or ``sizes``, a smaller one of the same kind."""
        return self.make(rows or self.n, sizes or SHAPES[self.named], self.dtype, **self.options)


def zipf(count: int, vocabulary: int) -> Tensor:
    """Ids drawn with probability 1 / rank, the frequencies of words."""
    weights = 1.0 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    return torch.multinomial(weights, count, replacement=True)


def normal(*shape: int, dtype: str, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype]).normal_(0, scale)


def leaf(*shape: int, dtype: str, scale: float = 1.0) -> Tensor:
    return normal(*shape, dtype=dtype, scale=scale).requires_grad_()


class AsResult(torch.autograd.Function):
    """A leaf's memory as an intermediate result, which may be overwritten: without a copy that would be timed."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def cross_entropy_in_place(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(AsResult.apply(x), y, inplace_backward=True)


def cross_entropy(n: int, sizes: Sizes, dtype: str, place: str = "") -> Case:
    """``place="in place"``: the gradient may overwrite the logits."""
    v = sizes.v
    x, y = leaf(n, v, dtype=dtype), torch.randint(0, v, (n,))
    in_place = place == "in place"
    initial = x.detach().clone() if in_place else None
    return Case(
        f"cross_entropy {place}".strip(),
        f"{n} x {v}",
        dtype,
        TF.cross_entropy,
        cross_entropy_in_place if in_place else F.cross_entropy,
        (x, y),
        [x],
        bytes=2 * n * v * x.element_size(),  # logits read, gradient written
        repeats=12 if n * v > 10**7 else 200,
        reset=(lambda: x.data.copy_(initial)) if in_place else None,
    )


def linear_cross_entropy(n: int, sizes: Sizes, dtype: str) -> Case:
    # The small model's loss comes after its hidden layer; elsewhere the trunk is D wide.
    d, v = sizes.h if sizes is SHAPES["small"] else sizes.d, sizes.v
    x, w = leaf(n, d, dtype=dtype), leaf(v, d, dtype=dtype, scale=d**-0.5)

    def floor() -> Callable[[], None]:
        """The three products, of all rows at once."""
        a, b = x.detach(), w.detach()
        logits, grad_a, grad_b = a.new_empty(n, v), torch.empty_like(a), torch.empty_like(b)

        def products() -> None:
            torch.mm(a, b.T, out=logits)
            torch.mm(logits, b, out=grad_a)
            torch.mm(logits.T, a, out=grad_b)

        return products

    return Case(
        "linear_cross_entropy",
        f"{n}, {d} -> {v}",
        dtype,
        lambda x, w, y: TF.cross_entropy(TF.linear(x, w), y),
        F.linear_cross_entropy,
        (x, w, torch.randint(0, v, (n,))),
        [x, w],
        flops=6 * n * d * v,  # logits, and the gradients of input and weight: three products
        repeats=5 if n * d * v > 10**9 else 100,
        floor=floor,
    )


def _log_prob_and_entropy(found: F.LogProbs) -> Tensor:
    return found.log_prob + found.entropy


def _eager_log_prob_and_entropy(logits: Tensor, y: Tensor) -> Tensor:
    log_p = TF.log_softmax(logits, -1, dtype=torch.float32)
    return log_p.gather(-1, y[:, None])[:, 0] - (log_p.exp() * log_p).sum(-1)


def log_probs(n: int, sizes: Sizes, dtype: str) -> Case:
    """Log probability of the target, and entropy."""
    v = sizes.v
    x, y = leaf(n, v, dtype=dtype), torch.randint(0, v, (n,))
    return Case(
        "log_probs",
        f"{n} x {v}",
        dtype,
        _eager_log_prob_and_entropy,
        lambda x, y: _log_prob_and_entropy(F.log_probs(x, y, outputs=("log_prob", "entropy"))),
        (x, y),
        [x],
        bytes=3 * n * v * x.element_size(),  # logits read in forward and in backward, gradient written
        incoming=normal(n, dtype="fp32"),
        repeats=12 if n * v > 10**7 else 200,
    )


def linear_log_probs(n: int, sizes: Sizes, dtype: str) -> Case:
    d, v = sizes.d, sizes.v
    x, w = leaf(n, d, dtype=dtype), leaf(v, d, dtype=dtype, scale=d**-0.5)
    return Case(
        "linear_log_probs",
        f"{n}, {d} -> {v}",
        dtype,
        lambda x, w, y: _eager_log_prob_and_entropy(TF.linear(x, w), y),
        lambda x, w, y: _log_prob_and_entropy(F.linear_log_probs(x, w, y, outputs=("log_prob", "entropy"))),
        (x, w, torch.randint(0, v, (n,))),
        [x, w],
        flops=8 * n * d * v,  # logits in forward and again in backward, and the gradients of input and weight
        incoming=normal(n, dtype="fp32"),
        repeats=5 if n * d * v > 10**9 else 100,
    )


def mse_loss(n: int, sizes: Sizes, dtype: str) -> Case:
    v = sizes.v
    x = leaf(n, v, dtype=dtype)
    return Case(
        "mse_loss",
        f"{n} x {v}",
        dtype,
        TF.mse_loss,
        F.mse_loss,
        (x, normal(n, v, dtype=dtype)),
        [x],
        bytes=3 * n * v * x.element_size(),  # two read, one written
        repeats=20 if n * v > 10**7 else 200,
    )


def embedding(n: int, sizes: Sizes, dtype: str, ids: str = "zipf") -> Case:
    d, v = sizes.d, sizes.v
    w = leaf(v, d, dtype=dtype)
    return Case(
        f"embedding {ids}",
        f"{n} of {v} x {d}",
        dtype,
        TF.embedding,
        F.embedding,
        (zipf(n, v) if ids == "zipf" else torch.randint(0, v, (n,)), w),
        [w],
        bytes=(3 * n * d + v * d) * w.element_size(),  # rows gathered, their gradients read, the table's written
        incoming=normal(n, d, dtype=dtype),
        repeats=12 if v * d > 10**6 else 300,
    )


def linear_relu(n: int, sizes: Sizes, dtype: str) -> Case:
    d, h = sizes.d, sizes.h
    x, w, b = leaf(n, d, dtype=dtype), leaf(h, d, dtype=dtype, scale=d**-0.5), leaf(h, dtype=dtype)
    return Case(
        "linear_relu",
        f"{n}, {d} -> {h}",
        dtype,
        lambda x, w, b: torch.relu(TF.linear(x, w, b)),
        F.linear_relu,
        (x, w, b),
        [x, w, b],
        flops=6 * n * d * h,  # three products
        incoming=normal(n, h, dtype=dtype),
        repeats=8 if n * d * h > 10**8 else 500,
    )


def relu_mlp(n: int, sizes: Sizes, dtype: str) -> Case:
    d, h = sizes.d, sizes.h
    w1, b1 = leaf(h, d, dtype=dtype, scale=d**-0.5), leaf(h, dtype=dtype)
    w2, b2 = leaf(d, h, dtype=dtype, scale=h**-0.5), leaf(d, dtype=dtype)
    x = leaf(n, d, dtype=dtype)
    return Case(
        "relu_mlp",
        f"{n}, {d} -> {h} -> {d}",
        dtype,
        lambda x, w1, b1, w2, b2: TF.linear(torch.relu(TF.linear(x, w1, b1)), w2, b2),
        F.relu_mlp,
        (x, w1, b1, w2, b2),
        [x, w1, b1, w2, b2],
        flops=12 * n * d * h,  # three products a layer
        incoming=normal(n, d, dtype=dtype),
        repeats=8 if n * d * h > 10**8 else 300,
    )


def model(n: int, sizes: Sizes, dtype: str) -> Case:
    """Forward and backward of the loss of MLPLanguageModel, in PyTorch's operations and as the model computes it."""
    d, h, v = sizes
    net = MLPLanguageModel(v, d, h)
    for parameter in net.parameters():
        parameter.data = normal(*parameter.shape, dtype=dtype, scale=parameter.shape[-1] ** -0.5)
    table, layer, head = net.embedding.weight, net.hidden[0], net.output

    def eager(ids: Tensor, y: Tensor) -> Tensor:
        hidden = torch.relu(TF.linear(TF.embedding(ids, table), layer.weight, layer.bias))
        return TF.cross_entropy(TF.linear(hidden, head.weight, head.bias), y)

    return Case(
        "model",
        f"batch {n}; {d}, {h}, {v}",
        dtype,
        eager,
        net.loss,
        (zipf(n, v), zipf(n, v)),
        list(net.parameters()),
        flops=6 * n * h * (d + v),  # three products a layer
        repeats=400 if n < 1000 else 150,
    )


IN_PLACE, UNIFORM = {"place": "in place"}, {"ids": "uniform"}

# n is chosen so that a case fits in 20 GiB and eager PyTorch takes seconds at most on two cores.
CPU_ENTRIES = [
    Entry(cross_entropy, "small", "fp32", 2048, quick=True),
    Entry(cross_entropy, "gpt2", "fp32", 2048, 5.5, quick=True),
    Entry(cross_entropy, "gpt2", "bf16", 2048, 5.5, quick=True),
    Entry(cross_entropy, "gpt2", "fp32", 2048, 10.0, options=IN_PLACE),
    Entry(cross_entropy, "gpt2", "bf16", 2048, 8.0, options=IN_PLACE),
    Entry(cross_entropy, "llama", "fp32", 512),
    Entry(cross_entropy, "gemma", "bf16", 512),
    Entry(linear_cross_entropy, "small", "fp32", 1024, quick=True),
    Entry(linear_cross_entropy, "small", "bf16", 1024),
    Entry(linear_cross_entropy, "gpt2", "fp32", 2048, 1.35),
    Entry(linear_cross_entropy, "gpt2", "bf16", 2048, 2.0),
    Entry(linear_cross_entropy, "llama", "fp32", 128),
    Entry(linear_cross_entropy, "gemma", "bf16", 256),
    Entry(log_probs, "gpt2", "fp32", 2048, 8.0),
    Entry(log_probs, "gpt2", "bf16", 2048),
    Entry(linear_log_probs, "gpt2", "fp32", 2048),
    Entry(linear_log_probs, "gpt2", "bf16", 2048),
    Entry(mse_loss, "small", "fp32", 1024),
    Entry(mse_loss, "aim", "fp32", 1024, 6.0, quick=True),
    Entry(mse_loss, "aim", "bf16", 1024, 10.0),
    Entry(embedding, "small", "fp32", 32),
    Entry(embedding, "small", "fp32", 16384, 6.0, quick=True),
    Entry(embedding, "gpt2", "fp32", 16384, 2.5),
    Entry(embedding, "gpt2", "fp32", 16384, 2.5, options=UNIFORM),
    Entry(embedding, "gpt2", "bf16", 16384, 2.5),
    Entry(embedding, "gemma", "fp32", 4096),
    Entry(linear_relu, "small", "fp32", 64, 1.4, quick=True),
    Entry(linear_relu, "gpt2", "fp32", 1024),
    Entry(linear_relu, "gpt2", "bf16", 64),  # few rows: some processors have no fast bfloat16 product
    Entry(linear_relu, "aim", "fp32", 2048, 1.03),
    Entry(linear_relu, "aim", "bf16", 2048, 1.10),
    Entry(linear_relu, "llama", "fp32", 128),
    Entry(relu_mlp, "small", "fp32", 64, quick=True),
    Entry(relu_mlp, "small", "bf16", 64),
    Entry(relu_mlp, "gpt2", "fp32", 1024),
    Entry(relu_mlp, "aim", "fp32", 2048),
    Entry(relu_mlp, "aim", "bf16", 2048, 1.08),
    Entry(model, "small", "fp32", 32, 1.75, quick=True),
    Entry(model, "small", "fp32", 128, 2.0),
    Entry(model, "small", "fp32", 1024, 2.5),
]

CUDA_ENTRIES = [
    Entry(cross_entropy, "small", "fp32", 2048, quick=True),
    Entry(cross_entropy, "gpt2", "bf16", 8192, quick=True),
    Entry(cross_entropy, "llama", "bf16", 8192, 3.5),
    Entry(cross_entropy, "llama", "bf16", 2048, 3.5),
    Entry(cross_entropy, "llama", "fp32", 8192, 3.5),
    Entry(cross_entropy, "llama", "bf16", 8192, options=IN_PLACE),
    Entry(cross_entropy, "gemma", "bf16", 4096, 3.2),
    Entry(linear_cross_entropy, "gpt2", "bf16", 8192, quick=True),
    Entry(linear_cross_entropy, "llama", "bf16", 8192, 1.08),
    Entry(linear_cross_entropy, "llama", "bf16", 2048, 1.08),
    Entry(linear_cross_entropy, "qwen", "bf16", 8192, 1.0),
    Entry(linear_cross_entropy, "gemma", "bf16", 4096),
    Entry(log_probs, "llama", "bf16", 2048),
    Entry(linear_log_probs, "llama", "bf16", 2048),
    Entry(mse_loss, "aim", "fp32", 16384, 2.1, quick=True),
    Entry(mse_loss, "aim", "bf16", 16384, 2.1),
    Entry(embedding, "small", "fp32", 16384, quick=True),
    Entry(embedding, "llama", "bf16", 16384, 1.4),
    Entry(embedding, "llama", "bf16", 16384, 1.4, options=UNIFORM),
    Entry(linear_relu, "small", "fp32", 64, quick=True),
    Entry(linear_relu, "gpt2", "bf16", 8192, 1.12),
    Entry(linear_relu, "llama", "bf16", 8192, 1.03),
    Entry(relu_mlp, "gpt2", "bf16", 8192, 1.15, quick=True),
    Entry(relu_mlp, "llama", "bf16", 8192, 1.035),
    Entry(model, "small", "fp32", 128, quick=True),
]
ENTRIES = {"cpu": CPU_ENTRIES, "cuda": CUDA_ENTRIES}
