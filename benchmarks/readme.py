"""Puts the table of benchmarks/results/cpu/results.json, and its plot, into README.md, between two markers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from run import table  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PLOT = "![How many times as fast as eager PyTorch](benchmarks/results/cpu/speedup.png)"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def with_table(readme: str, report: dict) -> str:
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table(report)}\n{PLOT}\n{END}{rest.split(END)[1]}"


def main() -> int:
    report = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "results.json").read_text())
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text(), report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
