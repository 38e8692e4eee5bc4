"""Times every operation, forward and backward, against eager PyTorch and its peers, and writes the table.

    python benchmarks/run.py --device cpu --out benchmarks/results/cpu

Each case runs in a process of its own, its variants in alternation; ratios are of minima. On the CPU there are two
baselines: stock eager PyTorch, and eager PyTorch under an allocator that keeps large blocks (as a tuned malloc does).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from cases import CASES, Case  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import fastllm  # noqa: E402

PEERS = (
    "compile",
    "torch's own",
)  # torch.compile of the eager code; PyTorch's operation for the same, where it has one
WARM_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "1073741824",
}


def variants_of(case: Case, peers: set[str]) -> dict[str, Callable]:
    """Eager PyTorch and fastllm, and the peers that were asked for."""
    variants = {"eager": case.eager, "fastllm": case.ours}
    if "compile" in peers:
        variants["compile"] = torch.compile(case.eager)
    if "torch's own" in peers:
        variants |= case.peers
    return variants


def run_case(options: argparse.Namespace) -> dict:
    """One case, in this process."""
    import harness

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.device(options.device):
        case = CASES[options.device][options.case][1]()
    variants = variants_of(case, options.peers)
    repeats = max(3, case.repeats // 4) if options.quick else case.repeats
    if options.device == "cuda":
        repeats = max(repeats, 20)
    result = {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "target": case.target,
        "bytes": case.bytes,
        "flops": case.flops,
        "seconds": harness.measure(case, variants, options.device, repeats),
    }
    if not options.quick:
        working = {n: f for n, f in variants.items() if "failed" not in result["seconds"][n]}
        result["extra_peak"] = {n: harness.extra_peak(case, f, options.device) for n, f in working.items()}
        result["error"] = harness.errors(case, working)
    return result


def _in_a_process(index: int, options: argparse.Namespace, warm: bool) -> dict:
    command = [sys.executable, __file__, "--case", str(index), "--threads", str(options.threads)]
    command += ["--device", options.device, "--peers", "none" if warm else ",".join(options.peers) or "none"]
    if options.quick or warm:
        command.append("--quick")
    env = {**os.environ, **(WARM_MALLOC if warm else {})}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    if run.returncode != 0:
        return {"failed": run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"status {run.returncode}"}
    return json.loads(run.stdout.splitlines()[-1])


def _machine(threads: int, device: str) -> dict:
    import harness

    torch.set_num_threads(threads)
    model = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    info = fastllm.info()
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "instruction_set": info["instruction_set"],
        "float32_gemm": info["float32_gemm"],
        "torch": torch.__version__,
        "fastllm": fastllm.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "limits": harness.machine_limits(device),
    }


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _ratio(result: dict, key: str = "min") -> float:
    return result["seconds"]["eager"][key] / result["seconds"]["fastllm"][key]


def _peer_cell(result: dict, name: str) -> str:
    """A peer's milliseconds, and how many of fastllm's times they are."""
    seconds = result["seconds"].get(name)
    if seconds is None:
        return ""
    if "failed" in seconds:
        return "failed: " + seconds["failed"].replace("|", "/")
    return f"{_milliseconds(seconds['min'])} ({seconds['min'] / result['seconds']['fastllm']['min']:.2f})"


def _row(result: dict, report: dict, peers: list[str]) -> list[str]:
    if "failed" in result or "failed" in result["seconds"]["fastllm"] or "failed" in result["seconds"]["eager"]:
        reason = result.get("failed") or str(result["seconds"])
        return [result.get("op", "?"), "", "", f"failed: {reason}".replace("|", "/")]
    limits, ours = report["machine"]["limits"], result["seconds"]["fastllm"]["min"]
    if result["bytes"]:
        rate, limit, unit = result["bytes"] / ours, limits["copy"], "GB/s"
    else:
        rate, limit, unit = result["flops"] / ours, limits[f"gemm_{result['dtype']}"], "GF/s"
    ratio, target = _ratio(result), result["target"]
    warm = report["warm_malloc"].get(f"{result['op']} {result['shape']} {result['dtype']}")
    pairs = ("eager", "fastllm")
    return [
        result["op"],
        result["shape"],
        result["dtype"],
        _milliseconds(result["seconds"]["eager"]["min"]),
        _milliseconds(ours),
        f"**{ratio:.2f}**",
        "" if target is None else f"{target:g}" + ("" if ratio >= target else " (missed)"),
        "" if warm is None else f"{warm:.2f}",
        *(_peer_cell(result, name) for name in peers),
        f"{rate / 1e9:.0f} {unit}, {100 * rate / limit:.0f}%",
        " / ".join(f"{result['extra_peak'][n] / 1e6:.0f}" for n in pairs) if "extra_peak" in result else "",
        " / ".join(f"{result['error'][n]:.1e}" for n in pairs) if "error" in result else "",
    ]


def table(report: dict) -> str:
    """The report as Markdown."""
    machine, limits = report["machine"], report["machine"]["limits"]
    peers = report["peers"]
    where = machine["device"]
    if where == "cpu":
        where = f"{machine['processor']}, {machine['threads']} threads, {machine['instruction_set']}"
    head = [
        f"{where}; torch {machine['torch']}; "
        + (f"float32 products by {machine['float32_gemm']}; " if machine["device"] == "cpu" else "")
        + f"{machine['date']}, commit {machine['commit']}. "
        f"Copy {limits['copy'] / 1e9:.0f} GB/s, in place {limits['in_place'] / 1e9:.0f} GB/s; square products, PyTorch's "
        f"or ours: {limits['gemm_fp32'] / 1e9:.0f} GFLOP/s fp32, {limits['gemm_bf16'] / 1e9:.0f} bf16.",
        "",
    ]
    columns = [
        "operation",
        "shape",
        "dtype",
        "eager ms",
        "fastllm ms",
        "ratio",
        "aimed at",
        "ratio, warm malloc",
        *(f"{name} ms (ratio)" for name in peers),
        "achieved, of the limit",
        "extra MB eager / fastllm",
        "error eager / fastllm",
    ]
    rows = [columns, ["---"] * len(columns)]
    for result in report["cases"]:
        row = _row(result, report, peers)
        rows.append(row + [""] * (len(columns) - len(row)))
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastllm bench", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument("--peers", default="all", help="all, none, or of " + ", ".join(PEERS))
    parser.add_argument("--ops", default="all", help="operations, comma-separated: " + ", ".join(dict(CASES["cpu"])))
    parser.add_argument("--dtypes", default="all", help="of fp32, bf16")
    parser.add_argument("--out", metavar="DIR", help="where results.json and table.md go; nowhere if not given")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads of PyTorch")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, times only, no peers")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.peers = _chosen(parser, "peers", "none" if options.quick else options.peers, PEERS)
    if options.case is not None:
        print(json.dumps(run_case(options)))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    ops = _chosen(parser, "ops", options.ops, list(dict(CASES["cpu"])))
    dtypes = _chosen(parser, "dtypes", options.dtypes, ["fp32", "bf16"])
    with FakeTensorMode():  # shapes and names without memory
        labels = [(op, make()) for op, make in CASES[options.device]]
    indices = [i for i, (op, case) in enumerate(labels) if op in ops and case.dtype in dtypes]
    from fastllm.training import ProgressBar

    progress = ProgressBar(len(indices))
    machine = _machine(options.threads, options.device)
    report: dict = {
        "machine": machine,
        "peers": [p for p in PEERS if p in options.peers],
        "cases": [],
        "warm_malloc": {},
    }
    for done, index in enumerate(indices):
        result = _in_a_process(index, options, warm=False)
        result.setdefault("op", labels[index][0])
        report["cases"].append(result)
        if options.device == "cpu" and not options.quick and "failed" not in result:
            warm = _in_a_process(index, options, warm=True)
            if "failed" not in warm:
                report["warm_malloc"][f"{warm['op']} {warm['shape']} {warm['dtype']}"] = _ratio(warm)
        progress.update(done + 1, result["op"])
    print(table(report))
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "table.md").write_text(table(report))
    return 0


def _chosen(parser: argparse.ArgumentParser, what: str, text: str, known: Sequence[str]) -> set[str]:
    """Names of a comma-separated list; ``all`` or ``none``."""
    chosen = set(known) if text == "all" else set() if text == "none" else set(text.split(","))
    if chosen - set(known):
        parser.error(f"--{what}: unknown {', '.join(sorted(chosen - set(known)))}; known: {', '.join(known)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
