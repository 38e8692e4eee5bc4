"""Training a language model: the step of the optimizer, evaluation, and the state that a run goes on from."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastllm.lm import checkpoint, parallel
from fastllm.lm.data import Windows
from fastllm.lm.options import Options
from fastllm.lm.processes import ALONE, Processes
from fastllm.models.base import LanguageModel
from fastllm.models.sampling import evaluation_mode
from fastllm.operations.checks import is_placed

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_BATCH, _DROPOUT = range(2)  # what random numbers are for


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    processes: Processes = ALONE,
) -> tuple[float, int]:
    """Mean cross-entropy in nats a word, and the number of words; ``model`` is in evaluation mode meanwhile. Processes
    share the rows of each batch."""
    total, count = 0.0, 0
    with evaluation_mode(model):
        for ids, targets in batches:
            rows, counted = processes.share(np.arange(len(ids)))
            first, stop = int(rows[0]), int(rows[-1]) + 1
            words = counted * targets.shape[1]
            total += loss(ids[first:stop], targets[first:stop]).item() * words
            count += words
    total, words = processes.sums([total, count])
    return (total / words if words else math.nan), int(words)


class _Loss(nn.Module):
    """The loss as a ``forward``, which is what wrappers of modules know."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(ids, targets)


class Trainer:
    """A model, its optimizer and its place in a run.

    All that is random in a step follows from the seed and the step's number, so that a run goes on after a checkpoint bit
    for bit as it would have without one.

    Parameters
    ----------
    model
        Trained in place, on ``device``.
    train : Windows
        Batches are drawn from it.
    test : Windows
        Held out for evaluations; it may be empty.
    options : Options
        Resolved.
    processes : Processes
        Those of the run. Each computes its part of a batch, and gradients are averaged.
    cut : str, optional
        How processes share parameters, gradients and the optimizer's state instead of each having all of them:
        ``"fsdp"``, every tensor; ``"vocabulary"``, the rows of the table and of the output layer, with which all processes
        compute the same batch.
    """

    def __init__(
        self,
        model: LanguageModel,
        train: Windows,
        test: Windows,
        options: Options,
        device: torch.device | str = "cpu",
        processes: Processes = ALONE,
        cut: str | None = None,
    ) -> None:
        if len(train) == 0:
            raise ValueError(
                f"the data has {train.words} words to train on; sequences of {options.sequence_length} need more"
            )
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.train, self.test, self.options = train, test, options
        self.step = 0
        self.best_loss: float | None = None
        self.evaluations_without_gain = 0
        self.whole = True  # False in the middle of a step, when there is nothing to be saved
        self.processes, self.cut = processes, cut
        self.shared = ALONE if cut == "vocabulary" else processes  # whom a batch is shared with
        self.loss: nn.Module = _Loss(model)
        if processes.size > 1:
            self.loss = parallel.spread(self.loss, model, self.device, processes, cut)
        self._spread = self.loss
        if options.compile:
            self.loss = torch.compile(self.loss)
        self.optimizer = _optimizer(model, options)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.dtype == "fp16")

    def _random(self, *purpose: int) -> np.random.SeedSequence:
        return np.random.SeedSequence((self.options.seed, self.step, *purpose))

    def starts(self) -> np.ndarray:
        """Where the sequences of this step's batch start."""
        return self.train.draw(self.options.batch_size, np.random.default_rng(self._random(_BATCH)))

    def batch(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        ids, targets = self.train.batch(starts)
        return ids.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def autocast(self) -> contextlib.AbstractContextManager:
        dtype = DTYPES[self.options.dtype]
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One step of the optimizer; the loss before it, and the gradient's length before it is clipped."""
        options = self.options
        self.whole = False
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate_at(self.step)
        rank = (self.shared.rank,) if self.shared.rank else ()  # other rows, other masks
        torch.manual_seed(int(self._random(_DROPOUT, *rank).generate_state(1, np.uint64)[0]))
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        parts = np.array_split(self.starts(), options.accumulation)
        for number, part in enumerate(parts, 1):
            rows, count = self.shared.share(part)
            ids, targets = self.batch(rows)
            # Gradients are averaged over processes: a part of the batch counts by its rows, whatever its size.
            weight = count * self.shared.size / options.batch_size
            with parallel.synchronised(self._spread, number == len(parts)):
                with self.autocast():
                    loss = self.loss(ids, targets) * weight
                self.scaler.scale(loss).backward()
            total += loss.detach()
        total = parallel.mean(total, self.shared)
        self.scaler.unscale_(self.optimizer)
        norm = parallel.clip_(list(self.model.parameters()), options.clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.whole = True
        return total, norm

    def evaluate(self) -> float:
        """Mean loss of the held-out words, of ``eval_words`` at most, in nats a word."""
        with self.autocast():
            return mean_loss(
                self.loss,
                lambda ids, targets: self.loss(ids.to(self.device), targets.to(self.device)),
                self.test.in_order(self.options.batch_size, self.options.eval_words),
                self.shared,
            )[0]

    def note(self, loss: float) -> bool:
        """Keep count of evaluations; whether this one is the best."""
        best = self.best_loss is None or loss < self.best_loss
        if best:
            self.best_loss, self.evaluations_without_gain = loss, 0
        else:
            self.evaluations_without_gain += 1
        return best

    def _optimizer_state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }

    def checkpoint(self, tokenizer: str | None, source: dict) -> checkpoint.Checkpoint:
        """The state of the run. All processes call this; the first gets the tensors.

        Raises
        ------
        ValueError
            A parameter is not finite.
        """
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        names = list(parameters)
        finite = [bool(parallel.local(value).isfinite().all()) for value in parameters.values()]
        first = self.processes.most(len(names) - finite.index(False) if False in finite else 0)
        if first:
            name = names[len(names) - first]
            raise ValueError(f"training has failed: {name} is not finite at step {self.step}")
        tensors = {f"model.{name}": value for name, value in parameters.items()}
        tensors |= {f"optimizer.{name}": value for name, value in self._optimizer_state().items()}
        return checkpoint.Checkpoint(
            model=self.options.model,
            config=self.model.config,
            tokenizer=tokenizer,
            options=vars(self.options),
            source=source,
            step=self.step,
            best_loss=self.best_loss,
            evaluations_without_gain=self.evaluations_without_gain,
            scaler=self.scaler.state_dict() or None,
            tensors=parallel.gathered(tensors, self.processes),
        )

    def restore(self, state: checkpoint.Checkpoint, path: str | Path) -> None:
        """Go on from a checkpoint, whose parameters the model has already.

        Raises
        ------
        ValueError
            The optimizer's state is of another model.
        """
        found = {k.removeprefix("optimizer."): t for k, t in state.tensors.items() if k.startswith("optimizer.")}
        if found:  # there is none before the first step
            for _, parameter in self.model.named_parameters():
                self.optimizer.state[parameter] = self._empty_state(parameter)
            checkpoint.fill(self._optimizer_state(), found, path)
        self.step = state.step
        self.best_loss = state.best_loss
        self.evaluations_without_gain = state.evaluations_without_gain
        if state.scaler is not None and self.scaler.is_enabled():
            checkpoint.check_fields(path, state.scaler, self.scaler.state_dict())
            self.scaler.load_state_dict(state.scaler)

    def _empty_state(self, parameter: Tensor) -> dict[str, Tensor]:
        if self.options.optimizer == "adamw":
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        return {"momentum_buffer": torch.zeros_like(parameter)} if self.options.momentum else {}


def _optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """Biases and the gains of normalisations do not decay: they are no weights of a sum."""
    groups = []
    for parameters in parallel.alike(model.parameters()):  # a fused step takes tensors of one kind
        matrices = [p for p in parameters if p.dim() > 1]
        rest = [p for p in parameters if p.dim() <= 1]
        groups += [{"params": matrices, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    # The fused step needs no temporary tensors of the parameters' size.
    if options.optimizer == "sgd":
        fused = not any(is_placed(p) for p in model.parameters())  # DTensor has no fused step of SGD
        return torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)


def compare_with_eager(trainer: Trainer, rounds: int = 15) -> dict[str, tuple[float, float]]:
    """Milliseconds a step of forward and backward, ours and eager PyTorch's, in alternation on the same batches and
    parameters: ``{"fastllm": (minimum, median), "eager": (minimum, median)}``."""
    times: dict[str, list[float]] = {"fastllm": [], "eager": []}
    batch = trainer.batch(trainer.starts())
    for _ in range(rounds):
        for name, backend in (("fastllm", None), ("eager", "eager")):
            trainer.model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            trainer.model.loss(*batch, backend=backend).backward()
            times[name].append(1e3 * (time.perf_counter() - start))
    trainer.model.zero_grad(set_to_none=True)
    return {name: (min(t), sorted(t)[len(t) // 2]) for name, t in times.items()}
