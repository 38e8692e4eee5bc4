"""All cases in one process, within a limit of time: how run.py measures a GPU, where a process takes seconds to start.

``drive`` starts the process that measures and reads what it tells, a line of JSON at a time. Before that, processes side
by side call everything once, so that compilers' caches are filled when the measuring begins. A variant that takes the
process down, or hangs, is left out from then on, and a new process goes on with the same case.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import harness
import machine
import peers as peers_
import torch
from cases import ENTRIES, SHAPES, Case, Sizes

from fastllm import backends

RUN = Path(__file__).resolve().with_name("run.py")
TINY = Sizes(16, 32, 96)  # of a rehearsal
CACHE = Path(tempfile.gettempdir()) / "fastllm-benchmarks-inductor"
ENVIRONMENT = {"TORCHINDUCTOR_CACHE_DIR": str(CACHE), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
START = 60  # seconds that a process may take until it measures
GRACE = 10  # seconds beyond the limit in which the last case may end
SMALL = 1e-3  # seconds: below, a CUDA graph is timed, too
ERROR_FLOPS, ERROR_ITEMS = 2e12, 2**28  # what float64 may cost; beyond, errors are those of fewer rows


def ours(case: Case, device: str, asked: str) -> dict[str, Callable]:
    """fastllm as each of its backends serves the case, as the one that was asked for if one was; ``auto``'s first."""
    names = [n for n in backends.TABLE if n != "eager"] if asked == "auto" else [asked]
    tensor = torch.empty(0, device=device)
    usable = [n for n in names if all(backends.TABLE[n].refusal(op, tensor) is None for op in backends.OPERATIONS)]
    return {f"fastllm {name}": harness.OfBackend(case.ours, name) for name in usable}


