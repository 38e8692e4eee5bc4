"""``make gpu-check``: everything that a machine with a GPU, and no network, can tell; each part goes on if another fails.

Parts, of which --parts chooses some and their order:

- build: the extension, against this torch, for this GPU; left out where it is there.
- cuda, triton: a backend's tests on CUDA tensors: tests/test_gpu*.py, results and contract of every operation, and
  shapes around the constants of the kernels.
- auto: results and contract as a user gets them, without a choice of backend.
- bench: benchmarks/run.py --device cuda.
- sanitizer: compute-sanitizer's memcheck, synccheck and racecheck on a few cases of every kernel.
- suite: the CPU's tests, with this torch and this Triton.

No part runs beyond --seconds in all: what runs then is interrupted, so that pytest lists its failures, and ended with
everything that it started. ``check.md`` in the folder given by --out says in a page what failed. Uses the Python that
runs it, and pytest-xdist's processes where that is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# On a device: the tests of results, and of what an operation promises. No thread counts, no bad input to PyTorch's
# kernels, which stop the device, no compilers (test_gpu.py compiles).
OPERATIONS = ("embedding", "linear_relu", "relu_mlp", "mse_loss", "cross_entropy", "linear_cross_entropy", "log_probs")
ON_DEVICE = "not thread and not compile and not opcheck and not capability and not pool and not error_inputs"
SANITIZED = "test_error_against_float64 or test_products_with_an_epilogue or test_several_chunks"
WAIT = 10  # seconds that an interrupted command gets to report


@dataclass
class Command:
    title: str
    arguments: list[str]
    seconds: int  # that it may take
    env: dict[str, str] = field(default_factory=dict)


def architecture() -> str:
    """The GPU's architecture as TORCH_CUDA_ARCH_LIST names it."""
    import torch

    if not torch.cuda.is_available():
        return "9.0a"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if major == 9 else ''}"


