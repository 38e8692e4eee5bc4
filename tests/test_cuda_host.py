"""The host build of the CUDA kernels: what it plays, what it catches, and bugs planted in a kernel."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Waits
from operations import plain_calls

import fastllm
import fastllm.functional as F

if os.environ.get("FASTLLM_CUDA_HOST") != "1":
    pytest.skip("needs the host build: FASTLLM_CUDA_HOST=1", allow_module_level=True)

import cuda_host

pytestmark = pytest.mark.numbers

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def library():
    found = ctypes.CDLL(str(cuda_host.build_selftest()))
    found.selftest_failure.restype = ctypes.c_char_p
    return found


@pytest.fixture
def play(library):
    def run(name, data, number=0):
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        status = library.selftest(name.encode(), pointer, ctypes.c_int64(data.size), ctypes.c_int64(number))
        assert status in (0, 1)
        return library.selftest_failure().decode() if status else ""

    return run


def aligned(count: int) -> np.ndarray:
    """Zeros that start at a 16-byte boundary."""
    room = np.zeros(count + 4, np.float32)
    return room[(-room.ctypes.data % 16) // 4 :][:count]


def test_functions_of_a_warp_and_a_block(play):
    data = aligned(1)
    assert play("warp_functions", data) == "" and data[0] == 0
    assert play("conversions", data) == "" and data[0] == 0


def test_a_missing_barrier_shows_in_the_result(play):
    for name, right in (("reverse", np.arange(64.0)[::-1]), ("twice", np.full(64, 12.0))):
        data = np.arange(64, dtype=np.float32)
        assert play(name, data, 1) == "" and np.array_equal(data, right)
        wrong = 0
        for _ in range(5):
            data = np.arange(64, dtype=np.float32)
            assert play(name, data, 0) == ""
            wrong += not np.array_equal(data, right)
        assert wrong == 5


@pytest.mark.parametrize("blocks", [2, 8, 16])
def test_clusters(play, blocks):
    data = aligned(2 * blocks)
    assert play("sum_of_cluster", data, blocks) == ""
    half = np.arange(1, blocks + 1).sum()
    assert np.array_equal(data, np.repeat([half, half + blocks * blocks], blocks))
    assert play("sum_without_barrier", data, blocks) == "" and np.isnan(data).any()


def test_memory_is_watched(play):
    data = aligned(8)
    assert play("read_at", data, 7) == ""
    assert "load of 4 bytes outside" in play("read_at", data, 8)
    assert "load of 4 bytes outside" in play("read_at", data, -1)
    assert play("read_four_at", data, 4) == ""
    assert "misaligned load of 16 bytes" in play("read_four_at", data, 3)
    assert "load of 16 bytes outside" in play("read_four_at", data, 8)
    assert play("write_shared_at", data, 511) == ""
    assert "shared memory written outside" in play("write_shared_at", data, 512)
    assert "shared memory written outside" in play("write_shared_at", data, -1)


def test_waits_that_never_end_are_reported(play):
    data = aligned(1)
    assert "32 threads wait at a barrier" in play("barrier_for_some", data)
    assert "threads wait" in play("exchange_for_some", data)
    assert "threads wait" in play("wait_for_ever", data)
    assert "no GPU accepts" in play("threads", data, 33) and "no GPU accepts" in play("threads", data, 2048)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mse_loss_of_views_that_start_anywhere(offset, dtype):
    """One distance from a boundary for all arrays is peeled (the loss alone); different ones are walked item by item."""
    x = torch.randn(3005).to(dtype)[offset:].detach().requires_grad_()
    for other in (offset, 0):
        t = torch.randn(3005).to(dtype)[other : x.numel() + other]
        grads, losses = [], []
        for backend, like in (("cuda", dtype), ("eager", torch.float64)):
            with fastllm.use_backend(backend):
                grads.append(torch.autograd.grad(F.mse_loss(x, t, reduction="sum"), x)[0])
                losses.append(F.mse_loss(x.detach().to(like), t.to(like)).to(dtype))
        torch.testing.assert_close(*grads)
        torch.testing.assert_close(*losses)


def test_mse_loss_of_arrays_apart_is_shared_by_all_blocks():
    """A thread that holds 2^24 loses each 1 that it adds: few elements a thread, few lost."""
    x, t = torch.ones(64 * 4096 + 1)[1:], torch.zeros(64 * 4096)  # 64 blocks
    x[0] = 4096
    with fastllm.use_backend("cuda"):
        loss = F.mse_loss(x, t, reduction="sum").double().item()
    assert abs(loss - (2**24 + x.numel() - 1)) <= 32


def test_no_operation_waits_for_the_device():
    served = set()
    for op, arguments in plain_calls():
        name = op.default._schema.name.split("::")[1]
        if not hasattr(torch.ops.fastllm_cuda, name):
            continue
        served.add(name)
        with Waits():
            getattr(torch.ops.fastllm_cuda, name).default(*arguments)
    declared = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastllm_cuda::")}
    assert served == declared


# Kernel, file, text, and what it becomes: each must fail a test.
PLANTED = {
    "a missing barrier": (
        "common.cuh",
        "if (lane == 0) scratch[warp] = value;\n  sync_block();",
        "if (lane == 0) scratch[warp] = value;",
    ),
    "an off-by-one at the tail": ("mse_loss.cu", "outside = count - vectors", "outside = count - 1 - vectors"),
    "a missing peel": ("mse_loss.cu", "< m.count ? to_boundary :", "< m.count ? 0 * to_boundary :"),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(bug):
    library = cuda_host.build_mutant("mse_loss", *PLANTED[bug])
    tests = [ROOT / "tests" / "test_mse_loss.py", ROOT / "tests" / "test_cuda_host.py", "-k", "mse_loss", "-x"]
    env = {"FASTLLM_CUDA_HOST_LIBRARY": str(library), "FASTLLM_BACKEND": "cuda"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *tests]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout[-2000:]
    expected = "misaligned" if bug == "a missing peel" else "AssertionError"
    assert expected in run.stdout
