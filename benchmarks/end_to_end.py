"""Tokens a second and extra memory of training: ``python benchmarks/end_to_end.py --out DIR`` writes end_to_end.json.

MLPLanguageModel, and Hugging Face's OPT in GPT-2's size with random weights, before and after ``fastllm.accelerate``, under
AdamW on random Zipf-distributed ids: eager PyTorch, torch.compile of it, fastllm, and fastllm under torch.compile; copies of
one model in one process, a step of each in turn.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

VARIANTS = ("eager", "compile", "fastllm", "fastllm + compile")
TIMEOUT = 900  # seconds of one model
# Vocabulary, embedding, hidden, context, sequences, their length, dtype.
MLPS = {
    "MLP, small (1000, 10, 20), 32 x 8 tokens, fp32": (1000, 10, 20, 1, 32, 8, "float32"),
    "MLP, word level (10000, 64, 256), 32 x 32 tokens, fp32": (10000, 64, 256, 4, 32, 32, "float32"),
    "MLP, GPT-2's vocabulary (50257, 256, 768), 16 x 64 tokens, fp32": (50257, 256, 768, 4, 16, 64, "float32"),
}
# The sizes of OPTConfig that are GPT-2's, sequences, their length.
GPT2 = {
    "vocab_size": 50257,
    "hidden_size": 768,
    "word_embed_proj_dim": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 1024,
}
FEW_WORDS = {**GPT2, "vocab_size": 2048}
OPT = {
    "cpu": {
        "OPT in GPT-2's size (768, 12 layers, 50257), 2 x 128 tokens, fp32": (GPT2, 2, 128, "float32"),
        "OPT in GPT-2's size (768, 12 layers, 2048), 2 x 128 tokens, fp32": (FEW_WORDS, 2, 128, "float32"),
    },
    "cuda": {
        "OPT in GPT-2's size (768, 12 layers, 50257), 8 x 1024 tokens, bf16": (GPT2, 8, 1024, "bfloat16"),
        "OPT in GPT-2's size (768, 12 layers, 2048), 8 x 1024 tokens, bf16": (FEW_WORDS, 8, 1024, "bfloat16"),
    },
}
Loss = Callable  # of a batch of ids, one longer than what is predicted


def mlp_losses(sizes: tuple, device: str) -> tuple[dict[str, tuple[object, Loss]], object]:
    """Model and loss by variant, and the ids."""
    import torch
    from cases import zipf

    from fastllm.models import MLPLanguageModel

    vocabulary, embedding, hidden, context, batch, length, dtype = sizes
    model = MLPLanguageModel(vocabulary, embedding, hidden, context).to(device, getattr(torch, dtype))
    ids = zipf(batch * (length + 1), vocabulary).view(batch, length + 1).to(device)

    def variant(backend: str | None) -> tuple[object, Loss]:
        own = copy.deepcopy(model)
        return own, lambda ids: own.loss(ids[:, :-1], ids[:, 1:], backend=backend)

    return {name: variant("eager" if name in ("eager", "compile") else None) for name in VARIANTS}, ids


def opt_losses(settings: tuple, device: str) -> tuple[dict[str, tuple[object, Loss]], object]:
    import torch
    from cases import zipf
    from transformers import OPTConfig, OPTForCausalLM

    import fastllm

    sizes, batch, length, dtype = settings
    # No token is special: padding would leave its embedding without a gradient.
    config = OPTConfig(**sizes, dropout=0.0, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model = OPTForCausalLM(config).to(device, getattr(torch, dtype))
    ids = zipf(batch * length, sizes["vocab_size"]).view(batch, length).to(device)

    def variant(name: str) -> tuple[object, Loss]:
        own = copy.deepcopy(model)
        if name.startswith("fastllm"):
            fastllm.accelerate(own)
        return own, lambda ids: own(ids, labels=ids, use_cache=False).loss

    return {name: variant(name) for name in VARIANTS}, ids


class Training:
    """One variant and its optimizer."""

    def __init__(self, name: str, model, loss: Loss, ids):
        import torch

        self.loss = torch.compile(loss) if name.endswith("compile") else loss
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        self.ids = ids

    def step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.ids)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def timed(self, clock) -> dict[str, float]:
        start = clock.start()
        self.step()
        return {"step": clock.seconds(start, clock.mark())}


def train(losses: dict[str, tuple[object, Loss]], ids, device: str, seconds: float) -> dict:
    """By variant: tokens a second, bytes beyond those of model and optimizer, the loss of the first step."""
    import harness

    clock = harness.Clock(device)
    trainings = {name: Training(name, model, loss, ids) for name, (model, loss) in losses.items()}
    first, peaks, failed = {}, {}, {}
    for name, training in trainings.items():
        try:
            first[name] = float(training.step())
            training.step()
            training.optimizer.zero_grad(set_to_none=True)
            peaks[name] = harness.peak_of(training.step, device)
            training.optimizer.zero_grad(set_to_none=True)
        except Exception as error:  # torch.compile may fail on a machine without a compiler
            failed[name] = {"failed": harness.reason(error)}
    timed = {name: (lambda t=trainings[name]: t.timed(clock)) for name in peaks}
    times = harness.alternate(timed, 200, seconds * len(timed), lambda round_: None)
    result = dict(failed)
    for name, found in times.items():
        result[name] = found
        if "failed" not in found:
            rate = ids[:, 1:].numel() / found["step"]["median"]
            result[name] = {**found, "tokens_per_second": rate, "extra_peak": peaks[name], "first_loss": first[name]}
    return result


def train_named(title: str, threads: int, device: str, seconds: float, only: list[str]) -> dict:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if title in MLPS:
        losses, ids = mlp_losses(MLPS[title], device)
    else:
        losses, ids = opt_losses(OPT[device][title], device)
    return train({name: losses[name] for name in only}, ids, device, seconds)


def in_a_process(env: dict[str, str], *arguments: object) -> dict:
    command = [sys.executable, __file__, "--train", json.dumps(arguments)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {TIMEOUT} s"}
    if run.returncode != 0:
        return {"failed": (run.stderr.strip().splitlines() or [f"status {run.returncode}"])[-1][:200]}
    return json.loads(run.stdout.splitlines()[-1])


def _cell(results: dict, variant: str) -> str:
    found, base = results.get(variant, {}), results.get("eager", {}).get("tokens_per_second")
    if "failed" in found:
        return "failed: " + found["failed"].replace("|", "/")
    if not found:
        return ""
    ratio = found["tokens_per_second"] / base if base else None
    loses = " loses" if ratio is not None and round(ratio, 2) < 1 else ""
    ratio_text = "" if ratio is None else f" ({ratio:.2f}{loses})"
    return f"{found['tokens_per_second']:,.0f}{ratio_text}, {max(found['extra_peak'], 0) / 1e6:.0f} MB"


def table(report: dict) -> str:
    columns = [*VARIANTS, "fastllm / eager, warm malloc"]
    lines = [f"| model | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for name, results in report["models"].items():
        if "failed" in results:
            cells = [f"failed: {results['failed']}".replace("|", "/")] + [""] * len(VARIANTS)
        else:
            warm = report["warm_malloc"].get(name)
            cells = [_cell(results, v) for v in VARIANTS] + ["" if warm is None else f"{warm:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def warm_ratio(found: dict) -> float | None:
    rates = [found.get(name, {}).get("tokens_per_second") for name in ("fastllm", "eager")]
    return None if "failed" in found or None in rates else rates[0] / rates[1]


def main() -> int:
    if "--train" in sys.argv:
        print(json.dumps(train_named(*json.loads(sys.argv[sys.argv.index("--train") + 1]))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--out", default="auto", help="folder of end_to_end.json; auto: the one named after this machine"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4, help="of measurement for each variant")
    parser.add_argument("--models", default="", help="only those whose title holds this text, such as OPT")
    options = parser.parse_args()
    import machine
    from run import WARM_MALLOC

    from fastllm.lm.progress import ProgressBar

    titles = [title for title in (*MLPS, *OPT[options.device]) if options.models in title]
    report: dict = {"machine": machine.facts(options.threads, options.device), "models": {}, "warm_malloc": {}}
    progress = ProgressBar(len(titles))
    for done, title in enumerate(titles):
        arguments = (title, options.threads, options.device, options.seconds)
        report["models"][title] = in_a_process({}, *arguments, VARIANTS)
        if options.device == "cpu":
            report["warm_malloc"][title] = warm_ratio(in_a_process(WARM_MALLOC, *arguments, ("eager", "fastllm")))
        progress.update(done + 1, title)
    print(table(report))
    out = machine.folder(options.out, options.device)
    out.mkdir(parents=True, exist_ok=True)
    (out / "end_to_end.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
