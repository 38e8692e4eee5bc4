"""Timing in alternation, extra peak memory, errors against float64, and the limits of the machine."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cases import Case


def _run(case: Case, function: Callable) -> float:
    start = time.perf_counter()
    function().backward(_run.incoming) if _run.incoming is not None else function().backward()
    return time.perf_counter() - start


_run.incoming = None


def clear(case: Case) -> None:
    for leaf in case.leaves:
        leaf.grad = None


def measure(case: Case, repeats: int | None = None) -> dict:
    """Seconds of forward and backward, the two variants in alternation: minimum, median, 20th and 80th percentile."""
    probe = case.ours()
    _run.incoming = None if probe.dim() == 0 else torch.randn_like(probe)
    del probe
    times: dict[str, list[float]] = {"eager": [], "fastllm": []}
    variants = {"eager": case.eager, "fastllm": case.ours}
    for round_ in range((repeats or case.repeats) + 1):
        for name, function in variants.items():
            clear(case)
            if case.reset is not None:
                case.reset()
            seconds = _run(case, function)
            if round_ > 0:  # the first of each warms up
                times[name].append(seconds)
    clear(case)
    result = {}
    for name, t in times.items():
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


def extra_peak(case: Case, function: Callable) -> int:
    """Bytes by which the process's resident memory grows, at most, during one forward and backward."""
    from fastllm import memory

    clear(case)
    if case.reset is not None:
        case.reset()
    memory.empty_pool()
    before = peak = _resident()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.is_set():
            peak = max(peak, _resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _run(case, function)
    stop.set()
    watcher.join()
    peak = max(peak, _resident())
    clear(case)
    return peak - before


def errors(case: Case) -> dict[str, float]:
    """Largest error of the gradients, relative to the largest gradient, against eager PyTorch in float64."""
    result = {}
    for name, function in (("eager", case.eager), ("fastllm", case.ours)):
        clear(case)
        if case.reset is not None:
            case.reset()
        _run(case, function)
        result[name] = [leaf.grad.detach().clone() for leaf in case.leaves]
    clear(case)
    if case.reset is not None:
        case.reset()
    low = [leaf.data for leaf in case.leaves]
    incoming, _run.incoming = _run.incoming, None if _run.incoming is None else _run.incoming.double()
    for leaf in case.leaves:
        leaf.data = leaf.data.double()
    _run(case, case.eager)
    truth = [leaf.grad for leaf in case.leaves]
    _run.incoming = incoming
    for leaf, data in zip(case.leaves, low, strict=True):
        leaf.grad = None
        leaf.data = data
    worst = {}
    for name, grads in result.items():
        worst[name] = max(
            float((g.double() - t).abs().max() / t.abs().max().clamp(min=1e-300))
            for g, t in zip(grads, truth, strict=True)
        )
    return worst


def machine_limits() -> dict[str, float]:
    """What this machine reaches now: bytes a second copying and changing in place, FLOPs a second of products."""

    def best(function: Callable, repeats: int = 5) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    a, b = torch.randn(2**26), torch.empty(2**26)
    limits = {"copy": 2 * a.nbytes / best(lambda: b.copy_(a)), "in_place": 2 * a.nbytes / best(lambda: a.mul_(1.0001))}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, y = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        limits[f"gemm_{name}"] = 2 * 2048**3 / best(lambda x=x, y=y: x @ y)
    return limits
