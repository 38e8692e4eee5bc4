"""The largest N x V that fits in 20 GiB on the CPU: ``python benchmarks/largest.py --out DIR`` writes largest.json.

Forward and backward in a process that does nothing else; the system's count of its peak resident memory (Python, torch,
inputs, results and gradients, all of it) at three numbers of rows N, the vocabulary staying. A line through the first two
predicts the third, and its miss is reported; a line through the outer two says at which N the process reaches 20 GiB.
So the largest size is calculated from measured bytes, not run.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

LIMIT = 20 * 2**30
V, D = 50257, 768
LOGITS, HIDDEN = f"cross_entropy, V = {V}, fp32", f"linear_cross_entropy, D = {D}, V = {V}, fp32"
# Numbers of rows: enough that what grows with N shows beside what does not.
ROWS = {
    (LOGITS, "eager"): [1024, 2048, 4096],
    (LOGITS, "fastllm"): [1024, 2048, 4096],
    (LOGITS, "fastllm in place"): [1024, 2048, 4096],
    (HIDDEN, "eager"): [512, 1024, 2048],
    (HIDDEN, "fastllm"): [2048, 4096, 8192],
}


def peak(operation: str, variant: str, n: int, threads: int) -> int:
    """Bytes of this process's peak resident memory after one forward and backward."""
    import cases
    import torch
    from cases import Sizes

    torch.set_num_threads(threads)
    if operation == HIDDEN:
        case = cases.linear_cross_entropy(n, Sizes(D, 0, V), "fp32")
    else:
        case = cases.cross_entropy(n, Sizes(D, 0, V), "fp32")
        if variant.endswith("in place"):
            case.ours = cases.cross_entropy_in_place
    (case.eager if variant == "eager" else case.ours)(*case.arguments).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(*arguments: object) -> int:
    command = [sys.executable, __file__, "--peak", json.dumps(arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def fitted(rows: list[int], peaks: list[int], limit: int = LIMIT) -> dict:
    """Bytes a row, the N that reaches the limit, and by how much a line through the first two misses the third."""
    a, b, c = rows
    first = (peaks[1] - peaks[0]) / (b - a)
    slope = (peaks[2] - peaks[0]) / (c - a)
    predicted = peaks[0] + first * (c - a)
    return {
        "rows": rows,
        "peaks": peaks,
        "bytes_per_row": slope,
        "largest": int(a + (limit - peaks[0]) / slope) if slope > 0 else None,
        "miss": predicted / peaks[2] - 1,
    }


def table(report: dict) -> str:
    lines = [
        "| operation | variant | largest N in 20 GiB | N x V | times eager | measured at N | line misses by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = {r["operation"]: r["largest"] for r in report["results"] if r["variant"] == "eager"}
    for r in report["results"]:
        cells = ["no growth seen", "", ""]
        if r["largest"] is not None:
            cells = [f"{r['largest']:,}", f"{r['largest'] * V:.2g}", f"{r['largest'] / base[r['operation']]:.1f}"]
        lines.append(
            f"| {r['operation']} | {r['variant']} | {' | '.join(cells)} | {', '.join(map(str, r['rows']))} | "
            f"{100 * r['miss']:+.1f}% |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    if "--peak" in sys.argv:
        print(peak(*json.loads(sys.argv[sys.argv.index("--peak") + 1])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="auto", help="folder of largest.json; auto: the one named after this machine")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import machine

    from fastllm.lm.progress import ProgressBar

    report: dict = {"machine": machine.where(machine.facts(options.threads, "cpu")), "results": []}
    progress = ProgressBar(sum(map(len, ROWS.values())))
    done = 0
    for (operation, variant), rows in ROWS.items():
        peaks = []
        for n in rows:
            peaks.append(in_a_process(operation, variant, n, options.threads))
            done += 1
            progress.update(done, f"{variant}, N = {n}")
        report["results"].append({"operation": operation, "variant": variant, **fitted(rows, peaks)})
    print(table(report))
    out = machine.folder(options.out, "cpu")
    out.mkdir(parents=True, exist_ok=True)
    (out / "largest.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
