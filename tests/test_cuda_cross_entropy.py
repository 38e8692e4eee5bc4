"""CUDA kernels of cross_entropy and linear_cross_entropy, played on the CPU: every way to walk a row, every boundary."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as TF
from helpers import DTYPES, check_against_float64
from operations import like, reference_cross_entropy

import fastllm
import fastllm.functional as F

if os.environ.get("FASTLLM_CUDA_HOST") != "1":
    pytest.skip("needs the host build: FASTLLM_CUDA_HOST=1", allow_module_level=True)

import cuda_host

pytestmark = pytest.mark.numbers

ROOT = Path(__file__).resolve().parent.parent
OPS = torch.ops.fastllm_cuda
STRATEGIES = ("row", "cluster4", "cluster16", "passes")
LOW_AND_HIGH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def on_cuda():
    torch.manual_seed(0)
    with fastllm.use_backend("cuda"):
        yield


@pytest.fixture(params=STRATEGIES)
def strategy(request, monkeypatch):
    monkeypatch.setenv("FASTLLM_CUDA_STRATEGY", request.param)
    return request.param


def logits(rows: int, classes: int, dtype: torch.dtype, scale: float = 3.0) -> torch.Tensor:
    return (torch.randn(rows, classes) * scale).to(dtype).requires_grad_()


def targets(rows: int, classes: int) -> torch.Tensor:
    """The last class, the first, one that is ignored, others."""
    y = torch.randint(0, classes, (rows,))
    y[0] = classes - 1
    if rows > 2:
        y[1], y[2] = 0, -100
    return y


def check(x, y, **options):
    check_against_float64(
        lambda x: F.cross_entropy(x, y, **options), lambda x: TF.cross_entropy(x, y.long(), **options), [x]
    )


def gradient(function, x, *args, incoming=None, **kwargs):
    x = x.detach().requires_grad_()
    loss = function(x, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, x, incoming if incoming is not None else torch.ones_like(loss))[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_groups_and_blocks(strategy, dtype):
    """64 threads hold 2048 logits (1024 in float64); clusters multiply that."""
    held = 1024 if dtype == torch.float64 else 2048
    for classes in (1, 2, 7, 8, 9, 17, 63, held - 1, held, held + 1):
        check(logits(3, classes, dtype), targets(3, classes))


@pytest.mark.parametrize("cluster", [2, 8])
def test_other_clusters(monkeypatch, cluster):
    monkeypatch.setenv("FASTLLM_CUDA_STRATEGY", f"cluster{cluster}")
    for classes in (63, cluster * 2048 + 1):
        check(logits(3, classes, torch.bfloat16), targets(3, classes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_fill_a_block(monkeypatch, dtype):
    monkeypatch.setenv("FASTLLM_CUDA_STRATEGY", "row")
    most = 8192 if dtype == torch.float64 else 16384
    for classes in (most - 1, most):
        check(logits(2, classes, dtype), targets(2, classes), reduction="sum")
    with pytest.raises(RuntimeError, match="do not fit 1 blocks"):
        F.cross_entropy(logits(1, most + 1, dtype), targets(1, most + 1))


@pytest.mark.parametrize("classes", [40_000, 270_001])
@LOW_AND_HIGH
def test_long_rows(dtype, classes):
    """The choice by size: a cluster of 4, two passes."""
    check(logits(2, classes, dtype), targets(2, classes), reduction="sum")


@LOW_AND_HIGH
def test_long_rows_where_clusters_have_no_room(monkeypatch, dtype):
    monkeypatch.setenv("FASTLLM_CUDA_HOST_CLUSTER", "2")
    for smoothing in (0.0, 0.1):
        check(logits(2, 40_000, dtype), targets(2, 40_000), reduction="sum", label_smoothing=smoothing)
    monkeypatch.setenv("FASTLLM_CUDA_STRATEGY", "cluster4")
    with pytest.raises(RuntimeError, match="clusters of 4"):
        F.cross_entropy(logits(2, 40_000, dtype), targets(2, 40_000))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_start_anywhere(strategy, dtype):
    """Views whose rows' distance from a boundary changes from row to row, with a gradient at other distances."""
    for offset, width, classes in ((1, 140, 130), (2, 144, 131), (3, 137, 134), (4, 132, 128), (1, 10, 5)):
        x = (torch.randn(4, width) * 3).to(dtype)[:, offset : offset + classes].requires_grad_()
        for reduction in ("mean", "none"):
            check(x, targets(4, classes), reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5, 130, 133, 2100])
