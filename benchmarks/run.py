"""Times every operation, forward and backward, against eager PyTorch on the CPU, and writes the table.

    python benchmarks/run.py --device cpu --out benchmarks/results/cpu

Each case runs in a process of its own, its variants in alternation; ratios are of minima. Two baselines: stock eager
PyTorch, and with --warm-malloc eager PyTorch under an allocator that keeps large blocks (as a tuned malloc does).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from cases import CASES  # noqa: E402

import fastllm  # noqa: E402

WARM_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "1073741824",
}


def run_case(index: int, threads: int, quick: bool) -> dict:
    """One case, in this process."""
    import harness

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    case = CASES[index][1]()
    repeats = max(3, case.repeats // 4) if quick else None
    result = {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "target": case.target,
        "bytes": case.bytes,
        "flops": case.flops,
        "seconds": harness.measure(case, repeats),
    }
    if not quick:
        result["extra_peak"] = {
            n: harness.extra_peak(case, f) for n, f in (("eager", case.eager), ("fastllm", case.ours))
        }
        result["error"] = harness.errors(case)
    return result


def _in_a_process(index: int, options: argparse.Namespace, warm: bool) -> dict:
    command = [sys.executable, __file__, "--case", str(index), "--threads", str(options.threads)]
    if options.quick or warm:
        command.append("--quick")
    env = {**os.environ, **(WARM_MALLOC if warm else {})}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    if run.returncode != 0:
        return {"failed": run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"status {run.returncode}"}
    return json.loads(run.stdout.splitlines()[-1])


def _machine(threads: int) -> dict:
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
        "limits": harness.machine_limits(),
    }


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _ratio(result: dict, key: str = "min") -> float:
    return result["seconds"]["eager"][key] / result["seconds"]["fastllm"][key]


def table(report: dict) -> str:
    """The report as Markdown."""
    machine, limits = report["machine"], report["machine"]["limits"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, {machine['instruction_set']}; torch {machine['torch']}; "
        f"float32 products by {machine['float32_gemm']}; {machine['date']}, commit {machine['commit']}. "
        f"Copy {limits['copy'] / 1e9:.0f} GB/s, in place {limits['in_place'] / 1e9:.0f} GB/s; products of 2048 in eager "
        f"PyTorch: {limits['gemm_fp32'] / 1e9:.0f} GFLOP/s fp32, {limits['gemm_bf16'] / 1e9:.0f} bf16.",
        "",
        "| operation | shape | dtype | eager ms | fastllm ms | ratio | aimed at | ratio, warm malloc | achieved | "
        "extra MB eager / fastllm | error eager / fastllm |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in report["cases"]:
        if "failed" in result:
            lines.append(f"| {result.get('op', '?')} | | | failed: {result['failed']} | | | | | | | |")
            continue
        seconds = result["seconds"]
        ours = seconds["fastllm"]["min"]
        achieved = (
            f"{result['bytes'] / ours / 1e9:.0f} GB/s"
            if result["bytes"]
            else f"{result['flops'] / ours / 1e9:.0f} GF/s"
        )
        warm = report["warm_malloc"].get(f"{result['op']} {result['shape']} {result['dtype']}")
        ratio = _ratio(result)
        aim = (
            ""
            if result["target"] is None
            else f"{result['target']:g}" + ("" if ratio >= result["target"] else " (missed)")
        )
        peak = error = ""
        if "extra_peak" in result:
            peak = " / ".join(f"{result['extra_peak'][n] / 1e6:.0f}" for n in ("eager", "fastllm"))
            error = " / ".join(f"{result['error'][n]:.1e}" for n in ("eager", "fastllm"))
        lines.append(
            f"| {result['op']} | {result['shape']} | {result['dtype']} | {_milliseconds(seconds['eager']['min'])} | "
            f"{_milliseconds(ours)} | **{ratio:.2f}** | {aim} | {'' if warm is None else f'{warm:.2f}'} | {achieved} | "
            f"{peak} | {error} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastllm bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=["cpu"], default="cpu", help="where to run (CUDA kernels are not built yet)"
    )
    parser.add_argument("--ops", default="all", help="operations, comma-separated: " + ", ".join(dict(CASES)))
    parser.add_argument("--out", metavar="DIR", help="where results.json and table.md go; nowhere if not given")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads of PyTorch")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, times only")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case is not None:
        print(json.dumps(run_case(options.case, options.threads, options.quick)))
        return 0
    chosen = set(dict(CASES)) if options.ops == "all" else set(options.ops.split(","))
    unknown = chosen - set(dict(CASES))
    if unknown:
        parser.error(f"unknown operations: {', '.join(sorted(unknown))}")
    indices = [i for i, (op, _) in enumerate(CASES) if op in chosen]
    from fastllm.training import ProgressBar

    progress = ProgressBar(len(indices))
    report: dict = {"machine": _machine(options.threads), "cases": [], "warm_malloc": {}}
    for done, index in enumerate(indices):
        result = _in_a_process(index, options, warm=False)
        result.setdefault("op", CASES[index][0])
        report["cases"].append(result)
        if not options.quick and "failed" not in result:
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


if __name__ == "__main__":
    sys.exit(main())
