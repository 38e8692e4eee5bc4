"""How time and memory grow: ``python benchmarks/scaling.py --out benchmarks/results/cpu`` (CPU; scaling.json, .png, .svg).

One size of an operation grows while the others stay; forward and backward of eager PyTorch and fastllm in alternation,
each point in a process of its own. The floor of a loss is its bytes at the copy bandwidth measured in the same run, that
of linear_cross_entropy its three products at the rate of a square one. The last series is the same work by one thread
and by two. Needs matplotlib for the plots.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cases  # noqa: E402

GROW = [1, 4, 16, 64]
# Title, name of what grows, its values, case of one value.
SERIES: dict[str, tuple[str, list[int], Callable[[int], cases.Case]]] = {
    "cross_entropy, N = 512, fp32": (
        "vocabulary V",
        [4000 * g for g in GROW],
        lambda v: cases.cross_entropy(512, v, "fp32", None),
    ),
    "cross_entropy, N = 512, bf16": (
        "vocabulary V",
        [4000 * g for g in GROW],
        lambda v: cases.cross_entropy(512, v, "bf16", None),
    ),
    "linear_cross_entropy, D = 256, V = 32000, fp32": (
        "rows N",
        [64 * g for g in GROW],
        lambda n: cases.linear_cross_entropy(n, 256, 32000, "fp32", None),
    ),
    "linear_cross_entropy, N = 1024, D = 256, fp32": (
        "vocabulary V",
        [2000 * g for g in GROW],
        lambda v: cases.linear_cross_entropy(1024, 256, v, "fp32", None),
    ),
    "linear_cross_entropy, N = 512, V = 8000, fp32": (
        "features D",
        [32 * g for g in GROW],
        lambda d: cases.linear_cross_entropy(512, d, 8000, "fp32", None),
    ),
    "embedding of 50257 x 256, fp32": (
        "ids N",
        [1024 * g for g in GROW],
        lambda n: cases.embedding(n, 50257, 256, "fp32", None),
    ),
}


def point(series: str, size: int, threads: int) -> dict:
    """Seconds and extra memory of one point, in this process."""
    import harness
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    case = SERIES[series][2](size)
    variants = {"eager": case.eager, "fastllm": case.ours}
    seconds = harness.measure(case, variants, "cpu", 5)
    return {
        "series": series,
        "size": size,
        "threads": threads,
        "bytes": case.bytes,
        "flops": case.flops,
        "dtype": case.dtype,
        "seconds": {name: seconds[name]["min"] for name in variants},
        "extra_peak": {name: harness.extra_peak(case, function, "cpu") for name, function in variants.items()},
    }


def in_a_process(*arguments: object) -> dict:
    command = [sys.executable, __file__, "--point", json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def floor(result: dict, limits: dict) -> float:
    """Seconds below which the machine cannot do it."""
    return result["bytes"] / limits["copy"] + result["flops"] / limits[f"gemm_{result['dtype']}"]


def draw(report: dict):
    """A panel of time and one of memory for each series."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(p["series"] for p in report["points"]))
    figure, axes = pyplot.subplots(len(names), 2, figsize=(9, 2.7 * len(names)), layout="constrained", squeeze=False)
    for (left, right), name in zip(axes, names, strict=True):
        points = [p for p in report["points"] if p["series"] == name]
        top = max(p["threads"] for p in points)
        many, one = ([p for p in points if p["threads"] == t] for t in (top, 1))
        sizes = [p["size"] for p in many]
        for variant, color in (("eager", "#888888"), ("fastllm", "#1b6ca8")):
            left.plot(
                sizes, [1e3 * p["seconds"][variant] for p in many], "o-", color=color, label=f"{variant}, {top} threads"
            )
            if top > 1:
                left.plot(
                    sizes, [1e3 * p["seconds"][variant] for p in one], "o:", color=color, label=f"{variant}, 1 thread"
                )
            right.plot(
                sizes, [max(p["extra_peak"][variant] / 1e6, 0.1) for p in many], "o-", color=color, label=variant
            )
        left.plot(
            sizes, [1e3 * floor(p, report["limits"]) for p in many], "--", color="black", label=f"floor, {top} threads"
        )
        for panel, what in ((left, "ms"), (right, "extra MB")):
            panel.set(xscale="log", yscale="log", xlabel=SERIES[name][0], ylabel=what)
            panel.set_xticks(sizes, [str(s) for s in sizes])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        left.set_title(name, fontsize=9, loc="left")
    axes[0][0].legend(fontsize=7)
    axes[0][1].legend(fontsize=7)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of scaling.json and the plots")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    if "--point" in sys.argv:
        print(json.dumps(point(*json.loads(sys.argv[sys.argv.index("--point") + 1]))))
        return 0
    options = parser.parse_args()
    import harness
    import torch

    from fastllm.training import ProgressBar

    torch.set_num_threads(options.threads)
    wanted = [(s, n, t) for s, (_, sizes, _) in SERIES.items() for n in sizes for t in sorted({1, options.threads})]
    report: dict = {"limits": harness.machine_limits("cpu"), "torch": torch.__version__, "points": []}
    progress = ProgressBar(len(wanted))
    for done, arguments in enumerate(wanted):
        report["points"].append(in_a_process(*arguments))
        progress.update(done + 1, arguments[0])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scaling.json").write_text(json.dumps(report, indent=1) + "\n")
    figure = draw(report)
    for kind in ("png", "svg"):
        figure.savefig(options.out / f"scaling.{kind}", dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
