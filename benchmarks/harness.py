"""Timing in alternation, extra peak memory, errors against float64, and the limits of the machine."""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import DTYPES, Case
from torch import Tensor

import fastllm
import fastllm.functional as F
from fastllm import memory

MODES = ("both", "forward", "backward", "no_grad")
LEAST = 3  # rounds that are measured however long they take


@dataclass(frozen=True)
class OfBackend:
    """A function of fastllm as one of its backends serves it."""

    function: Callable[..., Tensor]
    backend: str

    def __call__(self, *arguments: Tensor) -> Tensor:
        return self.function(*arguments)


class Clock:
    """Marks in time: on CUDA events, else the processor's clock.

    On CUDA a start first reads twice the L2 cache, so that inputs come from memory and nothing is left to be written
    back; then the device waits, so that all launches are enqueued before the first runs: what the host needs for them
    does not count, unless a function waits for the device. It waits for ``LEAST_LEAD`` seconds, and twice as long, up to
    ``MOST_LEAD``, for a function that was late.
    """

    LEAST_LEAD, MOST_LEAD = 5e-4, 4e-3  # a forward and a backward are enqueued in 0.06 to 1 ms

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        if self.cuda:
            self.flush, self.sum = torch.zeros(2**25, device=device), torch.empty((), device=device)
            self.leads: dict[Callable | None, float] = {}
            cycles = 10**7
            torch.cuda._sleep(cycles)
            start = self.mark()
            torch.cuda._sleep(cycles)
            self.cycles = cycles / self.seconds(start, self.mark())  # a second

    def start(self, function: Callable | None = None) -> object:
        if self.cuda:
            torch.sum(self.flush, 0, out=self.sum)
            torch.cuda._sleep(int(self.cycles * self.leads.get(function, self.LEAST_LEAD)))
        return self.mark()

    def mark(self) -> object:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def late(self, start: object, function: Callable) -> bool:
        """Whether the device may have waited for the host: asked once everything after ``start`` is enqueued."""
        late = self.cuda and start.query()
        if late:
            self.leads[function] = min(2 * self.leads.get(function, self.LEAST_LEAD), self.MOST_LEAD)
        return late

    def seconds(self, start: object, end: object) -> float:
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class Rotation:
    """Equal copies of a case's tensors, used in turn: no call finds its inputs where the last one left them.

    On CUDA as many as fill 256 MiB, at least two and at most eight; on the CPU none, as the variants alternate.
    """

    def __init__(self, case: Case, device: str, copies: int | None = None):
        self.tensors = list({id(t): t for t in (*case.arguments, *case.leaves)}.values())
        if copies is None:
            size = sum(t.nbytes for t in self.tensors)
            copies = min(8, max(2, 2**28 // max(size, 1))) if device == "cuda" else 1
        self.sets = [[t.data for t in self.tensors]]
        self.sets += [[t.data.clone() for t in self.tensors] for _ in range(copies - 1)]

    def turn(self, round_: int) -> None:
        for tensor, data in zip(self.tensors, self.sets[round_ % len(self.sets)], strict=True):
            tensor.data = data


def prepare(case: Case, function: Callable | None = None) -> None:
    """No gradients, inputs as they were, and the backend that serves ``function``."""
    if isinstance(function, OfBackend):
        fastllm.set_backend(function.backend)
    for leaf in case.leaves:
        leaf.grad = None
    if case.reset is not None:
        case.reset()


def step(case: Case, function: Callable) -> Tensor:
    """Forward and backward."""
    output = function(*case.arguments)
    output.backward(case.incoming)
    return output


def reason(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def sample(case: Case, function: Callable, clock: Clock, modes: tuple[str, ...]) -> dict[str, float]:
    """Seconds of one forward and backward, of its halves, and of a forward without gradients; ``late``: see Clock."""
    prepare(case, function)
    start = clock.start(function)
    output = function(*case.arguments)
    middle = clock.mark()
    output.backward(case.incoming)
    end = clock.mark()
    late = clock.late(start, function)
    found = {
        "both": clock.seconds(start, end),
        "forward": clock.seconds(start, middle),
        "backward": clock.seconds(middle, end),
    }
    if "no_grad" in modes:
        prepare(case, function)
        with torch.no_grad():
            start = clock.start(function)
            function(*case.arguments)
            found["no_grad"] = clock.seconds(start, clock.mark())
    return {mode: found[mode] for mode in modes} | {"late": late}


def alone(function: Callable, clock: Clock) -> dict[str, float]:
    """Seconds of a function without gradients."""
    start = clock.start()
    function()
    return {"both": clock.seconds(start, clock.mark())}


def summary(times: list[float]) -> dict[str, float]:
    """Minimum, median, 20th and 80th percentile, and how many there were."""
    t = sorted(times)
    return {
        "min": t[0],
        "p20": t[len(t) // 5],
        "median": statistics.median(t),
        "p80": t[min(4 * len(t) // 5, len(t) - 1)],
        "rounds": len(t),
    }


def alternate(variants: dict[str, Callable[[], dict[str, float]]], repeats: int, budget: float, turn: Callable) -> dict:
    """Samples of every variant, in alternation and every other round backwards, summed up by mode.

    The first round warms up. At least LEAST and at most ``repeats`` follow, as many as fit in ``budget`` seconds. A
    variant that fails is reported by the first line of its error instead.
    """
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    failed: dict[str, str] = {}
    begun = time.monotonic()
    for round_ in range(max(repeats, LEAST) + 1):
        if round_ > LEAST and time.monotonic() - begun > budget:
            break
        turn(round_)
        for name in reversed(variants) if round_ % 2 else variants:
            if name not in failed:
                try:
                    samples[name].append(variants[name]())
                except Exception as error:  # a peer's failure is a result
                    failed[name] = reason(error)
        if round_ == 0:
            begun = time.monotonic()
    result: dict[str, dict] = {name: {"failed": why} for name, why in failed.items()}
    for name, found in samples.items():
        if name not in failed:
            late = sum(times.pop("late", False) for times in found[1:])
            result[name] = {mode: summary([times[mode] for times in found[1:]]) for mode in found[0] if mode != "late"}
            if late:  # rounds in which the host may count
                result[name]["both"]["late"] = late
    return {name: result[name] for name in variants}


def measure(
    case: Case,
    variants: dict[str, Callable],
    device: str,
    repeats: int,
    budget: float,
    modes: tuple[str, ...] = MODES,
) -> dict:
    """Seconds of every variant by mode, and of the case's floor, in alternation; see ``alternate``."""
    clock, rotation = Clock(device), Rotation(case, device)
    timed = {name: (lambda f=function: sample(case, f, clock, modes)) for name, function in variants.items()}
    if case.floor is not None:
        floor = case.floor()
        timed["floor"] = lambda: alone(floor, clock)
    result = alternate(timed, repeats, budget, rotation.turn)
    rotation.turn(0)
    prepare(case)
    return result


def capture(case: Case, function: Callable) -> torch.cuda.CUDAGraph:
    """Forward and backward as a CUDA graph, after three calls on a stream of its own, as PyTorch asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            prepare(case, function)
            step(case, function)
    torch.cuda.current_stream().wait_stream(stream)
    prepare(case, function)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(case, function)
    return graph


def measure_graphs(case: Case, variants: dict[str, Callable], repeats: int, budget: float) -> dict:
    """Seconds of replaying each variant's forward and backward as a CUDA graph, in alternation."""
    clock, graphs, failed = Clock("cuda"), {}, {}
    for name, function in variants.items():
        try:
            graphs[name] = capture(case, function)
        except Exception as error:
            failed[name] = {"failed": reason(error)}

    def replay(graph: torch.cuda.CUDAGraph) -> dict[str, float]:
        start = clock.start()
        graph.replay()
        return {"graph": clock.seconds(start, clock.mark())}

    timed = {name: (lambda g=graph: replay(g)) for name, graph in graphs.items()}
    return failed | alternate(timed, repeats, budget, lambda round_: None)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_of(function: Callable, device: str) -> int:
    """Bytes by which memory grows, at most, during a call: resident, or allocated on CUDA.

    On the CPU from an empty pool, and with what malloc keeps free given back to the system, else its reuse would not show.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    if fastllm.backends.TABLE["cpu"].missing is None:
        memory.empty_pool()
    ctypes.CDLL(None).malloc_trim(0)
    before = peak = _resident()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.is_set():
            peak = max(peak, _resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    stop.set()
    watcher.join()
    return max(peak, _resident()) - before


def extra_peak(case: Case, function: Callable, device: str) -> int:
    """Peak of one forward and backward."""
    prepare(case, function)
    peak = peak_of(lambda: step(case, function), device)
    prepare(case)
    return peak


def results(case: Case, function: Callable) -> list[Tensor]:
    """The output and the gradients; where one may lie in an input's storage, a copy."""
    prepare(case, function)
    output = step(case, function).detach()
    found = [output, *(leaf.grad if case.reset is None else leaf.grad.clone() for leaf in case.leaves)]
    prepare(case)
    return found


def _in_float64(case: Case) -> list[Tensor]:
    numbers = [t for t in {id(t): t for t in (*case.arguments, *case.leaves)}.values() if t.is_floating_point()]
    low, incoming = [t.data for t in numbers], case.incoming
    for tensor in numbers:
        tensor.data = tensor.data.double()
    case.incoming = None if incoming is None else incoming.double()
    truth = results(case, case.eager)
    case.incoming = incoming
    for tensor, data in zip(numbers, low, strict=True):
        tensor.data = data
    return truth


def _relative(found: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest value; in pieces, so that no double of ``found`` is held."""
    pairs = zip(found.flatten().split(2**24), truth.flatten().split(2**24), strict=True)
    worst = max(float((a.double() - b).abs().max()) for a, b in pairs)
    return worst / max(float(truth.abs().max()), 1e-300)


def errors(case: Case, variants: dict[str, Callable]) -> dict[str, dict[str, float]]:
    """Largest error of the output and of any gradient, relative to its largest value, against PyTorch in float64."""
    truth = _in_float64(case)
    result = {}
    for name, function in variants.items():
        output, *gradients = (_relative(f, t) for f, t in zip(results(case, function), truth, strict=True))
        result[name] = {"output": output, "gradient": max(gradients)}
    return result


def _best(clock: Clock, function: Callable) -> float:
    """Least of up to four calls after a first, as many as fit in a second."""
    function()
    times: list[float] = []
    while len(times) < 4 and sum(times) < 1:
        start = clock.start()
        function()
        times.append(clock.seconds(start, clock.mark()))
    return min(times)


def _linear(x: Tensor, w: Tensor) -> None:
    """A layer's three products in eager PyTorch."""
    torch.nn.functional.linear(x, w).backward(x.detach())


def product_rates(clock: Clock, device: str, dtype: str) -> tuple[float, float]:
    """FLOPs a second of square products: PyTorch's (on the CPU ours, if faster), and those of an eager layer's three.

    The side doubles, up to 2048 (8192 on CUDA), while a layer takes less than 0.2 s: some processors have no fast
    bfloat16 product.
    """
    side, layer = 128, 0.0
    while layer < 0.2 and side < (8192 if device == "cuda" else 2048):
        side *= 2
        x, w = (torch.randn(side, side, device=device).to(DTYPES[dtype]).requires_grad_() for _ in range(2))
        layer = _best(clock, lambda x=x, w=w: _linear(x, w))
    products = [lambda: x @ w.T] + ([] if device == "cuda" else [lambda: F.linear_relu(x, w)])
    with torch.no_grad():
        single = min(_best(clock, f) for f in products)
    return max(2 * side**3 / single, 6 * side**3 / layer), 6 * side**3 / layer


def machine_limits(device: str) -> dict[str, float]:
    """What this machine reaches now: bytes a second copying and in place, FLOPs a second of products."""
    clock, items = Clock(device), 2**28 if device == "cuda" else 2**26
    a, b = torch.randn(items, device=device), torch.empty(items, device=device)
    limits = {
        "copy": 2 * a.nbytes / _best(clock, lambda: b.copy_(a)),
        "in_place": 2 * a.nbytes / _best(clock, lambda: a.mul_(1.01)),
    }
    for dtype in DTYPES:
        limits[f"gemm_{dtype}"], limits[f"eager_{dtype}"] = product_rates(clock, device, dtype)
    return limits
