"""A run of the training program: made or resumed, trained step by step, evaluated, saved, logged."""

from __future__ import annotations

import argparse
import io
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastllm import backends
from fastllm.lm import checkpoint, costs, data, processes, records
from fastllm.lm.options import Options, changed, flag, given
from fastllm.lm.processes import ALONE, Processes
from fastllm.lm.progress import ProgressBar
from fastllm.lm.tokenizer import Tokenizer
from fastllm.lm.training import DTYPES, Trainer, compare_with_eager, mean_loss

LOG_EVERY = 10  # steps

SOURCE = ("text", "data", "sha256")  # the fields of a checkpoint's ``source``


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the end of a step."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class InterruptAfterStep:
    """Ctrl-C and SIGTERM wait for the end of a step, so that what is saved is a whole one; a second one does not wait.
    Several processes end after the same step, whichever of them was asked; there a second one waits, too."""

    def __init__(self, processes: Processes = ALONE) -> None:
        self.processes = processes

    def __enter__(self) -> InterruptAfterStep:
        self._asked: int | None = None
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python knows no signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, *_: object) -> None:
        if self._asked is not None and self.processes.size == 1:
            raise Interrupted(number)
        self._asked = number

    def step_ends(self) -> None:
        asked = self.processes.most(self._asked or 0)
        if asked:
            raise Interrupted(asked)


@dataclass
class Source:
    """The data of a run: token ids, where they come from, and the tokenizer."""

    ids: np.ndarray
    origin: dict  # "text": files, or "data": a file of tokens; and "sha256"
    tokenizer: Tokenizer | None
    vocab_size: int
    description: str


def _source(text: list[str], tokens: str | None, make: Callable[[str | None], Tokenizer | None], size: int) -> Source:
    """Read the data; ``make`` gives the tokenizer for the text, or for a file of tokens, if there is one."""
    if tokens is None:
        whole = data.read_text(text)
        tokenizer = make(whole)
        ids = tokenizer.encode(whole)
        origin = {"text": [str(Path(path).resolve()) for path in text], "data": None, "sha256": data.digest(text)}
        told = f"text: {len(whole):,} characters, {len(ids):,} tokens of {tokenizer.vocab_size}"
        return Source(ids, origin, tokenizer, tokenizer.vocab_size, told)
    ids, tokenizer = data.read_tokens(tokens), make(None)
    vocab_size = size if tokenizer is None else tokenizer.vocab_size
    if len(ids) and data.largest(ids) >= vocab_size:
        raise ValueError(
            f"{tokens} holds the token {data.largest(ids)}; the vocabulary has {vocab_size} (--vocab-size)"
        )
    origin = {"text": [], "data": str(Path(tokens).resolve()), "sha256": data.digest([tokens])}
    return Source(ids, origin, tokenizer, vocab_size, f"data: {len(ids):,} tokens of {vocab_size}")


def _new_tokenizer(kind: str, vocab_size: int, processes: Processes) -> Callable[[str | None], Tokenizer | None]:
    def make(text: str | None) -> Tokenizer | None:
        if kind.endswith(".json"):
            try:
                return Tokenizer.load(kind)
            except OSError as error:
                raise ValueError(f"cannot read the tokenizer {kind}: {error.strerror}") from error
        if text is None:
            return None
        if processes.size == 1:
            return Tokenizer.train(text, kind, vocab_size)
        return Tokenizer.from_json(processes.of_first(lambda: Tokenizer.train(text, kind, vocab_size).to_json()))

    return make


