"""``make gpu-check``: everything that a machine with a GPU, and no network, can tell; each part goes on if another fails.

Parts: build (the extension, against this torch), gpu (tests/test_gpu.py), suite (the CPU suite and Triton's compile
checks, with this torch and this Triton), sanitizer (compute-sanitizer's memcheck and racecheck on a few cases), bench
(benchmarks/run.py --device cuda). Reports lie in the folder given by --out. Uses the Python that runs it.
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
FEW = "test_error_against_float64 and torch.bfloat16 and (mse_loss or embedding)"


def commands(out: Path) -> dict[str, list[tuple[list[str], dict[str, str], int]]]:
    """Commands of each part, with their environment and the seconds that they may take."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider"]
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    checks = [
        ([sanitizer, "--tool", tool, "--error-exitcode", "1", *pytest, "tests/test_gpu.py", "-k", FEW], {}, 120)
        for tool in ("memcheck", "racecheck")
    ]
    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    suite = [*pytest, "tests", "-x", "--ignore=tests/test_build.py", "--ignore=tests/test_benchmarks.py"]
    bench = [python, "benchmarks/run.py", "--device", "cuda", "--out", str(out)]
    return {
        "build": [(build, {"FASTLLM_REQUIRE_NATIVE": "1"}, 300)],
        "gpu": [([*pytest, "tests/test_gpu.py"], {}, 300)],
        "suite": [(suite, {}, 300)],
        "sanitizer": checks,
        "bench": [(bench, {}, 400)],
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
    parser.add_argument("--parts", default="build,gpu,bench,sanitizer,suite", help="in the order given")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parts = commands(options.out.absolute())
    unknown = set(options.parts.split(",")) - set(parts)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; known: {', '.join(parts)}")
    lines, failed = ["| part | result | seconds |", "| --- | --- | --- |"], False
    for name in options.parts.split(","):
        log = options.out / f"{name}.log"
        log.unlink(missing_ok=True)
        for command, env, seconds in parts[name]:
            ended, took = run(name, command, env, seconds, log)
            failed |= not ended.startswith("passed")
            lines.append(f"| {name} | {ended} | {took:.0f} |")
            print(f"{name}: {ended} in {took:.0f} s (output in {log})", flush=True)
    (options.out / "check.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
