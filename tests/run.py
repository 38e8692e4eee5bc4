"""Runs the test suite: jobs, each a pytest of its own with one backend or instruction set, two at a time, longest first.

Without arguments it leaves out the tests marked ``slow`` and tries options in pairs; ``--all`` runs every test and every
combination of options. ``--sanitize address`` builds the extension with AddressSanitizer beside the normal one and runs
the kernels' tests on it: a read or write outside a tensor ends the run. Further arguments go to every pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "tests"  # a folder for each process: its output, its report, pytest's cache
RESULTS = "numbers and not contract"  # a test of results marked ``contract`` in a file of ``numbers`` runs once, too
SECONDS = 900  # that a test may take


@dataclass
class Job:
    """Tests of one selection in one environment; ``parts`` processes share them."""

    title: str
    select: str  # pytest's -m
    env: dict[str, str]
    seconds: int  # about how long one part takes: the longest starts first
    parts: int = 1
    arguments: list[str] = field(default_factory=lambda: ["tests"])
    cwd: Path = ROOT

    def name(self, part: int) -> str:
        return f"{self.title}, part {part} of {self.parts}" if self.parts > 1 else self.title


def other_instruction_sets() -> list[str]:
    """Values of ATEN_CPU_CAPABILITY below the one that this processor gets by default."""
    code = "import torch, fastllm._C as c; print(c.cpu_capability().lower())"
    best = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    order = ["default", "avx2", "avx512", "avx512_bf16"]
    return order[: order.index(best.stdout.strip())]


ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# Two threads that sleep while they wait: jobs side by side have no cores to spare.
TWO_THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
EMULATED = {"FASTLLM_CUDA_HOST": "1", "FASTLLM_BACKEND": "cuda", **ONE_THREAD}
INTERPRETED = {"TRITON_INTERPRET": "1", "FASTLLM_BACKEND": "triton", **ONE_THREAD}


def jobs(everything: bool, capabilities: list[str]) -> list[Job]:
    """What ``make test`` runs, or all of ``make test-all``."""
    quick = "" if everything else " and not slow"
    # On the emulators what holds whatever the kernel is run in test-all only: a sample of it is marked ``numbers``.
    kernels = "(numbers or contract)" if everything else f"({RESULTS})"
    found = [
        Job("CPU: results", f"({RESULTS}){quick}", TWO_THREADS, 60),
        Job("CPU: all else", f"not ({RESULTS}){quick}", ONE_THREAD, 160, parts=3),
        Job("CUDA kernels, emulated", f"{kernels}{quick}", EMULATED, 130, parts=3),
    ]
    # The nodes that serve without the extension: on the CPU's kernels, and as on a machine without a compiler.
    nodes = {"FASTLLM_TEST_NODES": "python", **ONE_THREAD}
    found.append(Job("CPU: contract, autograd nodes in Python", f"contract{quick}", nodes, 70))
    if everything and importlib.util.find_spec("triton") is not None:
        alone = {"FASTLLM_TEST_NATIVE": "0", **INTERPRETED}
        found.append(Job("Triton kernels, interpreted, no extension", "numbers and contract", alone, 300))
    for capability in capabilities:
        env = {"ATEN_CPU_CAPABILITY": capability, **ONE_THREAD}
        found.append(Job(f"CPU: results with ATEN_CPU_CAPABILITY={capability}", f"({RESULTS}){quick}", env, 50))
    if importlib.util.find_spec("triton") is not None:
        found.append(Job("Triton kernels, interpreted", f"{kernels}{quick}", INTERPRETED, 250, parts=3))
    common = {"TRITON_CACHE_DIR": str(ROOT / "build" / "triton")} | ({"FASTLLM_TESTS": "all"} if everything else {})
    return [replace(job, env=job.env | common) for job in found]


def sanitized(sanitizer: str) -> list[Job]:
    """Build with a sanitizer; results of the CPU's kernels on that build."""
    target = ROOT / "build" / sanitizer
    with Step(f"build with the {sanitizer} sanitizer"):
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
        **TWO_THREADS,
    }
    arguments = [str(ROOT / "tests"), "-c", str(ROOT / "pyproject.toml")]
    title = f"kernels under the {sanitizer} sanitizer"
    return [Job(title, f"{RESULTS} and not slow", env, 100, parts=2, arguments=arguments, cwd=target)]


class Step:
    """Says what is being prepared, and how long it took."""

    def __init__(self, title: str) -> None:
        self.title = title

    def __enter__(self) -> None:
        print(f"=== {self.title}", flush=True)
        self.start = time.monotonic()

    def __exit__(self, error, *_) -> None:
        print(f"=== {self.title}: {'FAILED' if error else 'done'} in {time.monotonic() - self.start:.0f} s", flush=True)