def _device(name: str | None, processes: Processes = ALONE) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and processes.size > 1:
            if device.index is not None:
                raise ValueError(f"--device {name}: several processes take a GPU each; give cuda alone")
            device = torch.device("cuda", processes.local_rank)
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _check_writable(path: Path) -> None:
    """OSError now, not after hours of training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = path.with_name(path.name + ".part")
    try:
        probe.open("wb").close()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write a checkpoint to {path}: {error.strerror}") from error


def beside(out: str | Path, ending: str) -> Path:
    """The file of a run beside its checkpoint: model.safetensors, model.best.safetensors, model.jsonl."""
    return Path(out).with_suffix(ending)


class Run:
    """A run that the command line asks for.

    Parameters
    ----------
    arguments : argparse.Namespace
        Of ``fastllm train``.
    processes : Processes
        The first of them prints and writes.
    """

    def __init__(self, arguments: argparse.Namespace, processes: Processes = ALONE) -> None:
        self.arguments, self.processes = arguments, processes
        self.cut = _cut(arguments, processes)
        self.device = _device(arguments.device, processes)
        state = checkpoint.read(arguments.resume) if arguments.resume else None
        self.out = Path(arguments.out or arguments.resume or "checkpoints/model.safetensors")
        if self.out.is_dir():
            raise OSError(f"cannot write a checkpoint to {self.out}: it is a folder")
        self.best = beside(self.out, ".best.safetensors")
        self.log_path = Path(arguments.log or beside(self.out, ".jsonl"))
        if self.best == self.out:
            raise ValueError(f"--out {self.out}: the best checkpoint has this name; give another one")
        self.options = self._options(state)
        _check_cut(self.cut, self.options)
        self.source = self._read_source(state)
        self.config = self.options.model_config(self.source.vocab_size) if state is None else state.config
        self.costs = costs.of(self.options, self.config)
        self.say(self.source.description)
        self.say(
            f"model: {self.options.model}, {self.costs.parameters:,} parameters, {self.costs.flops:,} FLOPs a token, "
            f"about {self.costs.memory / 2**20:,.0f} MiB at the peak of a step"
        )
        if arguments.dry_run:
            return
        free = costs.free_memory(self.device)
        if self.costs.memory > free:
            raise ValueError(
                f"the run needs about {self.costs.memory / 2**30:,.1f} GiB of memory, and {free / 2**30:,.1f} GiB are free"
            )
        processes.of_first(lambda: _check_writable(self.out))
        self.trainer = self._trainer(state)
        self.last_loss = math.nan
        self.tokenizer_json = None if self.source.tokenizer is None else self.source.tokenizer.to_json()

    def say(self, text: str, **how) -> None:
        """Print, in one process alone."""
        if self.processes.is_first:
            print(text, **how)

    def _options(self, state: checkpoint.Checkpoint | None) -> Options:
        wanted = given(self.arguments)
        if state is None:
            return Options(**wanted).resolved()
        checkpoint.check_fields(self.arguments.resume, state.options, vars(Options()))
        options = changed(Options(**state.options), wanted)
        if options.steps < state.step:
            raise ValueError(f"--steps, {options.steps}, must be at least {state.step}, the steps that are done")
        return options

    def _read_source(self, state: checkpoint.Checkpoint | None) -> Source:
        text, tokens = self.arguments.text or [], self.arguments.data
        if text and tokens:
            raise ValueError("--text and --data exclude each other")
        if state is None:
            make = _new_tokenizer(self.options.tokenizer, self.options.vocab_size, self.processes)
            return _source(text, tokens, make, self.options.vocab_size)
        checkpoint.check_fields(self.arguments.resume, state.source, dict.fromkeys(SOURCE))
        if not text and not tokens:
            text, tokens = state.source["text"], state.source["data"]
        if data.digest([tokens] if tokens else text) != state.source["sha256"]:
            name = tokens or ", ".join(text) or "the built-in text"
            raise ValueError(f"{name} is not what {self.arguments.resume} was trained on (another SHA-256)")
        return _source(text, tokens, lambda _: state.build_tokenizer(), state.config.get("vocab_size", 0))

    def _trainer(self, state: checkpoint.Checkpoint | None) -> Trainer:
        options = self.options
        stretches = data.split(len(self.source.ids), options.validation)
        train, test = (data.Windows(self.source.ids, part, options.sequence_length) for part in stretches)
        if state is None:
            torch.manual_seed(options.seed)
            model = checkpoint.MODELS[options.model](**self.config)
        else:
            model = state.build_model(self.arguments.resume)
        trainer = Trainer(model, train, test, options, self.device, self.processes, self.cut)
        if state is not None:
            trainer.restore(state, self.arguments.resume)
        return trainer

    def save(self, path: Path) -> None:
        state = self.trainer.checkpoint(self.tokenizer_json, self.source.origin)
        self.processes.of_first(lambda: checkpoint.write(path, state))

    def train(self) -> None:
        """Train to the last step, or until evaluations bring no gain for too long.

        Raises
        ------
        Interrupted
            Ctrl-C or SIGTERM; the last whole step is saved.
        OSError
            The log or stdout or stderr cannot be written; the last whole step is saved if that can be. Of several processes
            one alone finds that, and nothing is saved.
        """
        rate = costs.product_rate(self.device, DTYPES[self.options.dtype])
        if self.processes.is_first:
            log = records.Log(self.log_path, self.arguments.log_dir, self.trainer.step)
            progress = ProgressBar(self.options.steps, first=self.trainer.step)
        else:
            log = records.Nothing()
            progress = ProgressBar(self.options.steps, io.StringIO(), first=self.trainer.step)
        try:
            with InterruptAfterStep(self.processes) as interrupt:
                self._steps(log, progress, rate, interrupt)
        except (KeyboardInterrupt, OSError) as error:
            progress.close()
            if self.trainer.whole and (self.processes.size == 1 or isinstance(error, Interrupted)):
                self.save(self.out)
            raise
        finally:
            progress.close()
            log.close()

    def _steps(self, log: records.Log, progress: ProgressBar, rate: float, interrupt: InterruptAfterStep) -> None:
        options, trainer = self.options, self.trainer
        words = options.batch_size * options.sequence_length
        first, shown, smoothed = trainer.step, 0.0, None
        while trainer.step < options.steps and not self._stale():
            loss, norm = trainer.train_step()
            step, last = trainer.step, trainer.step == options.steps
            if step % LOG_EVERY == 0 or last:
                now = float(loss)
                if not math.isfinite(now):
                    trainer.whole = False  # not worth to be saved
                    raise ValueError(f"training has failed: the loss is {now} at step {step}; {self._saved()}")
                smoothed = now if smoothed is None else 0.8 * smoothed + 0.2 * now
                speed = (step - first) * words / max(progress.elapsed(), 1e-9)
                log.write(
                    step,
                    loss=now,
                    learning_rate=trainer.optimizer.param_groups[0]["lr"],
                    gradient_norm=float(norm),
                    tokens_per_second=round(speed, 1),
                )
                shown = speed * self.costs.flops / rate
            if smoothed is not None:
                progress.update(step, f"loss {smoothed:.3f}  {speed:,.0f} tokens/s  {shown:.0%} of products")
            if options.eval_every and step % options.eval_every == 0 and not last:
                self._evaluate(log)
            if options.save_every and step % options.save_every == 0 and not last:
                self.save(self.out)
            interrupt.step_ends()
        self._evaluate(log)
        self.save(self.out)

    def _stale(self) -> bool:
        patience = self.options.patience
        return 0 < patience <= self.trainer.evaluations_without_gain

    def _evaluate(self, log: records.Log) -> None:
        if not self.trainer.test.stretches:
            return
        loss = self.last_loss = self.trainer.evaluate()
        log.write(self.trainer.step, validation_loss=loss, perplexity=math.exp(min(loss, 700.0)))
        if self.trainer.note(loss):
            self.save(self.best)

    def _saved(self) -> str:
        return f"the last checkpoint is {self.out}" if self.out.exists() else "there is no checkpoint yet"


def _cut(arguments: argparse.Namespace, processes: Processes) -> str | None:
    """How the processes share the model."""
    wanted = [name for name in ("fsdp", "vocab_parallel") if getattr(arguments, name)]
    if wanted and processes.size == 1:
        raise ValueError(
            f"{flag(wanted[0])} needs several processes: torchrun --nproc-per-node 2 -m fastllm train {flag(wanted[0])} ..."
        )
    if len(wanted) == 2:
        raise ValueError("--fsdp and --vocab-parallel exclude each other")
    if arguments.compare and processes.size > 1:
        raise ValueError("--compare times a single process")
    return {"fsdp": "fsdp", "vocab_parallel": "vocabulary"}[wanted[0]] if wanted else None


def _check_cut(cut: str | None, options: Options) -> None:
    if cut is not None and options.dtype == "fp16":
        raise ValueError("--dtype fp16 needs whole gradients for its scale; take bf16 with --fsdp and --vocab-parallel")
    if cut == "vocabulary" and options.compile:
        raise ValueError("--compile and --vocab-parallel exclude each other")


def train(arguments: argparse.Namespace) -> int:
    """``fastllm train``; its exit status."""
    on_gpu = torch.cuda.is_available() and not (arguments.device or "").startswith("cpu")
    started = processes.start(on_gpu)
    status = _train(arguments, started)
    processes.end(started)
    return status


def _train(arguments: argparse.Namespace, started: Processes) -> int:
    run = Run(arguments, started)
    if arguments.dry_run:
        return 0
    trainer = run.trainer
    several = f"; processes: {started.size}" if started.size > 1 else ""
    run.say(f"backend: {backends.get_backend()}; device: {run.device}; threads: {torch.get_num_threads()}{several}")
    if arguments.resume:
        run.say(f"resuming {arguments.resume} at step {trainer.step} of {run.options.steps}")
    elif trainer.test.stretches:
        run.say(f"held-out perplexity before training: {math.exp(trainer.evaluate()):,.1f}", flush=True)
    start = time.monotonic()
    try:
        run.train()
    except Interrupted as interrupt:
        run.say(f"interrupted at step {trainer.step}; saved. To go on: fastllm train --resume {run.out}", flush=True)
        return 128 + interrupt.number
    if not started.is_first:
        return 0
    if run._stale() and trainer.step < run.options.steps:
        print(f"stopped at step {trainer.step}: {run.options.patience} evaluations without a gain ({flag('patience')})")
    print(f"trained for {time.monotonic() - start:,.0f} s; saved {run.out}, the log {run.log_path}")
    if trainer.test.stretches:
        print(f"held-out perplexity after training: {math.exp(run.last_loss):,.2f}")
        print(f"the best evaluation, {math.exp(trainer.best_loss):,.2f}, is kept in {run.best}")
    if arguments.plot:
        records.plot(run.log_path, arguments.plot)
        print(f"plot: {arguments.plot}")
    if run.source.tokenizer is not None and arguments.prompt:
        print("sample: ", end="")
        model = trainer.model if run.cut is None else load_model(run.out, arguments.device)[0]
        continue_text(model, run.source.tokenizer, arguments.prompt, 60, seed=run.options.seed)
    if arguments.compare:
        _print_comparison(compare_with_eager(trainer))
    print(f"to continue a text: fastllm generate --checkpoint {run.out} --prompt TEXT")
    return 0


def _print_comparison(times: dict[str, tuple[float, float]]) -> None:
    print("time of a step's forward and backward, same model and batch, in alternation (ms):")
    for name, (least, median) in times.items():
        print(f"  {name:<8} minimum {least:.1f}  median {median:.1f}")
    least, median = (times["eager"][k] / times["fastllm"][k] for k in (0, 1))
    print(f"  eager / fastllm: {least:.2f}x by minimum, {median:.2f}x by median")


def continue_text(model, tokenizer: Tokenizer, prompt: str, tokens: int, seed: int, **sampling) -> None:
    """Print ``prompt`` and what the model makes of it, as the words are drawn."""
    ids = torch.from_numpy(tokenizer.encode(prompt)).long()
    if len(ids) == 0:
        raise ValueError("the prompt must not be empty")
    device = next(model.parameters()).device
    settings = {"temperature": 0.8, "top_k": None, "top_p": 0.95, **sampling}
    generator = torch.Generator(device).manual_seed(seed)
    print(prompt, end="", flush=True)
    for piece in tokenizer.stream(model.stream(ids.to(device), tokens, generator=generator, **settings)):
        print(piece, end="", flush=True)
    print(flush=True)


def load_model(path: str | Path, device: str | None = None) -> tuple[torch.nn.Module, checkpoint.Checkpoint]:
    """The model of a checkpoint, for generation and evaluation."""
    target = _device(device)
    state = checkpoint.read(path, optimizer=False)
    return state.build_model(path).to(target).eval(), state


def needed_tokenizer(state: checkpoint.Checkpoint, path: str | Path) -> Tokenizer:
    tokenizer = state.build_tokenizer()
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer: it was trained on a file of tokens without --tokenizer FILE.json")
    return tokenizer


def evaluate(arguments: argparse.Namespace) -> int:
    """``fastllm eval``: loss, perplexity and bits a byte of a text."""
    model, state = load_model(arguments.checkpoint, arguments.device)
    tokenizer = needed_tokenizer(state, arguments.checkpoint)
    text = data.read_text(arguments.text)
    ids = tokenizer.encode(text)
    length = state.options.get("sequence_length", model.context_length)
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; two are needed at least")
    windows = data.Windows(ids, [(0, len(ids))], length)
    device = next(model.parameters()).device
    loss, count = mean_loss(
        model, lambda i, t: model.loss(i.to(device), t.to(device)), windows.in_order(arguments.batch_size)
    )
    # Without the bytes of the first token, which nothing predicts.
    size = len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    print(f"tokens: {count:,} in {size:,} bytes")
    if tokenizer.unknown_id is not None and (unknown := int((ids == tokenizer.unknown_id).sum())):
        print(f"not in the vocabulary: {unknown:,} tokens ({unknown / len(ids):.2%}), whose loss tells little")
    print(f"loss: {loss:.4f} nats a token")
    print(f"perplexity: {math.exp(min(loss, 700.0)):,.2f}")
    print(f"bits a byte: {loss * count / size / math.log(2):.4f}")
    return 0


def generate(arguments: argparse.Namespace) -> int:
    """``fastllm generate``."""
    if arguments.tokens < 0:
        raise ValueError(f"--tokens must be at least 0, got {arguments.tokens}")
    model, state = load_model(arguments.checkpoint, arguments.device)
    tokenizer = needed_tokenizer(state, arguments.checkpoint)
    continue_text(
        model,
        tokenizer,
        arguments.prompt,
        arguments.tokens,
        arguments.seed,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
    )
    return 0
