"""Draws the results in a folder, PNG and SVG: ``python benchmarks/plots.py [DIR]``, by default the folder in docs/benchmarks.md.

overview (eight cases), speedup (bars by operation against the peers), bandwidth (against vocabulary size),
linear_cross_entropy (time and memory against N and V), scaling (every series, with the floor), threads (one against two).
Needs matplotlib (``pip install -r benchmarks/requirements.txt``).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import machine
import report as report_
import scaling

COLORS = {
    "eager": "#888888",
    "fastllm": "#1b6ca8",
    "compile": "#e08e2b",
    "torch's own": "#7a5195",
    "Liger": "#2f9e62",
    "CCE": "#c2413b",
    "Quack": "#b5a100",
}
LABELS = {"compile": "torch.compile", "torch's own": "torch's own linear_cross_entropy"}
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastllm"  # the same file for the same data
    from matplotlib import pyplot

    return pyplot


def subtitle(facts: dict) -> str:
    return f"{machine.where(facts)}, torch {facts['torch']}, {facts['date']}"


def speedups(report: dict, dtype: str) -> tuple[list[str], dict[str, list[float | None]]]:
    """Cases of a dtype, and for each variant eager PyTorch's time over its own; None where it has none."""
    cases = [c for c in report["cases"] if c["dtype"] == dtype and report_.trouble(c) is None]
    names = [f"{c['op']}\n{c['shape']}" for c in cases]
    values: dict[str, list[float | None]] = {}
    for name in ("fastllm", *report["peers"]):
        times = [c["seconds"].get(name, {}).get("both") for c in cases]
        values[name] = [
            c["seconds"]["eager"]["both"]["min"] / t["min"] if t else None for c, t in zip(cases, times, strict=True)
        ]
    return names, {name: column for name, column in values.items() if any(v is not None for v in column)}