class Running:
    """One pytest process and, once it has ended, what it reports."""

    def __init__(self, job: Job, part: int, extra: list[str]) -> None:
        self.title = job.name(part)
        folder = OUT / "".join(c if c.isalnum() else "-" for c in self.title)
        folder.mkdir(parents=True, exist_ok=True)
        self.output, self.report = folder / "output.txt", folder / "report.xml"
        self.report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", *job.arguments, "-m", job.select]
        command += ["--part", f"{part}/{job.parts}"] if job.parts > 1 else []
        command += ["--timeout", str(SECONDS), "--timeout-method", "thread", "-o", f"cache_dir={folder / 'cache'}"]
        command += ["--junitxml", str(self.report), *extra]
        self.start = time.monotonic()
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=job.cwd,
                env={**os.environ, **job.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self, status: int, usage, chosen: bool) -> None:
        """Reads the report. ``chosen``: the user's arguments choose among the tests, so that none may be left."""
        code = self.process.returncode = os.waitstatus_to_exitcode(status)
        self.wall = time.monotonic() - self.start
        self.cpu = usage.ru_utime + usage.ru_stime
        self.passed = self.failed = 0
        self.skipped: Counter[str] = Counter()
        if self.report.exists():
            for case in ElementTree.parse(self.report).iter("testcase"):
                skipped = case.find("skipped")
                if skipped is not None:
                    whole_file = re.search(r"Skipped: (.*)'\)", skipped.text or "")  # else the text is a place
                    self.skipped[whole_file.group(1) if whole_file else skipped.get("message", "")] += 1
                elif case.find("failure") is not None or case.find("error") is not None:
                    self.failed += 1
                else:
                    self.passed += 1
        self.ending = ""
        if code < 0:
            self.ending = f"ended by signal {-code} ({signal.Signals(-code).name})"
        elif code == 5 and not chosen:
            self.ending = "selected no test"
        elif code not in (0, 5) and not self.failed:
            self.ending = f"ended with status {code}"
        self.failed += bool(self.ending)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def line(self) -> str:
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped.total()} skipped"
        ending = f", {self.ending}" if self.ending else ""
        return f"{self.title}: {counts}{ending} in {self.wall:.0f} s ({self.cpu:.0f} s of CPU)"


def run(chosen: list[Job], workers: int, extra: list[str]) -> list[Running]:
    """Every part of every job, ``workers`` at a time; one that fails, or that was asked for something, is shown whole."""
    waiting = sorted(((j, p) for j in chosen for p in range(1, j.parts + 1)), key=lambda x: -x[0].seconds)
    total, running, done = len(waiting), {}, []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                started = Running(*waiting.pop(0), extra)
                running[started.process.pid] = started
            pid, status, usage = os.wait4(-1, 0)
            if pid not in running:
                continue
            ended = running.pop(pid)
            ended.ended(status, usage, bool(extra))
            ended.kill()  # what it may have left
            done.append(ended)
            if ended.failed or extra:
                print(f"\n--- output of {ended.title}\n{ended.output.read_text(errors='replace')}")
            print(f"[{len(done)}/{total}] {ended.line()}", flush=True)
    finally:
        for job in running.values():
            job.kill()
    return done


def show(done: list[Running]) -> bool:
    """The table, the reasons of skips, and the summary line; whether all is well."""
    width = max(len(job.title) for job in done)
    print(f"\n{'job':{width}}  passed  failed  skipped  wall s  CPU s")
    for job in sorted(done, key=lambda job: job.title):
        counts = f"{job.passed:6}  {job.failed:6}  {job.skipped.total():7}  {job.wall:6.0f}  {job.cpu:5.0f}"
        print(f"{job.title:{width}}  {counts}  {job.ending}".rstrip())
    reasons = sum((job.skipped for job in done), Counter())
    if reasons:
        print("\nskipped, and why:")
        for reason, count in reasons.most_common():
            print(f"{count:6} x {reason}")
    passed, failed = (sum(getattr(job, name) for job in done) for name in ("passed", "failed"))
    print(f"\n{passed} passed, {failed} failed, {reasons.total()} skipped", flush=True)
    return failed == 0 and passed > 0


def build_emulator() -> None:
    with Step("CUDA kernels compiled for the emulator"):
        code = "import cuda_host; cuda_host.build()"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", check=True)


def interrupted(*_) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every test, every combination of options")
    parser.add_argument("--sanitize", choices=["address"])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time")
    options, extra = parser.parse_known_args()
    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGINT, interrupted)  # also where the shell that started this ignores it
    start = time.monotonic()
    try:
        if options.sanitize:
            chosen = sanitized(options.sanitize)
        else:
            build_emulator()
            chosen = jobs(options.all, other_instruction_sets())
        done = run(chosen, options.workers, extra)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print(f"\n{len(done)} processes, {options.workers} at a time, in {time.monotonic() - start:.0f} s")
    return 0 if show(done) else 1


if __name__ == "__main__":
    sys.exit(main())
