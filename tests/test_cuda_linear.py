"""The products of linear_relu and relu_mlp on backend cuda, way by way, played on the CPU."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as TF
from helpers import check_against_float64

import fastllm
import fastllm.functional as F

if os.environ.get("FASTLLM_CUDA_HOST") != "1":
    pytest.skip("needs the host build: FASTLLM_CUDA_HOST=1", allow_module_level=True)

import cuda_host

pytestmark = pytest.mark.numbers

LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def backend():
    torch.manual_seed(0)
    with fastllm.use_backend("cuda"):
        yield


@pytest.fixture
def way(monkeypatch):
    return lambda name: monkeypatch.setenv("FASTLLM_CUDA_GEMM", name)


def inputs(dtype, *shapes, offset=0, grad=True):
    """Random tensors whose memory starts ``offset`` items after a 16-byte boundary."""
    made = []
    for shape in shapes:
        count = torch.Size(shape).numel()
        room = torch.randn(count + offset).to(dtype) * (max(shape[-1], 1) ** -0.5 if len(shape) > 1 else 1)
        made.append(room[offset:].view(shape).detach().requires_grad_(grad))
    return made


def reference(x, w, b=None):
    return torch.relu(TF.linear(x, w, b))


def reference_mlp(x, w1, b1, w2, b2):
    return TF.linear(torch.relu(TF.linear(x, w1, b1)), w2, b2)


def check(m, n, k, dtype, bias=True, offset=0):
    x, w, b = inputs(dtype, (m, k), (n, k), (n,), offset=offset)
    check_against_float64(F.linear_relu, reference, [x, w, b if bias else None])


def check_mlp(m, h, k, n, dtype, bias=True, offset=0):
    x, w1, b1, w2, b2 = inputs(dtype, (m, k), (h, k), (h,), (n, h), (n,), offset=offset)
    check_against_float64(F.relu_mlp, reference_mlp, [x, w1, b1 if bias else None, w2, b2 if bias else None])


# Around the edges of tiles of 64 x 64 x 32; more than 512 rows take tiles of 128 x 128.
SIZES = [(1, 8, 8), (63, 72, 40), (64, 64, 32), (65, 136, 104), (130, 8, 200), (513, 136, 40), (640, 128, 72)]
ODD = [(1, 1, 1), (3, 65, 33), (66, 9, 31), (65, 64, 7), (520, 67, 34)]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("size", SIZES + ODD, ids=str)
def test_mma(way, size, dtype):
    way("mma")
    check(*size, dtype, bias=size[0] % 2 == 1)
    m, n, k = size
    check_mlp(m, n, k, 24 if size in SIZES else 5, dtype, bias=size[0] % 2 == 1)


@pytest.mark.parametrize("name", ["plain", "mma"])
@pytest.mark.parametrize("offset", [1, 4])
def test_views_that_start_anywhere(way, name, offset):
    way(name)
    check(67, 72, 40, torch.bfloat16, offset=offset)
    check_mlp(67, 72, 40, 24, torch.bfloat16, offset=offset)


# The played GPU has four multiprocessors. Two clusters' worth of tiles of 128 x 256 x 64 are taken by clusters of two
# blocks, smaller outputs by blocks of their own in tiles of 128 x 128 x 64.
WGMMA = [(1, 8, 64), (127, 136, 72), (129, 120, 8), (130, 1032, 24), (390, 264, 200), (300, 520, 136), (256, 512, 520)]
WGMMA += [(256, 384, 136), (100, 776, 328)]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("size", WGMMA, ids=str)
def test_wgmma(way, size, dtype):
    way("wgmma")
    m, n, k = size
    check(m, n, k, dtype, bias=m % 2 == 1)


def test_wgmma_in_relu_mlp(way):
    way("wgmma")
    check_mlp(130, 72, 40, 24, torch.bfloat16)


def test_wgmma_of_views(way):
    """Rows apart, an inner size that is no whole piece of 16 bytes, a bias that starts anywhere even."""
    way("wgmma")
    x, w = inputs(torch.bfloat16, (70, 48), (136, 48), grad=False)
    b = torch.randn(140).bfloat16()[2:138]
    check_against_float64(F.linear_relu, reference, [x[:, :37], w[:, :37], b])


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["mma", "wgmma"])
def test_nan_and_infinity(way, name, dtype):
    way(name)
    x, w = torch.randn(130, 64), torch.eye(64)
    x[5, 3], x[129, 63], x[0, 0] = float("nan"), float("-inf"), -0.0
    w[7, 7] = float("inf")
    x, w = x.to(dtype), w.to(dtype)
    torch.testing.assert_close(F.linear_relu(x, w), reference(x, w), equal_nan=True)


@pytest.mark.parametrize("name", ["plain", "mma"])
def test_gradient_passes_where_hidden_is_nan(way, name):
    way(name)
    x, w1, w2 = inputs(torch.bfloat16, (5, 8), (16, 8), (8, 16))
    x.data[2, 1] = float("nan")
    results = []
    for function in (F.relu_mlp, reference_mlp):
        output = function(x, w1, None, w2, None)
        results.append(torch.autograd.grad(output, [x, w1, w2], torch.ones_like(output)))
    for ours, eager in zip(*results, strict=True):
        assert torch.equal(ours.isnan(), eager.isnan())


@pytest.mark.parametrize("name", ["plain", "mma", "wgmma"])
def test_repeats_bit_for_bit(way, name):
    way(name)
    args = inputs(torch.bfloat16, (530, 64), (136, 64), (136,), (8, 136), (8,))

    def run():
        output = F.relu_mlp(*args)
        return [output, *torch.autograd.grad(output, args, torch.ones_like(output))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("name", ["mma", "wgmma"])
def test_rounds_once(way, name):
    """Product and bias nearly cancel: rounding the product first would give a wrong sign."""
    way(name)
    x, w = torch.ones(4, 256).bfloat16(), torch.full((64, 256), 1 + 2**-7).bfloat16()
    b = torch.full((64,), -257.0).bfloat16()
    assert torch.equal(F.linear_relu(x, w, b), reference(x.double(), w.double(), b.double()).bfloat16())


@pytest.mark.parametrize("name", ["plain", "mma", "wgmma"])
@pytest.mark.parametrize("shape", [(0, 8, 8), (8, 0, 8), (8, 8, 0)], ids=str)
def test_empty(way, name, shape):
    way(name)
    check(*shape, torch.bfloat16)
    m, h, k = shape
    check_mlp(m, h, k, 8, torch.bfloat16)


@pytest.mark.parametrize("columns", [1, 3, 8, 31, 40, 257, 2050])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW], ids=str)
def test_passes_around_library_products(way, dtype, columns):
    """Bias and ReLU, mask and sums: folded rows of every kind, more rows than a block walks at once."""
    way("plain")
    rows = 20000 if columns == 1 else 1100 if columns < 40 else 70
    check(rows, columns, 3, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_the_librarys_epilogue(way, dtype):
    """Bias and ReLU in PyTorch's own product; the hidden gradient is masked in a pass of ours."""
    way("library")
    for rows, columns in ((1, 1), (5, 70), (70, 3)):
        check(rows, columns, 9, dtype)


