"""The contract on a GPU: every case of ``operations.py`` on CUDA tensors, and what only a device can show.

``make gpu-check`` runs this. Without a GPU the file is skipped; FASTLLM_TEST_DEVICE=cpu with TRITON_INTERPRET=1 or
FASTLLM_CUDA_HOST=1 runs the parts that need none, so that the tests themselves are tested.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as TF
from helpers import check_against_float64
from operations import cases_of, small_cases

import fastllm
import fastllm.functional as F
from fastllm.models import MLPLanguageModel

DEVICE = os.environ.get("FASTLLM_TEST_DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
TABLE = fastllm.backends.TABLE
BACKENDS = [b for b in ("cuda", "triton") if TABLE[b].missing is None and DEVICE in TABLE[b].device_types]
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with torch.device(DEVICE), fastllm.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", fastllm.backends.OPERATIONS)
def test_error_against_float64(op, dtype):
    cases = cases_of(op, dtype)
    if os.environ.get("FASTLLM_TESTS") == "few":  # under compute-sanitizer
        cases = cases[::20]
    for case in cases if DEVICE == "cuda" else cases[:3]:
        try:
            check_against_float64(case.ours, case.reference, case.inputs)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None


@pytest.mark.parametrize("index", range(len(small_cases())))
def test_gradcheck(index):
    case = small_cases()[index]  # made here, on the device
    assert torch.autograd.gradcheck(case.ours, case.inputs, fast_mode=True)


def _steps():
    """Scalar losses that between them launch every kernel, and their leaves."""
    torch.manual_seed(0)
    x = torch.randn(300, 64, requires_grad=True)
    head = torch.randn(501, 64, requires_grad=True)
    w1, b1 = torch.randn(96, 64, requires_grad=True), torch.randn(96, requires_grad=True)
    w2, b2 = torch.randn(64, 96, requires_grad=True), torch.randn(64, requires_grad=True)
    ids, y = torch.randint(0, 501, (300,)), torch.randint(0, 501, (300,))
    yield lambda: F.cross_entropy(F.embedding(ids, head) @ head.t(), y, label_smoothing=0.1), [head]
    yield lambda: F.linear_cross_entropy(x, head, y), [x, head]
    yield lambda: F.mse_loss(F.relu_mlp(x, w1, b1, w2, b2), F.linear_relu(x, w2.t(), b1)[:, :64]), [x, w1, b1, w2, b2]


@pytest.mark.parametrize("index", range(3))
def test_repeats_bit_for_bit(index):
    step, leaves = list(_steps())[index]
    first = torch.autograd.grad(step() * 3, leaves)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(step() * 3, leaves), strict=True))


@on_gpu
@pytest.mark.parametrize("index", range(3))
def test_no_operation_waits_for_the_device(index):
    step, leaves = list(_steps())[index]
    torch.autograd.grad(step(), leaves)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(step(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("index", range(3))
def test_a_captured_step_replays(index):
    step, leaves = list(_steps())[index]
    expected = torch.autograd.grad(step(), leaves)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(step(), leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(step(), leaves)
    for _ in range(2):
        for grad in captured:
            grad.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))


@pytest.fixture(params=["plain", "library", "mma", "wgmma"])
def way(request, backend, monkeypatch):
    """Who multiplies in linear_relu and relu_mlp on backend cuda; what this GPU cannot do is skipped."""
    if backend != "cuda":
        pytest.skip("the ways of backend cuda")
    monkeypatch.setenv("FASTLLM_CUDA_GEMM", request.param)
    try:
        F.linear_relu(torch.ones(8, 8, dtype=torch.bfloat16), torch.ones(8, 8, dtype=torch.bfloat16))
    except RuntimeError as refused:
        if "needs" not in str(refused):
            raise
        pytest.skip(str(refused))
    return request.param


def reference_mlp(x, w1, b1, w2, b2):
    return TF.linear(torch.relu(TF.linear(x, w1, b1)), w2, b2)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("m", "h", "k", "n"), [(1, 64, 64, 8), (100, 520, 264, 72), (5000, 3000, 776, 760), (4096,) * 4]
)
def test_products_with_an_epilogue(way, dtype, m, h, k, n):
    torch.manual_seed(0)
    shapes = [(m, k), (h, k), (h,), (n, h), (n,)]
    x, w1, b1, w2, b2 = (torch.randn(s).mul(s[-1] ** -0.5).to(dtype).requires_grad_() for s in shapes)
    check_against_float64(F.linear_relu, lambda x, w, b: torch.relu(TF.linear(x, w, b)), [x, w1, b1])
    check_against_float64(F.relu_mlp, reference_mlp, [x, w1, b1, w2, b2])
    results = []
    for _ in range(2):
        output = F.relu_mlp(x, w1, b1, w2, b2)
        results.append([output, *torch.autograd.grad(output, [x, w1, b1, w2, b2], torch.ones_like(output))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@on_gpu
def test_relu_of_nan(way):
    x, w = torch.randn(130, 64), torch.eye(64)
    x[5, 3], x[129, 63], w[7, 7] = float("nan"), float("-inf"), float("inf")
    x, w = x.bfloat16(), w.bfloat16()
    torch.testing.assert_close(F.linear_relu(x, w), torch.relu(TF.linear(x, w)), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(130, 96, 64), (1, 96, 64), (33, 200, 100), (64, 97, 64), (64, 96, 65)])
def test_nan_goes_through_by_default(m, n, k, dtype):
    """Sizes at which a library's ReLU epilogue made NaN 0 among them."""
    x, w, b = (torch.randn(s).to(dtype) for s in [(m, k), (n, k), (n,)])
    b[3], w[9, 0], x[m - 1, k - 1] = float("nan"), float("nan"), float("nan")
    found = F.linear_relu(x, w, b)
    assert torch.equal(found.isnan(), torch.relu(TF.linear(x, w, b)).isnan()) and found[0, 3].isnan()


