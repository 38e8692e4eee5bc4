"""What batch invariance costs: ``python benchmarks/invariance.py`` writes invariance.md.

Forward and backward of each operation that multiplies matrices, as it is and under ``fastllm.batch_invariant``, in one
process and in alternation. The operations over rows alone do the same in both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cases
import harness
import machine
import torch
from cases import Entry

import fastllm

ENTRIES = [
    Entry(make, named, dtype, n)
    for make, named, rows in (
        (cases.linear_relu, "gpt2", (1, 64, 1024)),
        (cases.relu_mlp, "gpt2", (64, 1024)),
        (cases.linear_cross_entropy, "small", (1024,)),
        (cases.linear_cross_entropy, "gpt2", (64, 1024)),
    )
    for dtype in ("fp32", "bf16")
    for n in rows
]


def row(entry: Entry, device: str, budget: float) -> str:
    case = entry.case()

    def invariant(*arguments):
        with fastllm.batch_invariant():
            return case.ours(*arguments)

    found = harness.measure(
        case, {"plain": case.ours, "invariant": invariant}, device, 20, budget, ("both", "forward", "backward")
    )
    plain, other = (found[name] for name in ("plain", "invariant"))
    ratios = [f"{other[mode]['min'] / plain[mode]['min']:.2f}" for mode in ("both", "forward", "backward")]
    return f"| {entry.name} | {1e3 * plain['both']['min']:.3g} | {' | '.join(ratios)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="of one case")
    parser.add_argument("--out", default="auto", help="folder of invariance.md; auto: the one named after this machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    torch.manual_seed(0)
    facts = machine.facts(options.threads, options.device)
    lines = [
        f"Forward and backward under `fastllm.batch_invariant`, times as long as without ({machine.where(facts)}; least of",
        f"several rounds in alternation; commit {facts['commit']}). The backward pass takes the mode of its forward pass.",
        "",
        "| case | ms without | both | forward | backward |",
        "| --- | --- | --- | --- | --- |",
    ]
    for entry in ENTRIES:
        lines.append(row(entry, options.device, options.seconds))
        print(lines[-1], flush=True)
    out = machine.folder(options.out, options.device)
    out.mkdir(parents=True, exist_ok=True)
    (out / "invariance.md").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