def bars(axes, names: list[str], values: dict[str, list[float | None]], limits: tuple[float, float]) -> None:
    """Horizontal bars from 1 on a logarithmic axis: right of 1 is faster than eager PyTorch. A row holds those it has."""
    height = 0.8 / max(len(values), 1)
    present = [[variant for variant in values if values[variant][row] is not None] for row in range(len(names))]
    for variant, column in values.items():
        shown = [
            (row + (present[row].index(variant) - (len(present[row]) - 1) / 2) * height, v)
            for row, v in enumerate(column)
            if v is not None
        ]
        axes.barh([y for y, _ in shown], [v - 1 for _, v in shown], height, left=1, color=COLORS[variant],
                  label=LABELS.get(variant, variant))  # fmt: skip
        for y, v in shown:
            right = v >= 1
            axes.annotate(f"{v:.2f}", (v, y), (3 if right else -3, 0), textcoords="offset points", va="center",
                          ha="left" if right else "right", fontsize=7)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    ticks = [t for t in TICKS if limits[0] <= t <= limits[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def draw_speedup(report: dict):
    """A panel for each dtype that has cases, heights by their number."""
    panels = {dtype: speedups(report, dtype) for dtype in ("fp32", "bf16")}
    panels = {dtype: (names, values) for dtype, (names, values) in panels.items() if names}
    heights = [len(names) for names, _ in panels.values()]
    figure, axes = pyplot().subplots(
        len(panels), 1, figsize=(9, 0.5 * sum(heights) + 2), layout="constrained", squeeze=False,
        height_ratios=heights, sharex=True,
    )  # fmt: skip
    every = [v for _, values in panels.values() for column in values.values() for v in column if v is not None]
    limits = (min(0.7, 0.6 * min(every)), 1.6 * max(every))
    for axis, (dtype, (names, values)) in zip(axes[:, 0], panels.items(), strict=True):
        bars(axis, names, values, limits)
        axis.set_title(dtype, fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("times as fast as eager PyTorch, forward and backward (minima, logarithmic)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(subtitle(report["machine"]), fontsize=10)
    return figure


# Best, usual and worst: what README shows first.
OVERVIEW = (
    "cross_entropy gpt2 2048 fp32",
    "cross_entropy in place gpt2 2048 bf16",
    "embedding gpt2 16384 fp32",
    "mse_loss aim 1024 fp32",
    "linear_cross_entropy gpt2 2048 fp32",
    "model small 1024 fp32",
    "relu_mlp aim 2048 fp32",
    "linear_relu gpt2 1024 fp32",
)


def draw_overview(report: dict):
    """A bar of OVERVIEW each, longest first: those below 1 are slower than eager PyTorch, and red."""
    cases = {c["name"]: c for c in report["cases"] if report_.trouble(c) is None}
    chosen = sorted((cases[name] for name in OVERVIEW if name in cases), key=report_.ratio, reverse=True)
    values = [report_.ratio(c) for c in chosen]
    figure, axes = pyplot().subplots(figsize=(8, 3.4), layout="constrained")
    colors = [COLORS["CCE" if report_.loses(v) else "fastllm"] for v in values]
    axes.barh(range(len(values)), values, 0.7, color=colors)
    for y, v in enumerate(values):
        axes.annotate(f"{v:.2f}", (v, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(values)), [f"{c['op']}, {c['shape']}, {c['dtype']}" for c in chosen], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(values))
    axes.set_xlabel("times as fast as eager PyTorch, forward and backward (minima); line: equal", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(subtitle(report["machine"]), fontsize=9)
    return figure


def top_threads(p: dict) -> str:
    return max(p["seconds"], key=int)


def series(report: dict, name: str) -> list[dict]:
    return [p for p in report["points"] if p["series"] == name]


def logarithmic(axes, sizes: list[int], x: str, y: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    low, high = axes.get_ylim()
    axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    axes.set_xticks(sizes, [str(s) for s in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def draw_time(axes, points: list[dict], limits: dict, name: str) -> None:
    sizes = [p["size"] for p in points]
    most = top_threads(points[0])
    for variant in ("eager", "fastllm"):
        for count in sorted(points[0]["seconds"], key=int, reverse=True):
            times = [1e3 * p["seconds"][count][variant]["min"] for p in points]
            label = f"{variant}, {count} thread{'s' * (count != '1')}"
            axes.plot(sizes, times, "o-" if count == most else "o:", color=COLORS[variant], label=label, markersize=4)
    axes.plot(sizes, [1e3 * scaling.floor(p, limits) for p in points], "--", color="black", label="floor")
    logarithmic(axes, sizes, scaling.SERIES[name][0], "ms")
    axes.set_title(name, fontsize=9, loc="left")


def draw_memory(axes, points: list[dict], name: str) -> None:
    sizes = [p["size"] for p in points]
    for variant in ("eager", "fastllm"):
        peaks = [max(p["extra_peak"][variant] / 1e6, 0.1) for p in points]
        axes.plot(sizes, peaks, "o-", color=COLORS[variant], label=variant, markersize=4)
    logarithmic(axes, sizes, scaling.SERIES[name][0], "extra MB, results included")


def draw_growth(report: dict, names: list[str]):
    """A panel of time and one of memory for each series."""
    figure, axes = pyplot().subplots(
        len(names), 2, figsize=(9, 2.7 * len(names) + 0.5), layout="constrained", squeeze=False
    )
    for (left, right), name in zip(axes, names, strict=True):
        points = series(report, name)
        draw_time(left, points, report["machine"]["limits"], name)
        draw_memory(right, points, name)
    axes[0][0].legend(fontsize=7)
    axes[0][1].legend(fontsize=7)
    figure.suptitle(subtitle(report["machine"]), fontsize=10)
    return figure


def draw_scaling(report: dict):
    return draw_growth(report, [name for name in scaling.SERIES if series(report, name)])


def draw_linear_cross_entropy(report: dict):
    """Time and memory against N and against V."""
    names = [
        n for n in scaling.SERIES if n.startswith("linear_cross_entropy") and not scaling.SERIES[n][0].endswith("D")
    ]
    return draw_growth(report, [name for name in names if series(report, name)])


def draw_bandwidth(report: dict):
    """Bytes of cross_entropy's floor over the time taken, against the vocabulary."""
    names = [n for n in scaling.SERIES if n.startswith("cross_entropy") and series(report, n)]
    figure, panels = pyplot().subplots(
        1, len(names), figsize=(9, 3.6), layout="constrained", squeeze=False, sharey=True
    )
    limits = report["machine"]["limits"]
    for axes, name in zip(panels[0], names, strict=True):
        points = series(report, name)
        sizes = [p["size"] for p in points]
        for variant in ("eager", "fastllm"):
            rates = [p["bytes"] / p["seconds"][top_threads(p)][variant]["min"] / 1e9 for p in points]
            axes.plot(sizes, rates, "o-", color=COLORS[variant], label=variant)
        for key, style, label in (("copy", "--", "copy"), ("in_place", ":", "in place")):
            axes.axhline(limits[key] / 1e9, color="black", linestyle=style, linewidth=1, label=f"machine: {label}")
        axes.set(xscale="log", xlabel=scaling.SERIES[name][0])
        axes.set_ylim(bottom=0)
        axes.set_xticks(sizes, [str(s) for s in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_title(name, fontsize=9, loc="left")
    panels[0][0].set_ylabel("GB/s, logits read and gradient written")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(subtitle(report["machine"]) + "\nabove the machine's lines: part of the data stays in the caches",
                    fontsize=9)  # fmt: skip
    return figure


def draw_threads(report: dict):
    """One thread's time over that of all, at the largest size of each series."""
    points = [series(report, name)[-1] for name in scaling.SERIES if series(report, name)]
    points = [p for p in points if len(p["seconds"]) > 1]
    figure, axes = pyplot().subplots(figsize=(9, 0.6 * len(points) + 1.4), layout="constrained")
    for i, variant in enumerate(("eager", "fastllm")):
        gains = [p["seconds"]["1"][variant]["min"] / p["seconds"][top_threads(p)][variant]["min"] for p in points]
        places = [row + 0.4 * (i - 0.5) for row in range(len(points))]
        axes.barh(places, gains, 0.4, color=COLORS[variant], label=variant)
        for y, gain in zip(places, gains, strict=True):
            axes.annotate(f"{gain:.2f}", (gain, y), (-3, 0), textcoords="offset points", va="center", ha="right",
                          fontsize=8, color="white")  # fmt: skip
    most = top_threads(points[0])
    axes.axvline(int(most), color="black", linestyle="--", linewidth=1, label="ideal")
    axes.set_yticks(range(len(points)), [f"{p['series']}\nlargest: {p['size']}" for p in points], fontsize=8)
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.set_xlim(0, 1.3 * int(most))
    axes.set_xlabel(f"time by 1 thread over time by {most} (minima)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(subtitle(report["machine"]), fontsize=10)
    return figure


# Plot: the file that it comes from, and how it is drawn.
PLOTS = {
    "overview": ("results.json", draw_overview),
    "speedup": ("results.json", draw_speedup),
    "bandwidth": ("scaling.json", draw_bandwidth),
    "linear_cross_entropy": ("scaling.json", draw_linear_cross_entropy),
    "scaling": ("scaling.json", draw_scaling),
    "threads": ("scaling.json", draw_threads),
}


def main() -> int:
    import readme

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="where the results are and the plots go")
    folder = parser.parse_args().folder or readme.shown()
    for name, (file, draw) in PLOTS.items():
        if (folder / file).exists():
            figure = draw(json.loads((folder / file).read_text()))
            for kind in ("png", "svg"):
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(folder / f"{name}.{kind}", dpi=120, metadata=metadata)
    return 0


if __name__ == "__main__":
    sys.exit(main())