@pytest.mark.parametrize(
    ("dtype", "size", "offset", "library"),
    [
        (torch.bfloat16, (5, 16, 24), 0, True),
        (torch.float16, (1, 8, 8), 8, True),
        (torch.bfloat16, (5, 16, 20), 0, False),
        (torch.bfloat16, (5, 20, 16), 0, False),
        (torch.bfloat16, (5, 16, 24), 4, False),
        (torch.float32, (5, 16, 24), 0, False),
    ],
)
def test_who_multiplies_by_default(dtype, size, offset, library):
    """The library's epilogue keeps NaN for rows of whole, aligned pieces of 16 bytes; else a pass takes the ReLU."""
    m, n, k = size
    x, w, b = inputs(dtype, (m, k), (n, k), (n,), offset=offset, grad=False)
    for args in ((x, w, b), (x, w)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            F.linear_relu(*args)
            F.relu_mlp(*args[:2], args[2] if len(args) > 2 else None, w.t().contiguous(), None)
        calls = sum(e.count for e in profile.key_averages() if e.key == "aten::_addmm_activation")
        assert calls == (2 if library and len(args) > 2 else 0)
    check(m, n, k, dtype, offset=offset)


def test_a_way_that_cannot_be_taken_is_refused(way):
    x, w = inputs(torch.float32, (4, 8), (8, 8), grad=False)
    way("fast")
    with pytest.raises(
        RuntimeError, match="linear_relu: FASTLLM_CUDA_GEMM must be plain, library, mma or wgmma, got fast"
    ):
        F.linear_relu(x, w)
    way("mma")
    with pytest.raises(RuntimeError, match="FASTLLM_CUDA_GEMM=mma needs bfloat16 or float16"):
        F.linear_relu(x, w)
    with pytest.raises(RuntimeError, match="FASTLLM_CUDA_GEMM=mma needs bfloat16 or float16"):
        F.relu_mlp(x, w, None, w, None)
    way("wgmma")
    with pytest.raises(RuntimeError, match="FASTLLM_CUDA_GEMM=wgmma needs rows of input, weight and output"):
        F.linear_relu(torch.ones(4, 7).bfloat16(), torch.ones(8, 7).bfloat16())


# Kernel, text, what it becomes, the tests of which one must fail.
PLANTED = {
    "a stage given back too soon": ("gemm_wgmma", "wgmma_wait<1>();", "wgmma_wait<2>();", "test_wgmma"),
    "a missing barrier": ("gemm_mma", "    sync_block();  // this", "    // this", "test_mma"),
    "an off-by-one at the tail": ("linear_relu", "i + j >= f.count) break", "i + j > f.count) break", "test_passes"),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(bug):
    kernel, old, new, tests = PLANTED[bug]
    library = cuda_host.build_mutant(kernel, f"{kernel}.cu", old, new)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-x", __file__, "-k", tests]
    env = {**os.environ, "FASTLLM_CUDA_HOST_LIBRARY": str(library)}
    run = subprocess.run(command, cwd=cuda_host.ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout[-2000:]
    assert ("outside every tensor" if "tail" in bug else "AssertionError") in run.stdout