def test_gradient_over_the_logits(dtype, classes):
    for x in (logits(3, classes, dtype).detach(), logits(3, classes + 3, dtype).detach()[:, 1 : classes + 1]):
        y, incoming = targets(3, classes), torch.tensor(0.5, dtype=dtype)
        expected = gradient(TF.cross_entropy, x.double(), y, incoming=incoming.double())[1]
        _, softmax, _ = OPS.cross_entropy_forward(x, y, None, 1, -100, 0.0, 0.0, None, False)
        around = x._base.clone() if x._base is not None else None
        OPS.cross_entropy_backward_(incoming, x, y, None, softmax, 1, -100, 0.0, 0.0, None)
        torch.testing.assert_close(x.double(), expected, rtol=1e-2, atol=1e-3 if dtype.itemsize == 2 else 1e-6)
        if around is not None:
            assert torch.equal(x._base[:, 0], around[:, 0])
            assert torch.equal(x._base[:, classes + 1 :], around[:, classes + 1 :])


# Of 37 logits: what float32, bfloat16 and float16 cannot tell apart by sums of differences, and what has no softmax.
SPECIAL = [
    [-INF] * 37,
    [-INF] * 30 + [3.0, -INF, 1.0] + [-INF] * 4,
    [INF] + [0.0] * 36,
    [0.0] * 36 + [NAN],
    [NAN] * 37,
    [1e4, -1e4, 0.0, 9999.0, 1.0] + [9990.0] * 32,
    [88.0] + [0.0] * 36,
    [-200.0] * 36 + [-210.0],
    [65000.0] + [64000.0] * 36,
    [-65000.0] * 37,
    [2.0**19, 2.0**19 - 2048] + [5.0] * 35,
    [2.0**20] * 3 + [0.0] * 34,  # from here on the maximum is taken off before the exponentials
    [-(2.0**20)] * 37,
    [2.0**21 - 3, 2.0**21, -3e38] + [2.0**21 - 1] * 34,
    [1e30, 1e30] + [-1e30] * 35,
    [3e38] + [1e38] * 36,
    [-3e38] * 37,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row", SPECIAL, ids=lambda row: str(row[:1] + row[-1:]))
def test_special_rows(strategy, row, dtype):
    """Over any number of threads that hold part of the row: some hold nothing."""
    x = torch.tensor([[0.1] * 37, row]).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for y in ([1, 36], [36, 0], [-100, 4]):
        for reduction, smoothing in (("sum", 0.0), ("none", 0.0), ("sum", 0.1)):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            ours = gradient(F.cross_entropy, x, torch.tensor(y), **options)
            # PyTorch's own float32 sum overflows where ours does not: the truth is taken in float64.
            theirs = gradient(TF.cross_entropy, x.double(), torch.tensor(y), **options)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b.to(dtype), equal_nan=True, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4, 6e4])
def test_rows_around_a_large_number(monkeypatch, dtype, offset):
    """The maximum's rounding times log2(e) is the same factor for all exponentials of a thread's warp."""
    monkeypatch.setenv("FASTLLM_CUDA_STRATEGY", "row")
    x = torch.randn(4, 3000) * 3 + offset
    x[1, 7] = offset + 30  # a class that is certain
    check(x.to(dtype).requires_grad_(), torch.tensor([1, 7, 2, 3]), reduction="sum")