def is_built() -> bool:
    code = "import fastllm, sys; sys.exit(fastllm.backends.TABLE['cuda'].missing is not None)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def commands(out: Path, workers: int, peers: str) -> dict[str, list[Command]]:
    """The commands of each part."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-rfE", "--continue-on-collection-errors"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        pytest += ["--timeout=120", "--timeout-method=thread"]  # a kernel that never ends names its test
    side_by_side = ["-n", str(workers)] if importlib.util.find_spec("xdist") is not None else []
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    # FASTLLM_TEST_DEVICE=cpu with FASTLLM_CUDA_HOST=1 or TRITON_INTERPRET=1 rehearses all this without a GPU.
    device = {"FASTLLM_TEST_DEVICE": os.environ.get("FASTLLM_TEST_DEVICE", "cuda"), "FASTLLM_CHECK": "1"}
    gpu_files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_gpu*.py"))]

    def backend(name: str) -> list[Command]:
        env = {**device, **({} if name == "auto" else {"FASTLLM_BACKEND": name})}
        tests = [*pytest, *side_by_side, "--maxfail=60"]
        files = [f"tests/test_{about}.py" for about in ("contract", "opinfo", *OPERATIONS)]
        chosen = [*files, "-m", "not slow", "-k", ON_DEVICE]
        shapes = [python, "tests/shapes.py", "--cases", "600", "--seed", "1", "--workers", str(workers)]
        found = [
            Command(f"{name}, results and contract", [*tests, *chosen], 150, env),
            Command(f"{name}, shapes", shapes, 100, env),
        ]
        if name != "auto":
            found.insert(0, Command(f"{name}, on a device", [*tests, *gpu_files, "-k", f"[{name}"], 150))
        return found

    def sanitized(tool: str, name: str) -> Command:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *pytest, "tests/test_gpu.py"]
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "FASTLLM_TESTS": "few"}
        return Command(f"sanitizer, {tool}, {name}", [*command, "-k", f"({SANITIZED}) and [{name}"], 150, env)

    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    required = {"FASTLLM_REQUIRE_NATIVE": "1", "FASTLLM_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture()}
    bench = [python, "benchmarks/run.py", "--device", "cuda", "--out", str(out), "--peers", peers]
    suite = [*pytest, *side_by_side, "tests", "-m", "not slow", "--maxfail=10"]
    elsewhere = ["test_gpu.py", "test_build.py", "test_install.py", "test_cuda_aot.py", "test_triton_aot.py"]
    suite += [f"--ignore=tests/{name}" for name in (*elsewhere, "test_benchmarks.py")]
    return {
        "build": [] if is_built() else [Command("build", build, 300, required)],
        "cuda": backend("cuda"),
        "triton": backend("triton"),
        "auto": backend("auto"),
        "bench": [Command("bench", bench, 300)],
        "sanitizer": [sanitized(tool, "cuda") for tool in ("memcheck", "synccheck", "racecheck")]
        + [sanitized("memcheck", "triton")],
        "suite": [Command("suite", suite, 300, {"CUDA_VISIBLE_DEVICES": ""})],
    }


def run(command: Command, seconds: int, log: Path, failures: Path) -> tuple[str, float]:
    """Run one command with its output in ``log``; how it ended, and how long it took."""
    start = time.monotonic()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "FASTLLM_TEST_FAILURES": str(failures), **command.env}
    with log.open("a") as file:
        file.write(f"\n=== {command.title}: {' '.join(command.arguments)}\n")
        file.flush()
        try:
            process = subprocess.Popen(
                command.arguments, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
            )
        except OSError as error:
            return f"FAILED ({error})", time.monotonic() - start
        try:
            code = process.wait(timeout=seconds)
            ended = "passed" if code == 0 else f"FAILED (status {code})"
        except subprocess.TimeoutExpired:
            ended = f"FAILED (more than {seconds} s)"
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=WAIT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it, or what it left
        process.wait()
    return ended, time.monotonic() - start


def page(lines: list[str], failed: list[str], out: Path) -> str:
    """What failed, the parts, and the first table of the benchmark."""
    text = ["# gpu-check", "", *(failed[:10] or ["Nothing failed."])]
    if len(failed) > 10:
        text.append(f"... and {len(failed) - 10} more failures: failures.txt")
    text += ["", "| command | result | seconds |", "| --- | --- | --- |", *lines]
    table = out / "table.md"
    if table.exists():
        text += ["", *table.read_text().splitlines()[:60]]
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--parts", default="build,cuda,triton,auto,bench,sanitizer,suite", help="in the order given")
    parser.add_argument("--seconds", type=int, default=530, help="for all parts together")
    parser.add_argument("--workers", type=int, default=max(min(12, (os.cpu_count() or 1) - 1), 1), help="processes")
    parser.add_argument("--peers", default="none", help="of the benchmark")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    parts = commands(out, options.workers, options.peers)
    unknown = set(options.parts.split(",")) - set(parts)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; known: {', '.join(parts)}")
    failures = out / "failures.txt"
    failures.write_text("")
    lines, failed = [], []
    end = time.monotonic() + options.seconds
    for part in options.parts.split(","):
        log = out / f"{part}.log"
        log.unlink(missing_ok=True)
        for command in parts[part]:
            left = int(end - time.monotonic()) - WAIT
            ended, took = "not run: no time left", 0.0
            if left > 5:
                ended, took = run(command, min(command.seconds, left), log, failures)
            if not ended.startswith("passed"):
                failed.append(f"- {command.title}: {ended}")
            lines.append(f"| {command.title} | {ended} | {took:.0f} |")
            print(f"{command.title}: {ended} in {took:.0f} s (output in {log})", flush=True)
    failed += [f"- {line}" for line in failures.read_text().splitlines()]
    text = page(lines, failed, out)
    (out / "check.md").write_text(text)
    print(text)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
