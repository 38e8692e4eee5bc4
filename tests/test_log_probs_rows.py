"""The row kernels of log_probs and linear_log_probs, called directly: sizes, alignments, strides, the same bits anywhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DTYPES, INTERPRETED, drawn
from test_log_probs import definition

from fastllm.operations.log_probs import DIFFERENTIABLE, FIELDS

EMULATED = os.environ.get("FASTLLM_CUDA_HOST") == "1"
if INTERPRETED:
    from fastllm.triton import log_probs as kernels

    forward, backward = kernels.rows_forward, kernels.rows_backward_
else:
    kernels = torch.ops.fastllm_cuda if EMULATED else torch.ops.fastllm
    forward, backward = kernels.log_probs_rows_forward, kernels.log_probs_rows_backward_
BACKEND = os.environ.get("FASTLLM_BACKEND", "auto")
pytestmark = [
    pytest.mark.numbers,
    pytest.mark.skipif(BACKEND == "eager", reason="the eager backend has no kernels"),
]

ROOT = Path(__file__).resolve().parent.parent
INF, NAN = float("inf"), float("nan")
LOW_AND_HIGH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Of the largest number. The low precisions take a faster exponential: their logits and gradients are coarser still.
FIELD_ERROR = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 1e-5, torch.float16: 1e-5}
GRAD_ERROR = {torch.float32: 3e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits(rows: int, classes: int, dtype: torch.dtype, scale: float = 3.0) -> torch.Tensor:
    return (torch.randn(rows, classes) * scale).to(dtype)


def targets(rows: int, classes: int) -> torch.Tensor:
    """The last class, the first, one that is ignored, others."""
    y = torch.randint(0, classes, (rows,))
    y[0] = classes - 1
    if rows > 2:
        y[1], y[2] = 0, -100
    return y


def run(x, y, *, ids=None, temperature=1.0, softcap=None, asked=FIELDS, with_gradient=DIFFERENTIABLE, grad=None):
    """The fields asked for, and the gradient for random incoming ones, written into ``grad``."""
    acc = accumulator(x.dtype)
    per_row = temperature.to(acc) if isinstance(temperature, torch.Tensor) else None
    options = (per_row, ids, -100, 1.0 if per_row is not None else temperature, softcap)
    wanted = [name in asked and (name != "top_log_prob" or ids is not None) for name in FIELDS]
    *results, saved = forward(x, y, *options, wanted)
    fields = {name: result for name, result, want in zip(FIELDS, results, wanted, strict=True) if want}
    assert all(r.numel() == 0 for r, want in zip(results, wanted, strict=True) if not want)
    incoming = [
        drawn(fields[name], i) if name in fields and name in with_gradient else None
        for i, name in enumerate(DIFFERENTIABLE)
    ]
    grad = torch.full_like(x, NAN) if grad is None else grad
    backward(*incoming, saved, x, y, *options, grad)
    return fields, grad, incoming


def close(got, truth, bound, what):
    assert got.shape == truth.shape, (what, got.shape, truth.shape)
    got, truth = got.double(), truth.detach()
    same = (got == truth) | (got.isnan() & truth.isnan())
    finite = truth[truth.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    error = float(torch.nan_to_num(torch.where(same, 0.0, (got - truth).abs()), nan=INF).max()) if got.numel() else 0.0
    assert error <= bound * size + 1e-38, f"{what}: error {error:.3g}, {error / max(size, 1e-300):.3g} of {size:.3g}"


def check(x, y, **options):
    before = x.clone()
    fields, grad, incoming = run(x, y, **options)
    assert torch.equal(x.nan_to_num(7), before.nan_to_num(7))
    ids, names = options.get("ids"), ("temperature", "softcap")
    wide = x.to(torch.float64, copy=True).requires_grad_()
    given = {name: options[name] for name in names if name in options}
    if isinstance(given.get("temperature"), torch.Tensor):
        given["temperature"] = given["temperature"].double()
    truth = definition(wide, y, ids, **given)
    for name, value in fields.items():
        if name == "argmax":
            assert torch.equal(value, truth[name]), name
        else:
            assert value.dtype == accumulator(x.dtype)
            close(value, truth[name].detach(), FIELD_ERROR[x.dtype], name)
    found = [(truth[n], g.double()) for n, g in zip(DIFFERENTIABLE, incoming, strict=True) if g is not None]
    if found:
        (expected,) = torch.autograd.grad([t for t, _ in found], wide, [g for _, g in found])
        close(grad, torch.where((y == -100)[:, None], 0.0, expected), GRAD_ERROR[x.dtype], "gradient")
    return fields, grad


# Around groups of 16 bytes, the fewest and the most threads of a block, and what they read at once.
SIZES = (1, 2, 7, 8, 9, 17, 63, 511, 512, 513, 1023, 1025, 2047, 2048, 2049, 4100, 8191, 8193, 20_003)
if INTERPRETED:  # around tiles, and the four of them that are read at once
    SIZES = (1, 8, 9, 63, 512, 2047, 2049, 8193)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", SIZES)
def test_sizes(dtype, classes):
    ids = torch.randint(classes, (3, 4))
    check(logits(3, classes, dtype), targets(3, classes), ids=ids)
    check(logits(3, classes, dtype), targets(3, classes).int(), ids=ids, temperature=0.7, softcap=4.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FIELDS)
def test_each_field_alone(dtype, name):
    ids = torch.randint(300, (3, 4)) if name == "top_log_prob" else None
    check(logits(3, 300, dtype), targets(3, 300), ids=ids, asked=(name,))
    check(logits(3, 300, dtype), targets(3, 300), ids=ids, asked=(name,), temperature=torch.rand(3) + 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_gradient_alone(dtype):
    ids = torch.randint(300, (3, 4))
    for name in DIFFERENTIABLE:
        check(logits(3, 300, dtype), targets(3, 300), ids=ids, with_gradient=(name,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_start_anywhere(dtype):
    """Views whose rows' distance from a boundary changes from row to row, with a gradient at other distances."""
    for offset, width, classes in (
        (1, 140, 130),
        (2, 144, 131),
        (3, 137, 134),
        (4, 132, 128),
        (1, 10, 5),
        (5, 2100, 2090),
    ):
        x = logits(4, width, dtype)[:, offset : offset + classes]
        check(x, targets(4, classes), ids=torch.randint(classes, (4, 3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5, 130, 133, 2100])
def test_gradient_over_the_logits(dtype, classes):
    for whole in (logits(3, classes, dtype), logits(3, classes + 3, dtype)):
        first = (whole.size(1) - classes) // 2
        x, around = whole[:, first : first + classes], whole.clone()
        y, ids = targets(3, classes), torch.randint(classes, (3, 4))
        ids[0] = y[0]  # the target, and four times
        _, expected, _ = run(x, y, ids=ids, temperature=0.8)
        run(x, y, ids=ids, temperature=0.8, grad=x)
        assert torch.equal(x, expected)
        around[:, first : first + classes] = x
        assert torch.equal(whole, around)


@LOW_AND_HIGH
@pytest.mark.parametrize("classes", [40, 3000])
def test_ids_that_repeat(dtype, classes):
    """All of them one class, the target among them, every class several times."""
    y = targets(4, classes)
    for ids in (
        torch.full((4, 7), 3),
        y.clamp(min=0)[:, None].expand(4, 3).contiguous(),
        torch.randint(classes, (4, 100)),
        torch.arange(4 * 65).reshape(4, 65) % classes,
    ):
        check(logits(4, classes, dtype), y, ids=ids)


def test_most_ids():
    classes = 1500
    ids = torch.randint(classes, (3, 1024))
    check(logits(3, classes, torch.float32), targets(3, classes), ids=ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gap", [20.0, 80.0])
@pytest.mark.parametrize("target", [3, 5])
def test_one_logit_far_above_the_others(dtype, gap, target):
    for classes in (50, 3000):
        x = (torch.randn(1, classes) * 0.1).to(dtype)
        x[0, 3] = gap
        y, ids = torch.tensor([target]), torch.tensor([[3, 5, 3]])
        check(x, y, ids=ids)
        for name in ("log_prob", "entropy"):  # alone, so that no larger gradient hides it
            check(x, y, with_gradient=(name,))


@pytest.mark.parametrize(
    "row",
    [
        [-INF] * 37,
        [-INF] * 30 + [3.0, -INF, 1.0] + [-INF] * 4,
        [-INF] * 36 + [2.0],
        [0.0] * 36 + [NAN],
        [NAN, 1.0] * 18 + [NAN],
        [1e4, -1e4, 0.0, 9999.0, 1.0] + [9990.0] * 32,
        [1e8, 1e8] + [-1e8] * 35,
        [-200.0] * 36 + [-210.0],
        [2.0] * 37,
        [1.0, 3.0] * 18 + [3.0],
    ],
    ids=lambda row: str(row[:1] + row[-1:]),
)
def test_special_rows(row):
    x = torch.tensor([[0.1] * 37, row])
    ids = torch.tensor([[4, 5], [36, 1]])
    for y in ([1, 36], [36, 0], [-100, 4]):
        check(x, torch.tensor(y), ids=ids)
        check(x, torch.tensor(y), asked=("entropy",), with_gradient=("entropy",), temperature=2.0)


@LOW_AND_HIGH
def test_ignored_rows_are_not_read(dtype):
    x, ids = logits(4, 77, dtype), torch.randint(77, (4, 2))
    x[1], x[3], ids[1], ids[3] = NAN, INF, -5, 10**10
    y = torch.tensor([5, -100, 76, -100])
    fields, grad, _ = run(x, y, ids=ids, temperature=torch.tensor([1.0, 0.0, 2.0, NAN]))
    for name, value in fields.items():
        assert value[1::2].eq(-1 if name == "argmax" else 0).all(), name
        assert value[::2].isfinite().all()
    assert grad[1::2].eq(0).all() and grad.isfinite().all()


def fields_and_gradient(x, y, ids, incoming, options):
    """Everything that a row kernel gives, one row a line."""
    acc = accumulator(x.dtype)
    temperature = None if options[0] is None else torch.full((len(x),), options[0], dtype=acc)
    arguments = (temperature, ids, -100, 1.0, options[1])
    *results, saved = forward(x, y, *arguments, [True] * len(FIELDS))
    grad = torch.full((len(x), x.size(1) + 3), NAN, dtype=x.dtype)[:, 1 : x.size(1) + 1]
    backward(*incoming, saved, x, y, *arguments, grad)
    return [*results, saved.t(), grad]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [(None, None), (0.7, 5.0)], ids=str)
@pytest.mark.parametrize("classes", [1000, 9001] if INTERPRETED else [37, 1000, 2047, 3001, 9001])
def test_a_row_has_the_same_bits_wherever_it_stands(dtype, options, classes):
    """At every distance from a boundary, in any number of rows, alone, and in rows that lie further apart."""
    row, y, ids = logits(1, classes, dtype), torch.tensor([classes // 2]), torch.randint(classes, (1, 9))
    acc = accumulator(dtype)
    incoming = [torch.randn(1, dtype=acc) for _ in range(3)] + [torch.randn(1, 9, dtype=acc)]
    truth = fields_and_gradient(row, y, ids, incoming, options)
    ways = ((8, 0, 0), (9, 1, 1), (3, 8, 2), (32, 3, 0)) if not INTERPRETED else ((4, 0, 0), (3, 1, 1), (3, 8, 0))
    for rows, gap, first in ways:
        whole = logits(rows, first + classes + gap, dtype)
        x = whole[:, first : first + classes]
        x.copy_(row.expand(rows, -1))
        x[1] = logits(1, classes, dtype)[0]
        got = fields_and_gradient(x, *(t.expand(rows, *t.shape[1:]).contiguous() for t in (y, ids)),
                                  [t.expand(rows, *t.shape[1:]).contiguous() for t in incoming], options)  # fmt: skip
        for i, (a, b) in enumerate(zip(got, truth, strict=True)):
            for line in (0, *range(2, rows)):
                assert torch.equal(a[line], b[0]), (i, line, rows, gap, first)


def test_no_rows():
    fields, grad, _ = run(
        torch.empty(0, 5), torch.empty(0, dtype=torch.int64), ids=torch.empty(0, 3, dtype=torch.int64)
    )
    assert fields["top_log_prob"].shape == (0, 3) and grad.shape == (0, 5)
    y = torch.full((3,), -100)
    fields, _, _ = run(torch.empty(3, 0), y)
    assert fields["argmax"].eq(-1).all() and fields["entropy"].eq(0).all()


def test_no_ids():
    check(logits(3, 20, torch.float32), targets(3, 20), ids=torch.empty(3, 0, dtype=torch.int64))


# Text of csrc/cuda/log_probs.cu, what it becomes, and the test that must fail.
PLANTED = {
    "pieces joined at the wrong place": ("(bytes & 4) != 0 ? words[i + 1]", "(bytes & 4) != 0 ? words[i]", "start_anywhere"),
    "places read too late": ("  if (places > 0) sync_block();\n", "", "over_the_logits"),
    "a largest that is left out twice": (" + 1;  // with the top of that side", ";", "sizes and 2048"),
    "a NaN dropped": ("z[i + apart] = lesser_or_nan(a, b);", "z[i + apart] = a < b ? a : b;", "special_rows"),
    "threads by the number of rows": ("threads = kWarp * ceil", "threads = c.rows % 2 * kWarp + kWarp * ceil", "same_bits"),
    "sums that follow the alignment": (
        "= read_columns<general>(r, row);",
        "= read_columns<general>(r, row);\n  s.others += items_to_boundary(row.logits) * A(1e-6);",
        "same_bits",
    ),
    "a repeated id counted once": ("own += incoming[i];", "own = incoming[i];", "ids_that_repeat"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not EMULATED, reason="plants bugs in the CUDA kernels")
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(bug):
    import cuda_host

    old, new, test = PLANTED[bug]
    library = cuda_host.build_mutant("log_probs", "log_probs.cu", old, new)
    env = {"FASTLLM_CUDA_HOST_LIBRARY": str(library), "FASTLLM_BACKEND": "cuda"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-x", "-k", test, __file__]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout[-2000:]
    assert re.search(r"AssertionError|^E +assert", run.stdout, re.M), run.stdout[-2000:]