def variants_of(case: Case, peers: Sequence[str], mine: dict[str, Callable]) -> dict[str, Callable]:
    """Eager PyTorch, fastllm by backend, and of the peers those that have the operation."""
    variants = {"eager": case.eager} | mine
    for name in peers:
        if name == "compile":
            torch._dynamo.reset()  # else shapes that differ from the last case's would count as dynamic
            variants[name] = torch.compile(case.eager, dynamic=False)
        elif case.op in (operations := peers_.PEERS[name]()):
            variants[name] = operations[case.op]
    return variants


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after that many seconds, unless it is in code that is not Python's."""

    def late(*_) -> None:
        raise TimeoutError(f"its first call took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Lost(Exception):
    """The device is in an error from which only a new process recovers."""


def _usable(device: str) -> None:
    """Raises Lost if an earlier failure has left the device unusable."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise Lost(harness.reason(error)) from error


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def sampled(case: Case, function: Callable) -> list[torch.Tensor]:
    """Forward and backward; at most 4096 items of the output and of each gradient."""
    found = [t.flatten() for t in harness.results(case, function)]
    return [t[:: max(1, t.numel() // 4096)].double().cpu() for t in found]


def _differences(found: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    pairs = zip(found, reference, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)) for a, b in pairs)


class Measuring:
    """What the process that measures does: ``tell`` takes what the parent is to know."""

    def __init__(self, plan: dict, options: argparse.Namespace, tell: Callable[[dict], None]):
        self.plan, self.options, self.tell = plan, options, tell
        self.device, self.begun = options.device, time.monotonic()
        self.peers = list(options.peers)
        self.asked = backends.get_backend()  # before the first variant is served by another

    def left(self) -> float:
        return self.plan["seconds"] - (time.monotonic() - self.begun)

    def case(self, index: int, rows: int | None = None) -> Case:
        torch.manual_seed(0)
        entry = ENTRIES[self.device][index]
        sizes = TINY if self.options.rehearse else SHAPES[entry.named]
        with torch.device(self.device):
            return entry.case(rows or (min(entry.n, 32) if self.options.rehearse else entry.n), sizes)

    def first_calls(self, index: int, case: Case) -> tuple[dict[str, Callable], dict[str, dict], dict[str, float]]:
        """Variants whose first call succeeds, why the others do not, and how far each is from eager PyTorch."""
        excluded = self.plan["excluded"].get(str(index), {})
        variants = variants_of(case, self.peers, ours(case, self.device, self.asked))
        failed = {n: {"failed": why} for n, why in (self.plan["dropped"] | excluded).items() if n in variants}
        working, differences, reference = {}, {}, None
        for name, function in variants.items():
            if name in failed:
                continue
            self.tell({"at": [index, name, "its first call"]})
            try:
                with within(self.options.first):
                    found = sampled(case, function)
                _usable(self.device)
            except Lost:
                raise
            except Exception as error:
                failed[name] = {"failed": harness.reason(error)}
                harness.prepare(case)
                _usable(self.device)
                _release(self.device)
                continue
            working[name] = function
            reference = found if reference is None else reference
            differences[name] = _differences(found, reference)
        return working, failed, differences

    def prepare(self) -> None:
        """Every case's first calls."""
        missing = peers_.missing(set(self.peers))
        self.peers = [n for n in self.peers if n not in missing]
        for index in self.plan["cases"]:
            with contextlib.suppress(Exception):
                self.first_calls(index, self.case(index))
            _usable(self.device)
            _release(self.device)

    def measure(self, cases_left: int, index: int) -> dict:
        """One case: times, graphs where it is small, extra memory, errors."""
        case = self.case(index)
        working, failed, differences = self.first_calls(index, case)
        budget = min(self.options.budget, max(0.2, 0.5 * self.left() / cases_left))
        repeats = max(case.repeats, 20)
        self.tell({"at": [index, "", "timing"]})
        seconds = harness.measure(case, working, self.device, repeats, budget)
        working = {n: f for n, f in working.items() if "failed" not in seconds[n]}
        result = {"seconds": seconds | failed, "from_eager": differences}
        _usable(self.device)
        self.tell({"at": [index, "", "memory"]})
        result["extra_peak"] = {n: harness.extra_peak(case, f, self.device) for n, f in working.items()}
        mine = {n: f for n, f in working.items() if n == "eager" or isinstance(f, harness.OfBackend)}
        if self.device == "cuda" and any(seconds[n]["both"]["min"] < SMALL for n in mine):
            graphs = {n: f for n, f in working.items() if n in mine or n == "compile"}
            self.tell({"at": [index, "", "CUDA graphs"]})
            result["graph"] = harness.measure_graphs(case, graphs, repeats, budget / 2)
            _usable(self.device)
        result["error_rows"] = self._rows_for_errors(index, case)
        names, first = list(mine), next(iter(ours(case, self.device, self.asked)), None)  # what auto takes
        del case, working, mine
        _release(self.device)
        self.tell({"at": [index, "", "errors"]})
        result["error"] = self.errors(index, result["error_rows"], names)
        result["seconds"].setdefault("fastllm", {"failed": "no backend of it serves this device"})
        for part in result.values():
            if isinstance(part, dict) and first in part:
                part["fastllm"] = part[first]
        return result

    def errors(self, index: int, rows: int, names: list[str]) -> dict:
        """Errors of eager and our backends, those named; nothing where that fails: the times stand."""
        case = self.case(index, rows)
        try:
            again = {"eager": case.eager} | ours(case, self.device, self.asked)
            return harness.errors(case, {n: f for n, f in again.items() if n in names})
        except Exception as error:
            print(f"{ENTRIES[self.device][index].name}: no errors: {harness.reason(error)}", file=sys.stderr)
            _usable(self.device)
            return {}

    def _rows_for_errors(self, index: int, case: Case) -> int:
        rows = min(32, ENTRIES[self.device][index].n) if self.options.rehearse else ENTRIES[self.device][index].n
        items = max(t.numel() for t in (*case.arguments, *case.leaves))
        share = min(1.0, ERROR_FLOPS / max(case.flops, 1), ERROR_ITEMS / items)
        return max(min(rows, 64), int(rows * share) // 64 * 64) if share < 1 else rows

    def run(self) -> None:
        self.tell({"at": [-1, "", "the machine's limits"]})
        described = self.plan["machine"] or machine.describe(self.options.threads, self.device)
        missing = peers_.missing(set(self.peers))
        self.tell({"machine": described, "missing": missing})
        self.peers = [n for n in self.peers if n not in missing]
        for done, index in enumerate(self.plan["cases"]):
            if self.left() <= 0:
                return
            try:
                result = self.measure(len(self.plan["cases"]) - done, index)
            except Lost:
                raise
            except Exception as error:
                result = {"failed": harness.reason(error)}
            _usable(self.device)
            self.tell({"case": index, "result": result})
            _release(self.device)


def work(options: argparse.Namespace) -> int:
    """A process that ``drive`` has started: reads its plan from standard input, tells on a pipe."""
    pipe = os.fdopen(options.worker, "w")

    def tell(what: dict) -> None:
        print(json.dumps(what), file=pipe, flush=True)

    torch.set_num_threads(options.threads)
    torch.zeros(1, device=options.device)
    plan = json.loads(sys.stdin.readline())
    measuring = Measuring(plan, options, tell)
    try:
        measuring.prepare() if plan["prepare"] else measuring.run()
    except Lost as lost:
        tell({"lost": str(lost)})
        os._exit(3)  # nothing that an exit would do works
    return 0


class Process:
    """A process that measures, or prepares: it starts at once and waits for its plan."""

    def __init__(self, options: argparse.Namespace, log: Path):
        read, write = os.pipe()
        command = [sys.executable, str(RUN), "--worker", str(write), "--together", "--device", options.device]
        command += ["--threads", str(options.threads), "--budget", str(options.budget), "--first", str(options.first)]
        command += ["--peers", ",".join(options.peers) or "none"] + ["--rehearse"] * options.rehearse
        self.log = log
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                pass_fds=[write],
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,
            )
        os.close(write)
        self.read, self.buffer = read, b""
        self.selector = selectors.DefaultSelector()
        self.selector.register(read, selectors.EVENT_READ)

    def go(self, **plan) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(plan).encode() + b"\n")
            self.process.stdin.flush()

    def receive(self, seconds: float) -> dict | None:
        """What it tells next; None once it has ended. TimeoutError if it tells nothing for that long."""
        end = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            if not self.selector.select(max(0.0, end - time.monotonic())):
                raise TimeoutError(f"nothing for {seconds:.0f} s")
            piece = os.read(self.read, 2**16)
            if not piece:
                return None
            self.buffer += piece
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def end(self, seconds: float = 0.0) -> int:
        """Its status, after at most that many seconds; whatever it has started is gone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.selector.close()
        os.close(self.read)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        return self.process.wait()

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it said nothing"


def _prepare(options: argparse.Namespace, indices: Sequence[int], log: Path, until: float) -> None:
    """Calls everything once, in processes side by side, until a time."""
    count = min(len(indices), max(1, min(6, (os.cpu_count() or 2) // 2)))
    patient = argparse.Namespace(**vars(options) | {"first": max(1.0, until - time.monotonic())})
    processes = [Process(patient, log) for _ in range(count)]
    try:
        for number, process in enumerate(processes):
            process.go(prepare=True, cases=indices[number::count], dropped={}, excluded={}, seconds=0, machine=None)
        for process in processes:
            with contextlib.suppress(TimeoutError):
                while process.receive(max(0.0, until - time.monotonic())) is not None:
                    pass
    finally:
        for process in processes:
            process.end()
    for file in CACHE.rglob("*.best_config"):  # chosen by timing while others used the device, too
        file.unlink()


def _culprit(at: list, why: str, plan: dict) -> None:
    """Enters into the plan what to leave out after a process was lost at ``at``: index of the case, variant, step."""
    index, name, step = at
    if name in peers_.NAMES:
        plan["dropped"][name] = f"lost the process at {step}: {why}"
    elif name.startswith("fastllm "):
        plan["excluded"].setdefault(str(index), {})[name] = f"lost the process at {step}: {why}"


def drive(options: argparse.Namespace, indices: Sequence[int], report: dict, add: Callable[[int, dict], None]) -> None:
    """Measures the cases of these numbers; ``add`` takes each result as it comes. Fills the report's head."""
    end = time.monotonic() + options.seconds
    report["processes"] = 0
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = Process(options, log)  # it imports while others prepare
        if options.prepare > 0:
            _prepare(options, indices, Path(folder) / "prepared", time.monotonic() + options.prepare)
        plan: dict = {"cases": list(indices), "dropped": {}, "excluded": {}, "machine": None, "prepare": False}
        lost: Counter[int] = Counter()
        while True:
            report["processes"] += 1
            process.go(**plan, seconds=max(0.0, end - time.monotonic()))
            at, why = [-1, "", "its start"], None
            try:
                while True:
                    left = end + GRACE - time.monotonic()
                    message = process.receive(max(0.0, min(left, START if at[0] < 0 else options.silence)))
                    if message is None:
                        break
                    if "machine" in message:
                        report["machine"] = plan["machine"] = message["machine"]
                        report["missing"] = message["missing"]
                    elif "at" in message:
                        at = message["at"]
                    elif "lost" in message:
                        why = message["lost"]
                    else:
                        add(message["case"], message["result"])
                        plan["cases"].remove(message["case"])
                status = process.end(10)
                if status != 0:
                    why = why or f"status {status}: {process.last_words()}"
            except TimeoutError as error:
                process.end()
                why = str(error)
            if why is None or not plan["cases"] or time.monotonic() + START / 4 > end:
                break
            lost[at[0]] += 1
            _culprit(at, why, plan)
            if at[0] < 0 and lost[at[0]] > 1:
                break
            if at[0] >= 0 and (not at[1] or at[1] == "eager" or lost[at[0]] > 2):
                add(at[0], {"failed": f"{' '.join(filter(None, at[1:]))}: {why}"})
                plan["cases"].remove(at[0])
            if not plan["cases"]:
                break
            process = Process(options, log)
        for index in plan["cases"]:
            word = "failed" if why else "skipped"
            add(index, {word: why or f"no time left of {options.seconds:.0f} s"})
