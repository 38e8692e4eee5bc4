"""Shapes around the constants of the kernels: drawn cases, each compared with float64, run in processes of their own.

One or two dimensions of a case lie at a constant of a kernel (a tile, a block, a limit), or one beside it; the others are
small. A worker process prints the name of a case before it runs it, so that a crash names its case; the rest then goes on
in a new process. ``python tests/shapes.py --cases 2000 --seed 1`` runs cases by hand, ``--case 1:17`` one of them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
OPERATIONS = ("embedding", "linear_relu", "relu_mlp", "mse_loss", "cross_entropy", "linear_cross_entropy")
BATCH = 50  # cases of a worker process
SMALL = (1, 1, 1, 2, 2, 3, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64)


@dataclass(frozen=True)
class Limits:
    """How large the cases of a backend are, and the constants of its kernels (tiles, blocks, chunks, limits)."""

    constants: tuple[int, ...]
    items: int  # of a tensor
    products: int  # multiply-adds of a matrix product
    rows: int  # of a loss or a lookup: the interpreter takes milliseconds a row


LIMITS = {
    # csrc/cpu: vectors 4 to 32, features of the narrow loss 32, ids compared 128, column blocks and inner blocks 256,
    # index blocks 512, pieces 1024, blocks of a row 1024, the transposed tile and classes of the narrow loss 4096, blocks
    # of squares 8192, a table in pieces 32768; half of the pool's smallest block 131072 float32 items.
    "cpu": Limits(
        (64, 128, 256, 512, 1024, 2048, 4096, 5000, 8192, 16384, 32768, 65536, 131072), 1 << 22, 1 << 26, 1 << 18
    ),
    # csrc/cuda: tiles 32 to 128, threads 128 to 512, rows of a sum's block 16384, items held by a block 8192 and 16384,
    # digits 64, blocks of the sort 1024.
    "cuda": Limits((64, 96, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 20000), 1 << 15, 1 << 20, 1 << 13),
    # fastllm/triton: tiles 16 to 64, chunks of positions 64, columns 1024, blocks 2048 and 4096, rows of one tile 16384 in
    # bfloat16 and 8192 in float32.
    # On a GPU: the constants of both, and rows longer than a cluster of blocks holds.
    "device": Limits(
        (64, 96, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 20000, 32768, 65536, 131072, 262144, 270000),
        1 << 24,
        1 << 31,
        1 << 17,
    ),
    "triton": Limits((64, 128, 512, 1024, 2048, 4096, 8192, 16384), 1 << 14, 1 << 16, 80),
}


class Drawn:
    """One case: everything about it follows from the seed and the index."""

    def __init__(self, backend: str, seed: int, index: int) -> None:
        self.id = f"{seed}:{index}"
        self.random = random.Random(f"{backend}-{seed}-{index}")
        self.limits = LIMITS[backend]
        self.op = OPERATIONS[index % len(OPERATIONS)]
        self.dtype = self.random.choice(("float32", "float32", "float64", "bfloat16", "float16"))
        self.layout = self.random.choice(("contiguous", "contiguous", "transposed", "sliced", "offset"))
        self.sizes = self._sizes()
        self.options = getattr(self, f"_{self.op}_options")()

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.sizes))
        options = " ".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.id} {self.op} {sizes} {self.dtype} {self.layout} {options}".rstrip()

    def _size(self, long: bool) -> int:
        if not long:
            # PyTorch's embedding on a GPU, the reference, reads outside its tensors for rows of no features.
            empty = self.random.random() <= 0.03 and (self.op, self.limits) != ("embedding", LIMITS["device"])
            return 0 if empty else self.random.choice(SMALL)
        return max(self.random.choice(self.limits.constants) + self.random.choice((-1, 0, 1)), 1)

    def _sizes(self) -> tuple[int, ...]:
        """rows, inner[, hidden], outer; one or two of them long, as far as the limits allow."""
        count = {"mse_loss": 2, "cross_entropy": 2, "relu_mlp": 4}.get(self.op, 3)
        while True:
            long = set(self.random.sample(range(count), self.random.choice((1, 1, 2))))
            sizes = tuple(self._size(i in long) for i in range(count))
            if self._fits(sizes):
                return sizes

    def _fits(self, sizes: tuple[int, ...]) -> bool:
        limits, pairs = self.limits, itertools.pairwise(sizes)
        if any(a * b > limits.items for a, b in pairs) or (sizes[0] > limits.rows and self.op != "mse_loss"):
            return False
        if self.op in ("mse_loss", "cross_entropy", "embedding"):
            return sizes[0] * sizes[-1] <= limits.items
        products = itertools.pairwise(sizes)
        return all(sizes[0] * a * b <= limits.products for a, b in products) and sizes[0] * sizes[-1] <= limits.items

    def _embedding_options(self) -> dict:
        return {
            "padding": self.random.random() < 0.3,
            "by_frequency": self.random.random() < 0.3,
            "few": self.random.random() < 0.5,  # different ids
            "int32": self.random.random() < 0.3,
        }

    def _linear_relu_options(self) -> dict:
        return {"bias": self.random.random() < 0.7}

    _relu_mlp_options = _linear_relu_options

    def _mse_loss_options(self) -> dict:
        return {"reduction": self._reduction(), "weight": self.random.random() < 0.3}

    def _reduction(self) -> str:
        return self.random.choice(("none", "mean", "mean", "sum"))

    def _cross_entropy_options(self) -> dict:
        plain = self.random.random() < 0.4
        return {
            "reduction": self._reduction(),
            "smoothing": 0.0 if plain else self.random.choice((0.0, 0.1, 1.0)),
            "z_loss": 0.0 if plain else self.random.choice((0.0, 1e-3)),
            "cap": None if plain else self.random.choice((None, 5.0)),
            "weight": not plain and self.random.random() < 0.4,
            "target": self.random.choice(("int64", "int64", "int32", "ignored", "probabilities")),
        }

    def _linear_cross_entropy_options(self) -> dict:
        return {**self._cross_entropy_options(), "bias": self.random.random() < 0.5}


def _layouts() -> dict[str, Callable]:
    import torch

    return {
        "contiguous": lambda t: t,
        "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
        "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    }


def check(case: Drawn) -> None:
    """Run a case; AssertionError if it is not as near to float64 as PyTorch's own result in the same dtype."""
    import torch
    import torch.nn.functional as TF
    from helpers import check_against_float64
    from operations import like, reference_cross_entropy

    import fastllm.functional as F

    torch.manual_seed(hash_of(case.id))
    dtype, o, sizes = getattr(torch, case.dtype), case.options, case.sizes
    layout = _layouts()[case.layout]

    def made(*shape, scale=1.0):
        return (torch.randn(shape) * scale).to(dtype).requires_grad_()

    def laid_out(function):
        return lambda *inputs: function(*(None if t is None else layout(t) for t in inputs))

    def targets(rows, classes):
        kind = o["target"]
        if kind == "probabilities" and classes > 0:
            return torch.softmax(torch.randn(rows, classes), 1)
        t = torch.randint(0, max(classes, 1), (rows,))
        if kind == "ignored" or classes == 0:
            t[torch.rand(rows) < (0.5 if classes else 2.0)] = -100
        return t.int() if kind == "int32" else t

    def loss_arguments(t, w, x):
        return dict(weight=like(w, x), reduction=o["reduction"], label_smoothing=o["smoothing"],
                    lse_square_scale=o["z_loss"], softcap=o["cap"])  # fmt: skip

    def reference_loss(x, t, w):
        return reference_cross_entropy(
            x, like(t, x), like(w, x), o["reduction"], -100, o["smoothing"], o["z_loss"], o["cap"]
        )

    if case.op == "embedding":
        count, features, rows = sizes
        rows = max(rows, 1)
        ids = torch.randint(0, min(rows, 3) if o["few"] else rows, (count,))
        ids = ids.int() if o["int32"] else ids
        padding = rows - 1 if o["padding"] else None
        arguments = dict(padding_idx=padding, scale_grad_by_freq=o["by_frequency"])
        ours = laid_out(lambda w: F.embedding(ids, w, **arguments))
        reference, inputs = (lambda w: TF.embedding(ids, w, **arguments)), [made(rows, features)]
    elif case.op == "linear_relu":
        rows, inner, outer = sizes
        inputs = [
            made(rows, inner),
            made(outer, inner, scale=max(inner, 1) ** -0.5),
            made(outer) if o["bias"] else None,
        ]
        ours, reference = laid_out(F.linear_relu), lambda x, w, b: torch.relu(TF.linear(x, w, b))
    elif case.op == "relu_mlp":
        rows, inner, hidden, outer = sizes
        inputs = [
            made(rows, inner), made(hidden, inner, scale=max(inner, 1) ** -0.5), made(hidden) if o["bias"] else None,
            made(outer, hidden, scale=max(hidden, 1) ** -0.5), made(outer) if o["bias"] else None,
        ]  # fmt: skip
        ours = laid_out(F.relu_mlp)
        reference = lambda x, w, b, v, c: TF.linear(torch.relu(TF.linear(x, w, b)), v, c)  # noqa: E731
    elif case.op == "mse_loss":
        w = torch.rand(sizes) + 0.5 if o["weight"] else None
        ours = laid_out(lambda x, t: F.mse_loss(x, t, reduction=o["reduction"], weight=like(w, x)))

        def reference(x, t):
            if w is None:
                return TF.mse_loss(x, t, reduction=o["reduction"])
            squares = like(w, x) * (x - t) ** 2
            if o["reduction"] == "none":
                return squares
            return squares.sum() if o["reduction"] == "sum" else squares.sum() / like(w, x).sum()

        inputs = [made(*sizes), made(*sizes)]
    elif case.op == "cross_entropy":
        rows, classes = sizes
        classes = max(classes, 1)
        t, w = targets(rows, classes), torch.rand(classes) + 0.5 if o["weight"] else None
        ours = laid_out(lambda x: F.cross_entropy(x, like(t, x), **loss_arguments(t, w, x)))
        reference, inputs = (lambda x: reference_loss(x, t, w)), [made(rows, classes, scale=3)]
    else:
        rows, inner, classes = sizes
        classes = max(classes, 1)
        t, w = targets(rows, classes), torch.rand(classes) + 0.5 if o["weight"] else None
        ours = laid_out(
            lambda x, v, b: F.linear_cross_entropy(x, v, like(t, x), linear_bias=b, **loss_arguments(t, w, x))
        )
        reference = lambda x, v, b: reference_loss(TF.linear(x, v, b), t, w)  # noqa: E731
        inputs = [
            made(rows, inner), made(classes, inner, scale=2 * max(inner, 1) ** -0.5),
            made(classes) if o["bias"] else None,
        ]  # fmt: skip
    # Sums of random signs cancel: the bound grows with the root of their length, far below the size of one item. Of one
    # class the gradient is 0 but for rounding.
    slack = (4 + max(sizes, default=1) ** 0.5 / 8) * (100 if case.op.endswith("cross_entropy") and sizes[-1] < 2 else 1)
    check_against_float64(ours, reference, inputs, factor=4, slack=slack)
    with torch.no_grad():
        again = ours(*inputs)
    output = ours(*inputs)
    # On a GPU the order of a mean's sum follows the alignment of the gradient that is written beside it.
    ordered = case.op != "linear_cross_entropy" and (case.op, case.limits) != ("mse_loss", LIMITS["device"])
    assert torch.equal(again, output) or again.isnan().any() or not ordered, "no_grad differs"
    torch.testing.assert_close(again, output.detach(), rtol=1e-2, atol=1e-2, equal_nan=True)


