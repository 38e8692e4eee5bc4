"""Times every operation against eager PyTorch and its peers: forward, backward, both, and without gradients.

    python benchmarks/run.py --device cpu --ops all --dtypes fp32,bf16 --peers all --out DIR

Variants run in alternation; ratios are of minima. On the CPU each case runs in a process of its own, against two
baselines: stock eager PyTorch, and eager PyTorch under an allocator that keeps large blocks (as a tuned malloc does). On
a GPU all cases share a process and a limit of time (together.py), and fastllm is timed once for each of its backends.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import peers as peers_
import report as report_
import torch
from cases import DTYPES, ENTRIES, SHAPES, Case, Entry
from torch._subclasses.fake_tensor import FakeTensorMode

WARM_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "1073741824",
}
TIMEOUT = 900  # seconds of one case


def variants_of(case: Case, peers: Sequence[str]) -> dict[str, Callable]:
    """Eager PyTorch and fastllm, and of the peers asked for those that have the operation."""
    variants = {"eager": case.eager, "fastllm": case.ours}
    for name in peers:
        if name == "compile":
            variants[name] = torch.compile(case.eager)
        elif case.op in (operations := peers_.PEERS[name]()):
            variants[name] = operations[case.op]
    return variants


def run_case(options: argparse.Namespace) -> dict:
    """One case, in this process; under ``--warm`` only times of forward and backward of eager and fastllm."""
    import harness

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = options.device
    case = ENTRIES[device][options.case].case()
    variants = variants_of(case, options.peers)
    modes = ("both",) if options.warm else harness.MODES
    result = {"seconds": harness.measure(case, variants, device, case.repeats, options.budget, modes)}
    working = {n: f for n, f in variants.items() if "failed" not in result["seconds"][n]}
    if not (options.warm or options.quick):
        result["extra_peak"] = {n: harness.extra_peak(case, f, device) for n, f in working.items()}
        result["error"] = harness.errors(case, working)
    return result


def _in_a_process(index: int, options: argparse.Namespace, peers: Sequence[str], warm: bool = False) -> dict:
    """One case in a process of its own. If a peer takes the process down, once more without peers."""
    command = [sys.executable, __file__, "--case", str(index), "--threads", str(options.threads)]
    command += ["--device", options.device, "--budget", str(options.budget), "--peers", ",".join(peers) or "none"]
    command += ["--warm"] * warm + ["--quick"] * options.quick
    env = {**os.environ, **(WARM_MALLOC if warm else {})}
    try:
        run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        result = {"failed": f"more than {TIMEOUT} s"}
    else:
        why = (run.stderr.strip().splitlines() or [f"status {run.returncode}"])[-1][:200]
        result = json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else {"failed": why}
    if peers and ("failed" in result or "failed" in result["seconds"]["fastllm"]):
        why = result.get("failed", "fastllm failed beside it")
        result = _in_a_process(index, options, [], warm)
        if "failed" not in result:
            result["seconds"] |= {name: {"failed": f"in the process of all peers: {why}"} for name in peers}
    return result


def facts_of(entry: Entry) -> dict:
    """What a result says about its case; needs no memory."""
    with FakeTensorMode():
        case = entry.case()
    facts = {"name": entry.name, "named": entry.named, "op": case.op, "shape": case.shape, "dtype": case.dtype}
    return facts | {"aim": entry.aim, "bytes": case.bytes, "flops": case.flops}


def measured(index: int, options: argparse.Namespace, report: dict) -> dict:
    """The result of one case; its warm ratio goes into the report."""
    facts = facts_of(ENTRIES[options.device][index])
    expected = facts["flops"] / report["machine"]["limits"][f"eager_{facts['dtype']}"]
    if expected > options.longest:
        return facts | {"skipped": f"eager would take {expected:.0f} s"}
    result = facts | _in_a_process(index, options, report["peers"])
    if not options.quick and report_.trouble(result) is None:
        warm = facts | _in_a_process(index, options, [], warm=True)
        if report_.trouble(warm) is None:
            report["warm_malloc"][facts["name"]] = report_.ratio(warm)
    return result


def measure_together(options: argparse.Namespace, indices: Sequence[int], out: Path | None) -> int:
    """Cases in one process, those with a target first; prints what came of each, and a short table."""
    import together

    entries = ENTRIES[options.device]
    report: dict = {"machine": None, "peers": list(options.peers), "missing": {}, "cases": [], "warm_malloc": {}}
    found: dict[int, dict] = {}

    def add(index: int, result: dict) -> None:
        found[index] = facts_of(entries[index]) | result
        report["cases"] = [found[i] for i in sorted(found)]
        backends = [n for c in found.values() for n in c.get("seconds", {}) if n.startswith("fastllm ")]
        report["backends"] = list(dict.fromkeys(backends))  # the first is what auto takes
        report["peers"] = report["backends"][1:] + [n for n in options.peers if n not in report["missing"]]
        print(f"{len(found)}/{len(indices)} {report_.line(found[index], report)}", flush=True)
        if out is not None:
            _write(report, out, ["results.json"])  # after each case: a run that is cut off loses one

    order = sorted(indices, key=lambda i: (entries[i].aim is None, i))
    together.drive(options, order, report, add)
    if report["machine"] is None:
        print(f"nothing was measured: {report['cases'][0]}", file=sys.stderr)
        return 1
    print(report_.short(report))
    if out is not None:
        _write(report, out)
    return int(any("failed" in case for case in report["cases"]))


def _write(report: dict, out: Path, names: Sequence[str] = ("results.json", "table.md")) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        text = report_.details(report) if name == "table.md" else json.dumps(report, indent=1) + "\n"
        (out / name).write_text(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastllm bench", description=__doc__.splitlines()[0])
    ops = ", ".join(dict.fromkeys(e.op for e in ENTRIES["cpu"]))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument("--ops", default="all", help=f"all, or of {ops}; comma-separated")
    parser.add_argument("--shapes", default="all", help=f"all, or of {', '.join(SHAPES)}")
    parser.add_argument("--dtypes", default="all", help=f"all, or of {', '.join(DTYPES)}")
    parser.add_argument("--peers", default="all", help=f"all, none, or of {', '.join(peers_.NAMES)}")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of results.json and table.md; auto: the one named after this machine"
    )
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads of PyTorch")
    parser.add_argument(
        "--budget", type=float, help="seconds for a case's rounds, after the least three; 4, or 1.5 in one process"
    )
    parser.add_argument(
        "--longest", type=float, default=8.0, help="skip a case of which eager takes more seconds a step"
    )
    parser.add_argument("--quick", action="store_true", help="few cases, times only, no peers: under two minutes")
    together = parser.add_argument_group("all cases in one process, the default on a GPU")
    together.add_argument("--together", action="store_true", help="also on the CPU")
    together.add_argument("--seconds", type=float, default=135.0, help="for everything; what is left then is skipped")
    together.add_argument(
        "--prepare", type=float, default=45.0, help="of these, at most, to fill compilers' caches first; 0: none"
    )
    together.add_argument("--first", type=float, default=20.0, help="seconds of a variant's first call")
    together.add_argument("--silence", type=float, default=45.0, help="seconds after which the process is ended")
    together.add_argument("--rehearse", action="store_true", help="tiny shapes: tries the run, measures nothing")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    return parser


def _chosen(parser: argparse.ArgumentParser, what: str, text: str, known: Sequence[str]) -> list[str]:
    """Names of a comma-separated list; ``all`` or ``none``."""
    chosen = set(known) if text == "all" else set() if text == "none" else set(text.split(","))
    if chosen - set(known):
        parser.error(f"--{what}: unknown {', '.join(sorted(chosen - set(known)))}; known: {', '.join(known)}")
    return [name for name in known if name in chosen]


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[int]]:
    """Options, and the numbers of the cases that they choose."""
    parser = _parser()
    options = parser.parse_args(arguments)
    entries = ENTRIES[options.device]
    options.peers = _chosen(parser, "peers", "none" if options.quick else options.peers, peers_.NAMES)
    options.together |= options.device == "cuda"
    if options.rehearse and (not options.together or options.out == "auto"):
        parser.error("--rehearse: with --together or --device cuda, and no --out auto: it measures nothing")
    if options.budget is None:
        options.budget = 1.5 if options.together else 4.0
    if options.quick:
        options.budget = min(options.budget, 1.0)
    ops = _chosen(parser, "ops", options.ops, list(dict.fromkeys(e.op for e in entries)))
    shapes = _chosen(parser, "shapes", options.shapes, list(SHAPES))
    dtypes = _chosen(parser, "dtypes", options.dtypes, list(DTYPES))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    indices = [
        i
        for i, e in enumerate(entries)
        if e.op in ops and e.named in shapes and e.dtype in dtypes and (e.quick or not options.quick)
    ]
    if not indices:
        parser.error("no case has these operations, shapes and dtypes")
    return options, indices


def main(arguments: Sequence[str] | None = None) -> int:
    options, indices = _options(arguments)
    if options.case is not None:
        print(json.dumps(run_case(options)))
        return 0
    if options.worker is not None:
        import together

        return together.work(options)
    import machine

    out = machine.folder(options.out, options.device)
    if options.together:
        return measure_together(options, indices, out)
    from fastllm.lm.progress import ProgressBar

    missing = peers_.missing(set(options.peers))
    report: dict = {
        "machine": machine.describe(options.threads, options.device),
        "peers": [name for name in options.peers if name not in missing],
        "missing": missing,
        "cases": [],
        "warm_malloc": {},
    }
    progress = ProgressBar(len(indices))
    for done, index in enumerate(indices):
        report["cases"].append(measured(index, options, report))
        progress.update(done + 1, report["cases"][-1]["name"])
        if out is not None:
            _write(report, out)  # after each case: a run that is cut off loses one
    print(report_.table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
