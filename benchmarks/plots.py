"""Draws results of run.py: ``python benchmarks/plots.py benchmarks/results/cpu`` writes speedup.png and speedup.svg there.

Needs matplotlib (``pip install -r benchmarks/requirements.txt``).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

COLORS = {"fastllm": "#1b6ca8", "compile": "#e08e2b", "torch's own": "#7a5195"}
LABELS = {"fastllm": "fastllm", "compile": "torch.compile", "torch's own": "torch's own linear_cross_entropy"}


def speedups(report: dict) -> tuple[list[str], dict[str, list[float | None]]]:
    """Cases, and for each variant eager PyTorch's time over its own; None where it has none."""
    names, values = [], {name: [] for name in ("fastllm", *report["peers"])}
    for case in report["cases"]:
        seconds = case.get("seconds", {})
        if "min" not in seconds.get("eager", {}):
            continue
        names.append(f"{case['op']}\n{case['shape']}, {case['dtype']}")
        for name, column in values.items():
            column.append(seconds["eager"]["min"] / seconds[name]["min"] if "min" in seconds.get(name, {}) else None)
    return names, {name: column for name, column in values.items() if any(v is not None for v in column)}


def draw(report: dict):
    """Horizontal bars on a logarithmic axis: right of 1 is faster than eager PyTorch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, values = speedups(report)
    figure, axes = pyplot.subplots(figsize=(9, 0.62 * len(names) + 1.6), layout="constrained")
    height = 0.8 / len(values)
    for i, (variant, column) in enumerate(values.items()):
        places = [row + (i - (len(values) - 1) / 2) * height for row in range(len(names))]
        shown = [(y, v) for y, v in zip(places, column, strict=True) if v is not None]
        axes.barh([y for y, _ in shown], [v - 1 for _, v in shown], height, left=1, color=COLORS[variant],
                  label=LABELS[variant])  # fmt: skip
        for y, v in shown:
            side = "left" if v >= 1 else "right"
            axes.annotate(f"{v:.2f}", (v, y), (3 if v >= 1 else -3, 0), textcoords="offset points", va="center",
                          ha=side, fontsize=7)  # fmt: skip
    axes.set_xscale("log")
    most = max(v for column in values.values() for v in column if v is not None)
    least = min(v for column in values.values() for v in column if v is not None)
    axes.set_xlim(min(0.8, least * 0.8), most * 1.3)
    ticks = [t for t in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32) if least * 0.8 <= t <= most * 1.3]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("times as fast as eager PyTorch, forward and backward (minima)")
    machine = report["machine"]
    where = machine["device"] if machine["device"] != "cpu" else f"{machine['processor']}, {machine['threads']} threads"
    axes.set_title(f"{where}, torch {machine['torch']}, {machine['date']}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(values), fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where results.json is, and the plots go")
    folder = parser.parse_args().folder
    figure = draw(json.loads((folder / "results.json").read_text()))
    for kind in ("png", "svg"):
        figure.savefig(folder / f"speedup.{kind}", dpi=130, metadata={"Date": None} if kind == "svg" else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
