"""Tokens a second and extra memory of training: ``python benchmarks/end_to_end.py --out benchmarks/results/cpu``.

MLPLanguageModel and AdamW on random Zipf-distributed ids: eager PyTorch, torch.compile of it, fastllm, and fastllm under
torch.compile; the same parameters, each variant in a process of its own, the variants in turn, two rounds. The better
round counts: on a shared machine the other measures the neighbors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

VARIANTS = ("eager", "eager, compiled", "fastllm", "fastllm, compiled")
# Vocabulary, embedding, hidden, context, batch of sequences, their length, dtype.
MODELS = {
    "small (1000, 10, 20), 32 x 8 tokens, fp32": (1000, 10, 20, 1, 32, 8, "float32"),
    "word level (10000, 64, 256), 32 x 32 tokens, fp32": (10000, 64, 256, 4, 32, 32, "float32"),
    "GPT-2's vocabulary (50257, 256, 768), 16 x 64 tokens, fp32": (50257, 256, 768, 4, 16, 64, "float32"),
    "GPT-2's vocabulary (50257, 256, 768), 16 x 64 tokens, bf16": (50257, 256, 768, 4, 16, 64, "bfloat16"),
}


def train(model_name: str, variant: str, threads: int, device: str, seconds: float) -> dict:
    """Tokens a second, and bytes beyond those of the model and its optimizer, in this process."""
    import harness
    import torch
    from cases import zipf

    from fastllm import memory
    from fastllm.models import MLPLanguageModel

    vocabulary, embedding, hidden, context, batch, length, dtype = MODELS[model_name]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    backend = "eager" if variant.startswith("eager") else None
    model = MLPLanguageModel(vocabulary, embedding, hidden, context).to(device, getattr(torch, dtype))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = zipf(batch * (length + 1), vocabulary).view(batch, length + 1).to(device)

    def loss_of(inputs, targets):
        return model.loss(inputs, targets, backend=backend)

    if variant.endswith("compiled"):
        loss_of = torch.compile(loss_of)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    step()
    step()
    optimizer.zero_grad(set_to_none=True)
    memory.empty_pool()
    peak = harness.peak_of(step, device)
    times = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times) < 5:
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    return {"tokens_per_second": batch * length / statistics.median(times), "extra_peak": peak}


def table(report: dict) -> str:
    lines = [
        f"{report['machine']}, {report['threads']} threads, torch {report['torch']}: tokens a second of training (times "
        "eager), extra MB",
        "",
        f"| model | {' | '.join(VARIANTS)} |",
        "| --- |" + " --- |" * len(VARIANTS),
    ]
    for name, results in report["models"].items():
        base = results["eager"].get("tokens_per_second")
        cells = []
        for variant in VARIANTS:
            r = results[variant]
            if "failed" in r:
                cells.append("failed: " + r["failed"].replace("|", "/"))
                continue
            ratio = f" ({r['tokens_per_second'] / base:.2f})" if base else ""
            cells.append(f"{r['tokens_per_second']:.3g}{ratio}, {r['extra_peak'] / 1e6:.0f} MB")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def in_a_process(*arguments: object) -> dict:
    command = [sys.executable, __file__, "--train", json.dumps(arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        return {"failed": (run.stderr.strip().splitlines() or [f"status {run.returncode}"])[-1][:200]}
    return json.loads(run.stdout.splitlines()[-1])


def main() -> int:
    if "--train" in sys.argv:
        print(json.dumps(train(*json.loads(sys.argv[sys.argv.index("--train") + 1]))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="folder of end_to_end.json and end_to_end.md")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3, help="of measurement for each variant and round")
    options = parser.parse_args()
    import torch

    from fastllm.training import ProgressBar

    name = torch.cuda.get_device_name() if options.device == "cuda" else _processor()
    report: dict = {"machine": name, "threads": options.threads, "torch": torch.__version__, "models": {}}
    rounds = 2
    progress = ProgressBar(len(MODELS) * len(VARIANTS) * rounds)
    for model in MODELS:
        best: dict[str, dict] = {}
        for turn in range(rounds):
            for variant in VARIANTS:
                found = in_a_process(model, variant, options.threads, options.device, options.seconds)
                if found.get("tokens_per_second", 0) >= best.get(variant, {}).get("tokens_per_second", 0):
                    best[variant] = found
                done = (len(report["models"]) * rounds + turn) * len(VARIANTS) + VARIANTS.index(variant)
                progress.update(done + 1, variant)
        report["models"][model] = best
    print(table(report))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "end_to_end.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "end_to_end.md").write_text(table(report))
    return 0


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
