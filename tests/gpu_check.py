"""``make gpu-check``: everything that a machine with a GPU, and no network, can tell; each part goes on if another fails.

Parts, in the order of --parts: build (the extension, against this torch, for this GPU), gpu (tests/test_gpu.py: the
contract of every backend, CUDA graphs, more than 2^31 logits), device (the operations' own tests on CUDA tensors, for
each backend in turn), sanitizer (compute-sanitizer's memcheck and racecheck on a few cases), bench (benchmarks/run.py
--device cuda), suite (the CPU's tests, with this torch and this Triton). No part runs beyond --seconds in all. Reports
lie in the folder given by --out. Uses the Python that runs it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("cuda", "triton", "eager")
FEW = "test_error_against_float64 and torch.bfloat16 and (mse_loss or embedding or cross_entropy) and cuda"
# On a device: no thread counts, no exceptions for what stops a device instead, no compilers (test_gpu.py compiles).
ON_DEVICE = "not thread and not compile and not opcheck and not capability and not pool"


def architecture() -> str:
    """The GPU's architecture as TORCH_CUDA_ARCH_LIST names it."""
    import torch

    if not torch.cuda.is_available():
        return "9.0a"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if major == 9 else ''}"


def commands(out: Path) -> dict[str, list[tuple[str, list[str], dict[str, str], int]]]:
    """Commands of each part: title, arguments, environment and the seconds that they may take."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider"]
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture()
    required = {"FASTLLM_REQUIRE_NATIVE": "1", "FASTLLM_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures}
    contract = ["tests/test_contract.py", "tests/test_opinfo.py"]
    suite = [*pytest, "tests", "-x", "--ignore=tests/test_build.py", "--ignore=tests/test_benchmarks.py"]
    bench = [python, "benchmarks/run.py", "--device", "cuda", "--out", str(out)]

    def on_device(backend: str, files: list[str], marker: str) -> tuple[str, list[str], dict[str, str], int]:
        env = {"FASTLLM_TEST_DEVICE": "cuda", "FASTLLM_BACKEND": backend, "FASTLLM_CHECK": "1"}
        command = [*pytest, *files, "-m", f"{marker} and not slow", "-k", ON_DEVICE, "--maxfail=30"]
        return f"device, {backend}, {marker}", command, env, 150

    def sanitized(tool: str) -> tuple[str, list[str], dict[str, str], int]:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *pytest, "tests/test_gpu.py", "-k", FEW]
        return f"sanitizer, {tool}", command, {}, 120

    return {
        "build": [("build", build, required, 300)],
        "gpu": [("gpu", [*pytest, "tests/test_gpu.py"], {}, 240)],
        "device": [
            on_device(backend, files, marker)
            for backend in BACKENDS
            for files, marker in ((["tests"], "numbers"), (contract, "contract"))
        ],
        "sanitizer": [sanitized(tool) for tool in ("memcheck", "racecheck")],
        "bench": [("bench", bench, {}, 300)],
        "suite": [("suite", suite, {}, 300)],
    }


def run(name: str, command: list[str], env: dict[str, str], seconds: int, log: Path) -> tuple[str, float]:
    """Run one command with its output in ``log``; how it ended, and how long it took."""
    start = time.monotonic()
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    with log.open("a") as file:
        file.write(f"\n=== {name}: {' '.join(command)}\n")
        file.flush()
        try:
            code = subprocess.run(command, cwd=ROOT, env=env, stdout=file, stderr=file, timeout=seconds).returncode
            ended = "passed" if code == 0 else f"FAILED (status {code})"
        except subprocess.TimeoutExpired:
            ended = f"FAILED (more than {seconds} s)"
        except OSError as error:
            ended = f"FAILED ({error})"
    return ended, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--parts", default="build,gpu,bench,device,sanitizer,suite", help="in the order given")
    parser.add_argument("--seconds", type=int, default=530, help="for all parts together")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parts = commands(options.out.absolute())
    unknown = set(options.parts.split(",")) - set(parts)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; known: {', '.join(parts)}")
    lines, failed = ["| part | result | seconds |", "| --- | --- | --- |"], False
    end = time.monotonic() + options.seconds
    for part in options.parts.split(","):
        log = options.out / f"{part}.log"
        log.unlink(missing_ok=True)
        for title, command, env, seconds in parts[part]:
            left = int(end - time.monotonic())
            ended, took = (
                run(title, command, env, min(seconds, left), log) if left > 5 else ("not run: no time left", 0)
            )
            failed |= not ended.startswith("passed")
            lines.append(f"| {title} | {ended} | {took:.0f} |")
            print(f"{title}: {ended} in {took:.0f} s (output in {log})", flush=True)
    (options.out / "check.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
