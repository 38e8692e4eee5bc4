"""Puts the tables and plots of benchmarks/results/cpu into README.md, between two markers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import end_to_end  # noqa: E402
import run  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks") / "results" / "cpu"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def generated() -> str:
    """What stands between the markers."""
    operations = json.loads((ROOT / RESULTS / "results.json").read_text())
    training = json.loads((ROOT / RESULTS / "end_to_end.json").read_text())
    return (
        f"{run.table(operations)}\n"
        f"![How many times as fast as eager PyTorch]({RESULTS}/speedup.png)\n\n"
        f"Training, {end_to_end.table(training)}\n"
        f"How time and memory grow, with the machine's floor:\n\n![Scaling]({RESULTS}/scaling.png)\n"
    )


def with_results(readme: str) -> str:
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{generated()}{END}{rest.split(END)[1]}"


def main() -> int:
    path = ROOT / "README.md"
    path.write_text(with_results(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
