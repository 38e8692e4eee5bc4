"""Training a language model on a text: loop, schedule, checkpoints, perplexity."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastllm.lm.data import random_batch
from fastllm.lm.tokenizer import Tokenizer
from fastllm.models import MLPLanguageModel
from fastllm.models.sampling import evaluation_mode


@dataclass
class TrainingOptions:
    """What a run is made of; kept in its checkpoints."""

    steps: int = 1500
    batch_size: int = 16
    sequence_length: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


class ProgressBar:
    """One line on stderr: rewritten on a terminal, a line every tenth elsewhere."""

    def __init__(self, total: int, stream=None) -> None:
        self.total = total
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.start = time.monotonic()
        self.shown = 0.0
        self.tenth = -1

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def update(self, done: int, text: str) -> None:
        last = done >= self.total
        if self.live:
            if time.monotonic() - self.shown < 0.1 and not last:
                return
            self.shown = time.monotonic()
            filled = round(24 * done / self.total)
            line = f"[{'#' * filled}{'.' * (24 - filled)}] {done}/{self.total}  {text}"
            width = shutil.get_terminal_size().columns - 1
            self.stream.write("\r" + line[:width].ljust(width) + ("\n" if last else ""))
        elif 10 * done // self.total > self.tenth:
            self.tenth = 10 * done // self.total
            self.stream.write(f"{done}/{self.total}  {text}\n")
        self.stream.flush()


@torch.no_grad()
def perplexity(model: MLPLanguageModel, ids: Tensor, length: int = 64, batch_size: int = 64) -> float:
    """``exp`` of the mean cross-entropy, in nats a word, of predicting each of ``ids`` but the first."""
    total, count = 0.0, 0
    length = min(length, len(ids) - 1)
    whole = (len(ids) - 1) // length * length
    inputs, targets = ids[:whole].view(-1, length), ids[1 : whole + 1].view(-1, length)
    with evaluation_mode(model):
        for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            total += model.loss(x, y).item() * y.numel()
            count += y.numel()
    return math.exp(total / count)


class Trainer:
    """A model, its optimizer and its place in a run.

    Parameters
    ----------
    model
        Trained in place.
    tokenizer
        Saved beside it.
    train_ids : Tensor
        ``(n,)`` ids to draw batches from.
    test_ids : Tensor
        ``(m,)`` ids held out for the perplexity.
    """

    def __init__(
        self,
        model: MLPLanguageModel,
        tokenizer: Tokenizer,
        train_ids: Tensor,
        options: TrainingOptions,
        test_ids: Tensor,
    ) -> None:
        if len(train_ids) <= options.sequence_length + 1:
            raise ValueError(
                f"the text has {len(train_ids)} tokens to train on; sequences of {options.sequence_length} need more"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.train_ids = train_ids
        self.test_ids = test_ids
        self.options = options
        self.step = 0
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, foreach=True
        )
        self.generator = torch.Generator().manual_seed(options.seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        return random_batch(self.train_ids, self.options.batch_size, self.options.sequence_length, self.generator)

    def train_step(self) -> Tensor:
        """One step of the optimizer; the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate_at(self.step)
        loss = self.model.loss(*self.batch())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def run(self, until: int | None = None, callback: Callable[[int, float], None] | None = None) -> None:
        """Train up to step ``until`` (default: all steps); ``callback(step, smoothed loss)`` after each."""
        self.model.train()
        smoothed = None
        for _ in range(self.step, self.options.steps if until is None else until):
            loss = self.train_step().item()
            smoothed = loss if smoothed is None else 0.98 * smoothed + 0.02 * loss
            if callback is not None:
                callback(self.step, smoothed)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint; an interrupted write leaves the one before whole."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "format": 1,
            "config": self.model.config,
            "merges": torch.tensor(self.tokenizer.merges, dtype=torch.int32).reshape(-1, 2),
            "options": asdict(self.options),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "train_ids": self.train_ids,
            "test_ids": self.test_ids,
            "generator": self.generator.get_state(),
            "torch_generator": torch.get_rng_state(),
        }
        part = path.with_name(path.name + ".part")
        torch.save(state, part)
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path) -> Trainer:
        """A run as :meth:`save` left it: it goes on bit for bit as it would have."""
        state = load_state(path)
        trainer = cls(
            MLPLanguageModel(**state["config"]),
            Tokenizer(state["merges"].tolist()),
            state["train_ids"],
            TrainingOptions(**state["options"]),
            state["test_ids"],
        )
        trainer.model.load_state_dict(state["model"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.step = state["step"]
        trainer.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_generator"])
        return trainer


def load_state(path: str | Path) -> dict:
    """What a checkpoint holds.

    Raises
    ------
    ValueError
        No such file, or no checkpoint of fastllm.
    """
    try:
        state = torch.load(path, weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read checkpoint {path}: {error.strerror}") from error
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of fastllm: {error}") from error
    if not isinstance(state, dict) or state.get("format") != 1:
        raise ValueError(f"{path} is not a checkpoint of fastllm")
    return state


def load_model(path: str | Path) -> tuple[MLPLanguageModel, Tokenizer]:
    """Model and tokenizer of a checkpoint, for generation. Errors as :func:`load_state`."""
    state = load_state(path)
    model = MLPLanguageModel(**state["config"])
    model.load_state_dict(state["model"])
    return model.eval(), Tokenizer(state["merges"].tolist())


def compare_with_eager(trainer: Trainer, rounds: int = 15) -> dict[str, tuple[float, float]]:
    """Milliseconds a step of forward and backward, ours and eager PyTorch's, in alternation on the same batches and
    parameters: ``{"fastllm": (minimum, median), "eager": (minimum, median)}``."""
    times: dict[str, list[float]] = {"fastllm": [], "eager": []}
    for _ in range(rounds):
        batch = trainer.batch()
        for name, backend in (("fastllm", None), ("eager", "eager")):
            trainer.model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            trainer.model.loss(*batch, backend=backend).backward()
            times[name].append(1e3 * (time.perf_counter() - start))
    trainer.model.zero_grad(set_to_none=True)
    return {name: (min(t), sorted(t)[len(t) // 2]) for name, t in times.items()}