def hash_of(text: str) -> int:
    """The same number in every process, as Python's ``hash`` is not."""
    return int.from_bytes(text.encode(), "little") % (1 << 31)


def backend_of_environment() -> str:
    if os.environ.get("FASTLLM_TEST_DEVICE") == "cuda":
        return "device"
    if os.environ.get("FASTLLM_CUDA_HOST") == "1":
        return "cuda"
    return "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "cpu"


def _work(backend: str, seed: int, first: int, last: int) -> None:
    """A worker: what it tests; ``case NAME`` before each case, ``wrong REASON`` if it fails; ``end`` after the last."""
    import conftest  # noqa: F401 - enables the emulated backend
    import torch

    import fastllm

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    print(f"fastllm {fastllm.__file__}", flush=True)
    for index in range(first, last):
        case = Drawn(backend, seed, index)
        print(f"case {case}", flush=True)
        try:
            check(case)
        except Exception as error:  # an assertion, or an error that a case must not end in
            print(f"wrong {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
    print("end", flush=True)


def failures(backend: str, seed: int, first: int, count: int, timeout: float = 600) -> Iterator[str]:
    """Run cases ``[first, first + count)`` of a seed; yields a line for each that crashed or was wrong."""
    index, last = first, first + count
    while index < last:
        end = min(index + BATCH, last)
        # Every second process holds few logits at once, so that a loss has many chunks.
        env = {**os.environ, **({"FASTLLM_LOSS_WORKSPACE": "4096"} if index // BATCH % 2 else {})}
        command = [sys.executable, __file__, "--worker", f"{backend}:{seed}:{index}:{end}"]
        try:
            run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
            code, out, err = run.returncode, run.stdout, run.stderr
        except subprocess.TimeoutExpired as late:
            code, err = None, ""
            out = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        lines = out.splitlines()
        name, done = None, 0
        for line in lines:
            kind, _, rest = line.partition(" ")
            if kind == "case":
                name, done = rest, done + 1
            elif kind == "wrong":
                yield f"{name}: {rest}"
        if lines and lines[-1] == "end":
            index = end
            continue
        if code is None:
            how = f"no end within {timeout:.0f} s"
        elif code < 0:
            how = f"ended the process by {signal.Signals(-code).name}"
        else:
            how = f"ended the process with status {code}: {' '.join(err.split())[-300:]}"
        yield f"{name or 'start of a process'}: {how}"
        index += max(done, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--case", metavar="SEED:INDEX", help="run one case in this process")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    backend = backend_of_environment()
    if options.worker:
        backend, *numbers = options.worker.split(":")
        _work(backend, *map(int, numbers))
        return 0
    if options.case:
        seed, index = map(int, options.case.split(":"))
        _work(backend, seed, index, index + 1)
        return 0
    count, log = 0, os.environ.get("FASTLLM_TEST_FAILURES", os.devnull)
    with ThreadPoolExecutor(options.workers) as pool, open(log, "a") as file:
        blocks = [(first, min(BATCH, options.cases - first)) for first in range(0, options.cases, BATCH)]
        for found in pool.map(lambda block: list(failures(backend, options.seed, *block)), blocks):
            for failure in found:
                count += 1
                print(failure, flush=True)
                print(failure, file=file, flush=True)
    print(f"{options.cases - count} passed, {count} failed")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