@LOW_AND_HIGH
def test_ignored_rows_are_not_read(strategy, dtype):
    x = logits(4, 77, dtype).detach()
    x[1], x[3] = NAN, INF
    y = torch.tensor([5, -100, 76, -100])
    loss, grad = gradient(F.cross_entropy, x, y)
    expected, _ = gradient(TF.cross_entropy, x[::2].float(), y[::2])
    torch.testing.assert_close(loss.float(), expected, rtol=1e-2, atol=1e-4)
    assert grad[1].eq(0).all() and grad[3].eq(0).all() and grad.isfinite().all()
    rows, softmax, _ = OPS.cross_entropy_forward(x, y, None, 0, -100, 0.0, 0.0, None, False)
    assert rows[1] == 0 and rows[3] == 0 and softmax[:, 1::2].eq(0).all()


@pytest.mark.parametrize(
    ("kind", "smoothing", "z", "cap", "weighted"),
    [
        ("int64", 0.1, 0.0, None, False),
        ("int32", 0.0, 1e-2, None, True),
        ("int64", 0.3, 0.0, None, True),
        ("int32", 0.0, 0.0, 5.0, False),
        ("int64", 0.2, 1e-2, 5.0, True),
        ("probabilities", 0.0, 0.0, None, False),
        ("probabilities", 0.2, 1e-2, 5.0, True),
    ],
)
def test_options(strategy, kind, smoothing, z, cap, weighted):
    for dtype, classes, offset, reduction in (
        (torch.float32, 131, 0, "mean"),
        (torch.float32, 131, 0, "none"),
        (torch.bfloat16, 2070, 1, "sum"),
    ):
        x = logits(4, classes + 1, dtype).detach()[:, offset : offset + classes].requires_grad_()
        w = torch.rand(classes) + 0.5 if weighted else None
        y = targets(4, classes)
        if kind == "probabilities":
            y = torch.softmax(torch.randn(4, classes), 1)
        elif kind == "int32":
            y = y.int()
        check_against_float64(
            lambda x, y=y, w=w, r=reduction: F.cross_entropy(
                x, like(y, x), like(w, x), reduction=r, label_smoothing=smoothing, lse_square_scale=z, softcap=cap
            ),
            lambda x, y=y, w=w, r=reduction: reference_cross_entropy(
                x, like(y, x), like(w, x), r, -100, smoothing, z, cap
            ),
            [x],
        )


def test_few_long_rows_are_cut_in_backward():
    classes = 70_001
    check(logits(2, classes, torch.float32), targets(2, classes), reduction="none")
    for x, y in (
        (logits(2, classes, torch.bfloat16), targets(2, classes)),
        (logits(2, 9000, torch.float32), torch.softmax(torch.randn(2, 9000), 1)),
    ):
        w = torch.rand(x.size(1))
        check_against_float64(
            lambda x, y=y, w=w: F.cross_entropy(x, like(y, x), like(w, x), reduction="none", label_smoothing=0.1),
            lambda x, y=y, w=w: TF.cross_entropy(x, like(y, x), like(w, x), reduction="none", label_smoothing=0.1),
            [x],
        )


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_over_many_rows(weighted):
    """More rows than one block sums; almost all are ignored, so that it is soon played."""
    rows = 2 * 16384 + 5
    y = torch.full((rows,), -100)
    counted = torch.tensor([0, 16383, 16384, 32767, rows - 1])
    y[counted] = torch.tensor([0, 1, 2, 3, 4])
    x, w = torch.randn(rows, 5), torch.rand(5) if weighted else None
    for reduction in ("mean", "sum"):
        ours = F.cross_entropy(x, y, w, reduction=reduction)
        torch.testing.assert_close(ours, TF.cross_entropy(x[counted], y[counted], w, reduction=reduction))


@LOW_AND_HIGH
def test_gradient_stays_where_the_incoming_one_is_1(dtype):
    x, y = logits(3, 130, dtype).detach(), targets(3, 130)
    _, softmax, formed = OPS.cross_entropy_forward(x, y, None, 1, -100, 0.0, 0.0, None, True)
    for incoming in (1.0, 0.25):
        grad = torch.full_like(formed, 7.0)
        OPS.cross_entropy_correct_(
            torch.tensor(incoming, dtype=dtype), x, y, None, softmax, 1, -100, 0.0, 0.0, None, grad
        )
        if incoming == 1:
            assert grad.eq(7).all()
        else:
            torch.testing.assert_close(grad, formed * incoming)


