"""Puts a folder of results into docs/benchmarks.md and README.md: ``python benchmarks/readme.py [FOLDER]``.

The marker in docs/benchmarks.md names the folder of ``benchmarks/results`` that is shown; FOLDER shows another from now on.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import end_to_end
import largest
import report

ROOT = Path(__file__).resolve().parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
RESULTS = "benchmarks/results"
SECTION = re.compile(r"<!-- benchmarks: begin (\S+) -->\n.*?<!-- benchmarks: end -->", re.DOTALL)


def shown() -> Path:
    """The folder that docs/benchmarks.md shows."""
    return ROOT / RESULTS / SECTION.search(PAGE.read_text())[1]


def _read(folder: str, name: str) -> dict:
    return json.loads((ROOT / RESULTS / folder / name).read_text())


def _plot(title: str, path: str) -> str:
    return f"![{title}]({path}.png)\n"


def for_readme(folder: str) -> str:
    """One picture and one table."""
    results = _read(folder, "results.json")
    machine = results["machine"]
    return "\n".join(
        [
            _plot("Times as fast as eager PyTorch, eight cases", f"{RESULTS}/{folder}/overview"),
            report.overview(results),
            f"Measured on {machine['date']} with the code of commit {machine['commit']}.\n",
        ]
    )


def for_page(folder: str) -> str:
    """Everything, with links relative to docs/."""
    path = f"../{RESULTS}/{folder}"
    training = _read(folder, "end_to_end.json")
    parts = [
        "## Operations\n",
        report.by_operation(_read(folder, "results.json")),
        "Medians, percentiles, forward, backward and no-grad apart, peers, memory, errors and the targets: "
        f"[table.md]({path}/table.md).\n",
        _plot("How many times as fast as eager PyTorch", f"{path}/speedup"),
        "## Training\n",
        f"Under AdamW ({training['machine']['date']}, commit {training['machine']['commit']}): tokens a second "
        "(times eager), extra memory.\n",
        end_to_end.table(training),
        "## The largest problem that fits\n",
        "The largest N x V whose forward and backward fit in 20 GiB, the whole process counted; calculated from peaks "
        "measured at the sizes given, and checked by predicting the last of them.\n",
        largest.table(_read(folder, "largest.json")),
        "## Against the size\n",
        "Bandwidth that cross_entropy reaches, time and memory of linear_cross_entropy, and one thread against two:\n",
        _plot("Bandwidth against vocabulary", f"{path}/bandwidth"),
        _plot("linear_cross_entropy against N and V", f"{path}/linear_cross_entropy"),
        _plot("One thread against two", f"{path}/threads"),
        f"More series: [scaling.png]({path}/scaling.png).\n",
    ]
    return "\n".join(parts)


FILES = {PAGE: for_page, README: for_readme}


def with_results(file: Path, folder: str) -> str:
    """The file's text with its section made anew."""
    section = f"<!-- benchmarks: begin {folder} -->\n{FILES[file](folder)}<!-- benchmarks: end -->"
    return SECTION.sub(lambda _: section, file.read_text())


def main() -> int:
    folder = sys.argv[1] if len(sys.argv) > 1 else shown().name
    for file in FILES:
        file.write_text(with_results(file, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
