"""The one yardstick of the tests: float64 truth, and PyTorch's own error in the same dtype beside ours."""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INSTRUCTION_SETS = ("default", "avx2", "avx512")  # values of ATEN_CPU_CAPABILITY

# CUDA kernels as fibers, Triton kernels interpreted: some thousand times slower than the kernels of the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("FASTLLM_CUDA_HOST") == "1" or INTERPRETED
# Where tests make their tensors (conftest.py): a GPU under FASTLLM_TEST_DEVICE=cuda.
DEVICE = "cuda" if os.environ.get("FASTLLM_TEST_DEVICE") == "cuda" and torch.cuda.is_available() else "cpu"
cpu_kernels = pytest.mark.skipif(
    EMULATED or DEVICE != "cpu", reason="about the CPU's kernels: their caches, their threads, their cuts"
)

# What is granted on top of twice PyTorch's error, relative to the size of the result.
EPSILON = {torch.float32: 2e-6, torch.float64: 2e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def drawn(like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Normal numbers of the shape, dtype and device of ``like``; the same ones on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu").to(like)


def _run(function: Callable, inputs: Sequence, dtype: torch.dtype | None, seed: int):
    """Output, and the gradients of the inputs that require one for a random incoming gradient."""
    args = []
    for value in inputs:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            copy = value.detach()
            if dtype is not None:
                copy = copy.to(dtype)
            args.append(copy.requires_grad_(value.requires_grad))
        else:
            args.append(value)
    output = function(*args)
    wanted = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    if not wanted:
        return output, []
    # Drawn in the inputs' own dtype, so that every run differentiates with the same incoming gradient.
    low = next(v.dtype for v in inputs if isinstance(v, torch.Tensor) and v.is_floating_point())
    incoming = drawn(output.new_empty(output.shape, dtype=low), seed).to(output)
    return output, list(torch.autograd.grad(output, wanted, incoming))


def _error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute error; infinite where one is NaN or infinite and the other is not the same."""
    value, truth = value.detach().double(), truth.detach().double()
    same = (value == truth) | (value.isnan() & truth.isnan())
    difference = torch.where(same, torch.zeros_like(truth), (value - truth).abs())
    if difference.numel() == 0:
        return 0.0
    return float(torch.nan_to_num(difference, nan=float("inf")).max())


def check_against_float64(
    ours: Callable, reference: Callable, inputs: Sequence, *, seed: int = 0, factor: float = 2.0, slack: float = 1.0
) -> None:
    """Assert ``error(ours) <= factor * error(PyTorch) + slack * epsilon * max|truth|``, output and every gradient.

    ``reference`` is run twice: in float64 for the truth, and in the inputs' dtype for PyTorch's own error. Inputs are
    tensors (those that require a gradient are differentiated) and anything else, passed through.
    """
    dtype = next(v.dtype for v in inputs if isinstance(v, torch.Tensor) and v.is_floating_point())
    got, got_grads = _run(ours, inputs, None, seed)
    truth, truth_grads = _run(reference, inputs, torch.float64, seed)
    eager, eager_grads = _run(reference, inputs, None, seed)
    assert got.shape == eager.shape and got.dtype == eager.dtype, (got.shape, got.dtype, eager.shape, eager.dtype)
    names = ["output", *(f"gradient {i}" for i in range(len(got_grads)))]
    for name, g, t, e in zip(names, [got, *got_grads], [truth, *truth_grads], [eager, *eager_grads], strict=True):
        assert g.shape == e.shape and g.dtype == e.dtype, (name, g.shape, g.dtype, e.shape, e.dtype)
        # A result beyond the dtype's range is infinite for PyTorch too: compare what the dtype can hold.
        t = t.detach().double()
        t = torch.where(t.abs() > torch.finfo(dtype).max, t.to(dtype).double(), t)
        finite = t[torch.isfinite(t)]
        size = float(finite.abs().max()) if finite.numel() else 0.0
        bound = factor * min(_error(e, t), size if size else float("inf")) + slack * EPSILON[dtype] * size + 1e-45
        error = _error(g, t)
        assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g} (PyTorch's {_error(e, t):.3g}, max {size:.3g})"


# Imports torch once, then forks for each request: a line of JSON with code, environment and files for its output.
_SERVER = """
import json, os, signal, sys
import torch
for line in sys.stdin:
    request = json.loads(line)
    if (child := os.fork()) == 0:
        break
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(request["timeout"])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
signal.signal(signal.SIGALRM, signal.SIG_DFL)
os.environ.update(request["env"])
for number, name in enumerate(["/dev/null", request["stdout"], request["stderr"]]):
    os.dup2(os.open(name, os.O_RDWR), number)
sys.path.append(request["tests"])
import conftest
exec(compile(request["code"], "<code>", "exec"), {"__name__": "__main__"})
"""
_server: list[subprocess.Popen] = []


def run_python(code: str, env: dict[str, str] | None = None, timeout: int = 300) -> subprocess.CompletedProcess:
    """Run ``code`` in a process of its own that has imported torch and nothing of ours, on what conftest.py chooses.

    An instruction set and most variables of ours are read once in a process, after this; what torch reads while it is
    imported (OMP_NUM_THREADS) is that of the tests.
    """
    if not _server or _server[0].poll() is not None:
        command, pipe = [sys.executable, "-c", _SERVER], subprocess.PIPE
        _server[:] = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)]
        atexit.register(_server[0].kill)
    server, start = _server[0], time.monotonic()
    with tempfile.NamedTemporaryFile("r", errors="replace") as out, tempfile.NamedTemporaryFile("r") as err:
        request = {"code": code, "env": env or {}, "timeout": timeout, "stdout": out.name, "stderr": err.name}
        request["tests"] = str(Path(__file__).resolve().parent)
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        if status == -signal.SIGKILL and time.monotonic() - start >= timeout:
            raise subprocess.TimeoutExpired(code, timeout, out.read(), err.read())
        return subprocess.CompletedProcess(code, status, out.read(), err.read())


def bytes_left(function: Callable) -> int:
    """Memory, in bytes, that is allocated in ``function()`` and not freed while its result is held.

    On the CPU memory of ``fastllm.memory``'s pool is not seen: tensors must be smaller than 512 KiB. On a GPU an
    allocation is counted in whole units of the allocator, 512 bytes.
    """
    function()  # what a first call leaves for good
    if DEVICE == "cuda":
        found = []
        for _ in range(5):  # the median: other tests' memory is freed meanwhile
            gc.collect()
            before = torch.cuda.memory_allocated()
            held = function()
            found.append(torch.cuda.memory_allocated() - before)
            del held
        return sorted(found)[2]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        held = function()
    del held
    return sum(event.self_cpu_memory_usage for event in profile.events())


WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "bincount", "_unique2", "unique_dim"}


class Waits(TorchDispatchMode):
    """Fails at an operation that would make the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))
