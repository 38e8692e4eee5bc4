"""Puts tables and plots of a results folder into README.md: ``python benchmarks/readme.py [FOLDER]``.

The first marker in README names the folder of ``benchmarks/results`` that is shown; FOLDER shows another from now on.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import end_to_end  # noqa: E402
import largest  # noqa: E402
import report  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = Path("benchmarks") / "results"
SECTION = re.compile(r"<!-- benchmarks: begin (\S+) -->\n.*?<!-- benchmarks: end -->", re.DOTALL)


def shown() -> Path:
    """The folder that README shows."""
    return ROOT / RESULTS / SECTION.search(README.read_text())[1]


def _plot(title: str, folder: str, name: str) -> str:
    return f"![{title}]({RESULTS}/{folder}/{name}.png)\n"


def generated(folder: str) -> str:
    """What stands between the markers."""

    def read(name: str) -> dict:
        return json.loads((ROOT / RESULTS / folder / name).read_text())

    training = read("end_to_end.json")
    parts = [
        report.table(read("results.json")),
        f"Forward, backward and no-grad apart, percentiles, memory and errors of every peer: "
        f"[table.md]({RESULTS}/{folder}/table.md).\n",
        _plot("How many times as fast as eager PyTorch", folder, "speedup"),
        f"Training under AdamW ({training['machine']['date']}, commit {training['machine']['commit']}): tokens a second "
        "(times eager), extra memory.\n",
        end_to_end.table(training),
        "The largest N x V whose forward and backward fit in 20 GiB, the whole process counted; calculated from peaks "
        "measured at the sizes given, and checked by predicting the last of them.\n",
        largest.table(read("largest.json")),
        "Bandwidth that cross_entropy reaches, time and memory of linear_cross_entropy, and one thread against two:\n",
        _plot("Bandwidth against vocabulary", folder, "bandwidth"),
        _plot("linear_cross_entropy against N and V", folder, "linear_cross_entropy"),
        _plot("One thread against two", folder, "threads"),
        f"More series: [scaling.png]({RESULTS}/{folder}/scaling.png).\n",
    ]
    return "\n".join(parts)


def with_results(text: str, folder: str | None = None) -> str:
    """README with the section made anew, from the folder given or the one that it names."""
    folder = folder or SECTION.search(text)[1]
    section = f"<!-- benchmarks: begin {folder} -->\n{generated(folder)}<!-- benchmarks: end -->"
    return SECTION.sub(lambda _: section, text)


def main() -> int:
    README.write_text(with_results(README.read_text(), sys.argv[1] if len(sys.argv) > 1 else None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