@LOW_AND_HIGH
def test_late_scale(dtype):
    for start, count in ((0, 0), (0, 5), (1, 3), (1, 5000), (3, 8), (0, 4096)):
        grad = torch.randn(start + count).to(dtype)[start:]
        for factor in (torch.tensor(1.0), torch.tensor(2.5), torch.tensor(0.5, dtype=dtype)):
            before = grad.clone()
            OPS.linear_cross_entropy_scale_(factor, grad)
            torch.testing.assert_close(grad, (before.float() * factor.float()).to(dtype), rtol=0, atol=0)


def check_linear(n: int, classes: int, dtype: torch.dtype, **options):
    x, w, b = logits(n, 6, dtype, 1), logits(classes, 6, dtype, 0.5), torch.randn(classes).to(dtype).requires_grad_()
    y = targets(n, classes)
    check_against_float64(
        lambda x, w, b: F.linear_cross_entropy(x, w, y, linear_bias=b, **options),
        lambda x, w, b: TF.cross_entropy(TF.linear(x, w, b), y, **options),
        [x, w, b],
    )


@LOW_AND_HIGH
def test_linear_overwrites_its_logits(strategy, dtype):
    for classes in (9, 257):
        check_linear(5, classes, dtype)
    check_linear(5, 33, dtype, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_sums_its_bias_gradient_over_blocks_of_rows(dtype):
    check_linear(130, 257, dtype)
    check_linear(64, 300, dtype, reduction="none")


def test_repeats_give_the_same_bits(strategy):
    x, y = logits(3, 2500, torch.bfloat16), targets(3, 2500)
    first, again = (gradient(F.cross_entropy, x, y) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_bad_input(monkeypatch):
    x = torch.randn(3, 5)
    for op, call in (
        ("cross_entropy", lambda y: F.cross_entropy(x, y)),
        ("linear_cross_entropy", lambda y: F.linear_cross_entropy(x, torch.randn(5, 5), y)),
    ):
        for bad in (5, -1, 2**40):
            message = rf"{op}: target must be in \[0, 5\) or ignore_index -100, got {bad} at position 1"
            with pytest.raises(IndexError, match=message):
                call(torch.tensor([0, bad, 1]))
    long, one = torch.empty(2**30 + 1, dtype=torch.bfloat16), torch.tensor([0])  # whose pages are never touched
    with pytest.raises(
        RuntimeError, match=r"^cross_entropy: the backend cuda serves at most 2\^30 classes, got 1073741825"
    ):
        F.cross_entropy(long[None], one)
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy: the backend cuda serves at most 2\^30 classes"):
        F.linear_cross_entropy(long[:1, None], long[:, None], one)
    monkeypatch.setenv("FASTLLM_CUDA_STRATEGY", "cluster3")
    with pytest.raises(ValueError, match="FASTLLM_CUDA_STRATEGY: expected row, cluster2"):
        F.cross_entropy(x, torch.tensor([0, 1, 2]))


# File, text, what it becomes: each must fail a test.
PLANTED = {
    "a missing barrier of the cluster": (
        "cross_entropy_softmax.cuh",
        "s);\n    sync_cluster();",
        "s);",
    ),
    "an off-by-one at the tail": (
        "cross_entropy_rows.cuh",
        "column < r.classes ? column : -1",
        "column < r.classes - 1 ? column : -1",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(bug):
    library = cuda_host.build_mutant("cross_entropy", *PLANTED[bug])
    chosen = "start_anywhere and bfloat16 and (cluster4 or passes)"
    tests = [ROOT / "tests" / "test_cuda_cross_entropy.py", "-x", "-k", chosen]
    env = {"FASTLLM_CUDA_HOST_LIBRARY": str(library), "FASTLLM_BACKEND": "cuda"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *map(str, tests)]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout[-2000:]
    assert "AssertionError" in run.stdout
