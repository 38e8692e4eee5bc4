"""What moved between two results of run.py beyond its noise: ``python benchmarks/compare.py OLD.json NEW.json``.

Forward, backward, both and no-grad count apart. One has moved where the 20th to 80th percentiles of fastllm's times do not
overlap and the medians differ by more than the threshold. Exit status 1 if one became slower, or failed where it did not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def _times(report: dict) -> dict[str, dict | None]:
    """fastllm's times by mode, for every case that was not skipped; None where it failed."""
    found = {}
    for case in report["cases"]:
        if "skipped" not in case:
            times = case.get("seconds", {}).get("fastllm", {"failed": True})
            found[case["name"]] = None if "failed" in times else times
    return found


def _change(old: dict, new: dict, threshold: float) -> tuple[str, bool] | None:
    """What happened to one time, and whether it is worse; None if nothing did."""
    change = new["median"] / old["median"]
    apart = new["p20"] > old["p80"] or new["p80"] < old["p20"]
    if not apart or max(change, 1 / change) <= 1 + threshold:
        return None
    return f"{1e3 * old['median']:.3g} -> {1e3 * new['median']:.3g} ms, {change:.2f} times", change > 1


def moved(old: dict, new: dict, threshold: float) -> list[tuple[str, str, bool]]:
    """(case and mode, what happened, whether it is worse) for every time that moved, every case that came or went."""
    before, after = _times(old), _times(new)
    lines = []
    for name in [*before, *(n for n in after if n not in before)]:
        if name not in after or name not in before:
            lines.append((name, "only in the " + ("old" if name in before else "new") + " results", False))
            continue
        a, b = before[name], after[name]
        if a is None or b is None:
            if (a is None) != (b is None):
                lines.append((name, "fails now" if b is None else "works now", b is None))
            continue
        changes = {mode: _change(a[mode], b[mode], threshold) for mode in a if mode in b}
        lines += [(f"{name}, {mode}", *change) for mode, change in changes.items() if change is not None]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.05, help="a change of the median that counts (0.05: 5%%)")
    options = parser.parse_args(arguments)
    old, new = (json.loads(path.read_text()) for path in (options.old, options.new))
    for key in ("processor", "device", "threads", "torch"):
        a, b = old["machine"].get(key), new["machine"].get(key)
        if a != b:
            print(f"note: {key} differs: {a} and {b}")
    lines = moved(old, new, options.threshold)
    for name, text, worse in lines:
        print(f"{'SLOWER' if worse else 'moved'}: {name}: {text}")
    if not lines:
        print("nothing moved beyond its noise")
    return int(any(worse for _, _, worse in lines))


if __name__ == "__main__":
    sys.exit(main())
