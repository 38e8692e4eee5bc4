"""The whole test suite: once as installed, then the kernels' tests under every other instruction set and backend.

``--sanitize address`` builds the extension with AddressSanitizer beside the normal one and runs the kernels' tests on
it: a read or write outside a tensor ends the run. Further arguments go to pytest.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNEL_TESTS = [
    "test_cross_entropy.py",
    "test_embedding.py",
    "test_linear_cross_entropy.py",
    "test_linear_relu.py",
    "test_mse_loss.py",
    "test_relu_mlp.py",
]
# What the interpreter is too slow for, where a smaller test or another dtype shows the same.
SMALL_ENOUGH = (
    "not torch.float16 and not large and not loss_scale and not never_held and not thread_count and not repeats "
    "and not moduleinfo and not beyond_the_caches and not every_class and not few_features and not many_ids "
    "and not (test_linear_cross_entropy and (torch.float32 or torch.float64))"
)


def run_pytest(title: str, arguments: list[str], env: dict[str, str], cwd: Path = ROOT) -> bool:
    print(f"\n=== {title}", flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=cwd, env={**os.environ, **env}).returncode
    return report(title, code, start)


def report(title: str, code: int, start: float) -> bool:
    print(f"=== {title}: {'passed' if code == 0 else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
    return code == 0


class Beside:
    """pytest in a process beside this one; ``finish`` shows its output, and what is still to come as it comes."""

    def __init__(self, title: str, arguments: list[str], env: dict[str, str]) -> None:
        self.title, self.start = title, time.monotonic()
        self.output = tempfile.NamedTemporaryFile("w+", errors="replace")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *arguments],
            cwd=ROOT,
            env={**os.environ, **env},
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def finish(self) -> bool:
        print(f"\n=== {self.title} (begun with the first of all)", flush=True)
        with open(self.output.name, errors="replace") as shown:
            while True:
                running = self.process.poll() is None
                print(shown.read(), end="", flush=True)
                if not running:
                    return report(self.title, self.process.returncode, self.start)
                time.sleep(1)


def other_instruction_sets() -> list[str]:
    """Values of ATEN_CPU_CAPABILITY below the one that this processor gets by default."""
    code = "import torch, fastllm._C as c; print(c.cpu_capability().lower())"
    best = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    order = ["default", "avx2", "avx512", "avx512_bf16"]
    return order[: order.index(best.stdout.strip())]


def run_suite(extra: list[str]) -> bool:
    # The interpreter takes one core for about as long as all others take.
    interpreted = start_interpreted(extra)
    try:
        ok = run_compiled(extra)
        return ok & (interpreted is None or interpreted.finish())
    finally:
        if interpreted is not None:
            interpreted.process.kill()


def run_compiled(extra: list[str]) -> bool:
    ok = run_pytest("all tests", ["tests", *extra], {})
    files = [str(Path("tests") / name) for name in KERNEL_TESTS]
    for capability in other_instruction_sets():
        env = {"ATEN_CPU_CAPABILITY": capability}
        ok &= run_pytest(f"kernels with ATEN_CPU_CAPABILITY={capability}", [*files, "-k", "not compile", *extra], env)
    return ok & run_played(extra)


def run_played(extra: list[str]) -> bool:
    """The contract on the CUDA C++ backend, its blocks of threads played on the CPU (tests/cuda_host)."""
    env = {"FASTLLM_CUDA_HOST": "1", "FASTLLM_BACKEND": "cuda"}
    files = [*(ROOT / "tests" / name for name in [*KERNEL_TESTS, "test_contract.py", "test_opinfo.py"])]
    files += sorted((ROOT / "tests").glob("test_cuda_*.py"))
    return run_pytest("all CUDA kernels, played on the CPU", [*map(str, files), "-k", SMALL_ENOUGH, *extra], env)


def start_interpreted(extra: list[str]) -> Beside | None:
    """The contract on the Triton backend, in Triton's interpreter: a thread a time, so large shapes are left out."""
    if importlib.util.find_spec("triton") is None:
        print("\n=== Triton is not installed: its kernels are not tested", flush=True)
        return None
    # One variable chooses the interpreter, the other makes the backend the default of every test.
    env = {"TRITON_INTERPRET": "1", "FASTLLM_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    files = [
        str(Path("tests") / name) for name in [*KERNEL_TESTS, "test_contract.py", "test_triton.py", "test_opinfo.py"]
    ]
    return Beside("all kernels in Triton's interpreter", [*files, "-k", SMALL_ENOUGH, *extra], env)


def run_sanitized(sanitizer: str, extra: list[str]) -> bool:
    target = ROOT / "build" / sanitizer
    build = ["setup.py", "-q", "build", "--build-lib", str(target)]
    env = {"FASTLLM_SANITIZE": sanitizer, "FASTLLM_REQUIRE_NATIVE": "1"}
    subprocess.run([sys.executable, *build], cwd=ROOT, env={**os.environ, **env}, check=True)
    # libstdc++ beside it: the sanitizer looks for the exception functions before Python has loaded any C++.
    preload = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    # Leaks at exit are the interpreter's; the pool is off so that every tensor ends where its allocation ends.
    env = {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "FASTLLM_POOL_LIMIT": "0",
        "PYTHONPATH": str(target),
    }
    files = [str(ROOT / "tests" / name) for name in KERNEL_TESTS]
    options = ["-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "-k", "not compile and not opcheck"]
    return run_pytest(f"kernels under the {sanitizer} sanitizer", [*files, *options, *extra], env, cwd=target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitize", choices=["address"])
    options, extra = parser.parse_known_args()
    return 0 if (run_sanitized(options.sanitize, extra) if options.sanitize else run_suite(extra)) else 1


if __name__ == "__main__":
    sys.exit(main())
