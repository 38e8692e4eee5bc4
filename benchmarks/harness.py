"""Timing in alternation, extra peak memory, errors against float64, and the limits of the machine."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cases import Case

import fastllm.functional as F


class Stopwatch:
    """Seconds of a call: on CUDA by events, after a write over twice the L2 cache, so that inputs come from memory."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.flush = torch.empty(2**25, device=device) if self.cuda else None

    def __call__(self, function: Callable) -> float:
        if not self.cuda:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def prepare(case: Case) -> None:
    """No gradients, and inputs as they were."""
    for leaf in case.leaves:
        leaf.grad = None
    if case.reset is not None:
        case.reset()


def step(case: Case, function: Callable) -> None:
    """Forward and backward."""
    output = function()
    output.backward(None if output.dim() == 0 else case.incoming.to(output.dtype))


def measure(case: Case, variants: dict[str, Callable], device: str, repeats: int) -> dict:
    """Seconds of forward and backward, the variants in alternation: minimum, median, 20th and 80th percentile.

    A variant that fails is reported by the first line of its error instead.
    """
    stopwatch, times, failed = Stopwatch(device), {name: [] for name in variants}, {}
    for round_ in range(repeats + 1):
        for name, function in variants.items():
            if name in failed:
                continue
            prepare(case)
            try:
                seconds = stopwatch(lambda f=function: step(case, f))
            except Exception as error:  # a peer's failure is a result
                failed[name] = (str(error).splitlines() or [type(error).__name__])[0][:200]
                continue
            if round_ > 0:  # the first of each warms up
                times[name].append(seconds)
    prepare(case)
    result = {name: {"failed": reason} for name, reason in failed.items()}
    for name, t in times.items():
        if name in failed:
            continue
        t.sort()
        result[name] = {
            "min": t[0],
            "p20": t[len(t) // 5],
            "median": statistics.median(t),
            "p80": t[4 * len(t) // 5],
        }
    return result


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_of(function: Callable, device: str) -> int:
    """Bytes by which memory grows, at most, during a call: resident, or allocated on CUDA."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
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
    """Peak of one forward and backward, from an empty pool."""
    from fastllm import memory

    prepare(case)
    memory.empty_pool()
    peak = peak_of(lambda: step(case, function), device)
    prepare(case)
    return peak


def errors(case: Case, variants: dict[str, Callable]) -> dict[str, float]:
    """Largest error of the gradients, relative to the largest gradient, against eager PyTorch in float64."""
    grads = {}
    for name, function in variants.items():
        prepare(case)
        step(case, function)
        grads[name] = [leaf.grad.detach().clone() for leaf in case.leaves]
    prepare(case)
    low = [leaf.data for leaf in case.leaves]
    for leaf in case.leaves:
        leaf.data = leaf.data.double()
    step(case, case.eager)
    truth = [leaf.grad for leaf in case.leaves]
    for leaf, data in zip(case.leaves, low, strict=True):
        leaf.grad = None
        leaf.data = data
    return {
        name: max(
            float((g.double() - t).abs().max() / t.abs().max().clamp(min=1e-300))
            for g, t in zip(found, truth, strict=True)
        )
        for name, found in grads.items()
    }


def machine_limits(device: str) -> dict[str, float]:
    """What this machine reaches now: bytes a second copying and in place, FLOPs a second of PyTorch's or our products."""
    stopwatch = Stopwatch(device)

    def best(function: Callable) -> float:
        return min(stopwatch(function) for _ in range(5))

    side, items = (8192, 2**28) if device == "cuda" else (2048, 2**26)
    with torch.device(device):
        a, b = torch.randn(items), torch.empty(items)
        limits = {
            "copy": 2 * a.nbytes / best(lambda: b.copy_(a)),
            "in_place": 2 * a.nbytes / best(lambda: a.mul_(1.01)),
        }
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            x, y = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
            seconds = min(best(lambda x=x, y=y: x @ y), best(lambda x=x, y=y: F.linear_relu(x, y)))
            limits[f"gemm_{name}"] = 2 * side**3 / seconds
    return limits
