"""No shape ends the process or gives a wrong number: cases around the constants of the kernels (shapes.py)."""

import subprocess
import sys

import pytest
import torch
from helpers import INTERPRETED, check_against_float64
from shapes import Drawn, backend_of_environment, failures

import fastllm
import fastllm.functional as F

BACKEND = backend_of_environment()
SAMPLE = {"cpu": 180, "cuda": 60, "triton": 12, "device": 60}[BACKEND]
BLOCK = {"cpu": 200, "cuda": 50, "triton": 12, "device": 200}[BACKEND]  # cases of one test of the whole run
BLOCKS = {"cpu": 10, "cuda": 6, "triton": 10, "device": 10}[BACKEND]
pytestmark = [
    pytest.mark.numbers,
    pytest.mark.skipif(fastllm.backends.TABLE["cpu"].missing is not None, reason="compiled operations not built"),
]


def test_a_sample_of_the_shapes():
    assert not list(failures(BACKEND, seed=0, first=0, count=SAMPLE))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
def test_all_shapes(block):
    assert not list(failures(BACKEND, seed=1, first=block * BLOCK, count=BLOCK))


@pytest.mark.parametrize("inner", [127, 128, 129, 256, 257, 511, 513, 4095, 4096, 4097, 5000, 131072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_long_inner_dimension(inner, dtype):
    """A product of few rows and columns: beyond 4096 features it once divided by zero."""
    if BACKEND in ("cuda", "triton") and inner > 5000:
        pytest.skip("too long for an emulator")
    torch.manual_seed(0)
    for rows, columns in ((3, 4), (1, 1), (2, 33))[:: 2 if INTERPRETED else 1]:
        x = torch.randn(rows, inner).to(dtype).requires_grad_()
        w = (torch.randn(columns, inner) * inner**-0.5).to(dtype).requires_grad_()
        b = torch.randn(columns).to(dtype).requires_grad_()
        check_against_float64(
            F.linear_relu, lambda x, w, b: torch.relu(torch.nn.functional.linear(x, w, b)), [x, w, b], slack=8
        )


def test_workers_test_the_same_package():
    """Of two builds side by side (one with a sanitizer, say) the one that this process has imported."""
    import shapes

    command = [sys.executable, shapes.__file__, "--worker", f"{BACKEND}:0:0:0"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [f"fastllm {fastllm.__file__}", "end"]


@pytest.mark.skipif(BACKEND != "cpu", reason="host logic: once is enough")
def test_a_crash_names_its_case(tmp_path):
    """A worker that dies by a signal is reported with its case, and the cases after it are run."""
    import shapes

    text = open(shapes.__file__).read()
    planted = '        print(f"case {case}", flush=True)\n'
    assert text.count(planted) == 1
    bug = "        if index == 3:\n            os.kill(os.getpid(), signal.SIGFPE)\n"
    wrong = '        if index == 5:\n            print("wrong AssertionError: planted", flush=True)\n'
    copy = tmp_path / "shapes.py"
    copy.write_text(text.replace(planted, planted + bug + wrong).replace("check(case)", "pass"))
    run = subprocess.run(
        [sys.executable, copy, "--cases", "8", "--seed", "7"],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "PYTHONPATH": f"{shapes.HERE}:{shapes.HERE.parent}"},
    )
    assert run.returncode == 1 and "6 passed, 2 failed" in run.stdout
    assert f"{Drawn('cpu', 7, 3)}: ended the process by SIGFPE" in run.stdout
    assert f"{Drawn('cpu', 7, 5)}: AssertionError: planted" in run.stdout
