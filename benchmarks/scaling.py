"""How time and memory grow: ``python benchmarks/scaling.py --out DIR`` writes scaling.json; plots.py draws it.

One size of an operation grows while the others stay; forward and backward of eager PyTorch and fastllm in alternation,
each point in a process of its own, by one thread and by all. The floor of a loss is its bytes at the copy bandwidth
measured in the same run, that of linear_cross_entropy its three products at the rate of a square one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cases
from cases import Case, Sizes

GROW = [1, 4, 16, 64]
VOCABULARIES = [1000, 4000, 16000, 64000, 256000]
# Title: name of what grows, its values, the case of one value.
SERIES: dict[str, tuple[str, list[int], Callable[[int], Case]]] = {
    "cross_entropy, N = 512, fp32": (
        "vocabulary V",
        VOCABULARIES,
        lambda v: cases.cross_entropy(512, Sizes(0, 0, v), "fp32"),
    ),
    "cross_entropy, N = 512, bf16": (
        "vocabulary V",
        VOCABULARIES,
        lambda v: cases.cross_entropy(512, Sizes(0, 0, v), "bf16"),
    ),
    "linear_cross_entropy, D = 256, V = 32000, fp32": (
        "rows N",
        [64 * g for g in GROW],
        lambda n: cases.linear_cross_entropy(n, Sizes(256, 0, 32000), "fp32"),
    ),
    "linear_cross_entropy, N = 1024, D = 256, fp32": (
        "vocabulary V",
        [2000 * g for g in GROW],
        lambda v: cases.linear_cross_entropy(1024, Sizes(256, 0, v), "fp32"),
    ),
    "linear_cross_entropy, N = 512, V = 8000, fp32": (
        "features D",
        [32 * g for g in GROW],
        lambda d: cases.linear_cross_entropy(512, Sizes(d, 0, 8000), "fp32"),
    ),
    "embedding of 50257 x 256, fp32": (
        "ids N",
        [1024 * g for g in GROW],
        lambda n: cases.embedding(n, Sizes(256, 0, 50257), "fp32"),
    ),
}


def point(series: str, size: int, threads: list[int], device: str, budget: float) -> dict:
    """Seconds by number of threads, and extra memory, of one point, in this process."""
    import harness
    import torch

    torch.manual_seed(0)
    with torch.device(device):
        case = SERIES[series][2](size)
    variants = {"eager": case.eager, "fastllm": case.ours}
    seconds = {}
    for count in threads:
        torch.set_num_threads(count)
        found = harness.measure(case, variants, device, case.repeats, budget, ("both",))
        seconds[str(count)] = {name: found[name]["both"] for name in variants}
    return {
        "series": series,
        "size": size,
        "bytes": case.bytes,
        "flops": case.flops,
        "dtype": case.dtype,
        "seconds": seconds,
        "extra_peak": {name: harness.extra_peak(case, function, device) for name, function in variants.items()},
    }


def in_a_process(*arguments: object) -> dict:
    command = [sys.executable, __file__, "--point", json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def floor(result: dict, limits: dict) -> float:
    """Seconds below which the machine cannot do it."""
    return result["bytes"] / limits["copy"] + result["flops"] / limits[f"gemm_{result['dtype']}"]


def main() -> int:
    if "--point" in sys.argv:
        print(json.dumps(point(*json.loads(sys.argv[sys.argv.index("--point") + 1]))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", default="auto", help="folder of scaling.json; auto: the one named after this machine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=1.5, help="seconds for the rounds of a point")
    options = parser.parse_args()
    import machine

    from fastllm.lm.progress import ProgressBar

    threads = sorted({1, options.threads}) if options.device == "cpu" else [options.threads]
    wanted = [(series, size) for series, (_, sizes, _) in SERIES.items() for size in sizes]
    report: dict = {"machine": machine.describe(options.threads, options.device), "points": []}
    progress = ProgressBar(len(wanted))
    for done, (series, size) in enumerate(wanted):
        report["points"].append(in_a_process(series, size, threads, options.device, options.budget))
        progress.update(done + 1, series)
    out = machine.folder(options.out, options.device)
    out.mkdir(parents=True, exist_ok=True)
    (out / "scaling.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