@on_gpu
def test_more_than_2_to_the_31_logits():
    n, v = 16500, 131072
    x = torch.randn(n, v, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randint(0, v, (n,))
    grad = torch.autograd.grad(F.cross_entropy(x, y, reduction="sum"), x)[0]
    rows = torch.tensor([0, 1, n // 2, n - 2, n - 1])
    leaf = x.detach()[rows].double().requires_grad_()
    TF.cross_entropy(leaf, y[rows], reduction="sum").backward()
    torch.testing.assert_close(grad[rows].double(), leaf.grad, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_several_chunks_of_logits(dtype):
    """More rows than a chunk: on CUDA the weight's gradient is added in float32 by the library."""
    rows = 9000 if DEVICE == "cuda" else 70
    y = torch.randint(0, 130, (rows,))
    inputs = [torch.randn(rows, 48).to(dtype).requires_grad_(), torch.randn(130, 48).to(dtype).requires_grad_()]
    check_against_float64(
        lambda x, w: F.linear_cross_entropy(x, w, y), lambda x, w: TF.cross_entropy(TF.linear(x, w), y), inputs
    )


@on_gpu
def test_compiled_model_trains():
    torch.manual_seed(0)
    model = MLPLanguageModel(200, 16, 32)
    ids, y = torch.randint(0, 200, (64,)), torch.randint(0, 200, (64,))
    expected = torch.autograd.grad(model.loss(ids, y), list(model.parameters()))
    loss = torch.compile(model.loss, fullgraph=True)(ids, y)
    for a, b in zip(expected, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@on_gpu
@pytest.mark.parametrize("op", ["embedding", "cross_entropy"])
def test_an_index_out_of_range(op, backend):
    """A device-side assertion, or with FASTLLM_CHECK=1 an IndexError that names the position; in a process of its own."""
    call = {
        "embedding": "F.embedding(torch.tensor([1, 7], device='cuda'), torch.ones(5, 3, device='cuda'))",
        "cross_entropy": "F.cross_entropy(torch.ones(2, 5, device='cuda'), torch.tensor([1, 7], device='cuda'))",
    }[op]
    code = f"import torch, fastllm.functional as F\n{call}\ntorch.cuda.synchronize()"
    for check, words in (("0", "assert"), ("1", "got 7 at position 1")):
        env = {**os.environ, "FASTLLM_CHECK": check, "FASTLLM_BACKEND": backend}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert run.returncode != 0 and words in run.stderr, run.stderr[-2000:]
        assert ("IndexError" in run.stderr) == (check == "1")
