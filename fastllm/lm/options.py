"""What a training run is made of: each option once, for the command line, for the checkpoint and for the trainer."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

CHANGEABLE = "changeable"


def at_least(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """A whole number in a range, from the command line."""

    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r:.40}") from None
        if not least <= value <= most:
            limit = f"at least {least}" if value < least else f"at most {most}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {text:.40}")
        return value

    return whole


def number(least: float, below: float = math.inf) -> Callable[[str], float]:
    """A number in ``[least, below)``, from the command line."""

    def real(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r:.40}") from None
        if not least <= value < below:
            limit = f"in [{least:g}, {below:g})" if below < math.inf else f"a finite number of at least {least:g}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {text:.40}")
        return value

    return real


def _option(default: Any, help: str, kind: Callable[[str], Any] | tuple[str, ...] | None, changeable: bool = False):
    return field(default=default, metadata={"help": help, "kind": kind, CHANGEABLE: changeable})


SIZE = at_least(1)


@dataclass
class Options:
    """A run. What is None depends on the model: see ``resolved``."""

    model: str = _option("transformer", "kind of the model", ("mlp", "transformer"))
    layers: int | None = _option(None, "hidden layers, or blocks of the transformer (mlp: 1, transformer: 4)", SIZE)
    width: int | None = _option(None, "size of an embedding (mlp: 64, transformer: 192)", SIZE)
    hidden: int | None = _option(None, "size of a hidden layer (mlp: 384, transformer: 4 times the width)", SIZE)
    heads: int | None = _option(None, "attention heads of the transformer (6)", SIZE)
    context_length: int | None = _option(None, "words that a prediction sees (mlp: 8, transformer: a sequence)", SIZE)
    dropout: float = _option(0.1, "probability of dropping an activation", number(0.0, 1.0))
    tokenizer: str = _option("bpe", "char, word or bpe, trained on the text; or a JSON file of `tokenizers`", str)
    vocab_size: int = _option(4096, "size of the vocabulary of words or byte pairs", SIZE)
    validation: float = _option(0.05, "share of the data that is held out", number(0.0, 1.0))
    steps: int = _option(1000, "steps of the optimizer", SIZE, True)
    batch_size: int = _option(16, "sequences in a step", SIZE)
    accumulation: int = _option(1, "parts that a step's sequences are computed in, one after another", SIZE)
    sequence_length: int = _option(128, "words in a sequence", SIZE)
    optimizer: str = _option("adamw", "optimizer", ("adamw", "sgd"))
    learning_rate: float = _option(2e-3, "highest learning rate", number(0.0), True)
    schedule: str = _option("cosine", "after the warm-up: down to a tenth, or unchanged", ("cosine", "constant"))
    warmup: int = _option(100, "steps in which the learning rate grows", at_least(0))
    weight_decay: float = _option(0.05, "decay of the matrices", number(0.0))
    momentum: float = _option(0.9, "momentum of sgd", number(0.0, 1.0))
    clip: float = _option(1.0, "longest gradient; 0: any", number(0.0))
    dtype: str = _option("fp32", "what autocast computes products in", ("fp32", "bf16", "fp16"))
    seed: int = _option(0, "seed of everything random", at_least(0, 2**64 - 1))
    eval_every: int = _option(250, "steps between evaluations; 0: none before the end", at_least(0), True)
    eval_words: int = _option(65536, "most words of an evaluation, evenly spread over what is held out", SIZE)
    save_every: int = _option(250, "steps between checkpoints; 0: at the end alone", at_least(0), True)
    patience: int = _option(0, "stop after so many evaluations without a gain; 0: never", at_least(0), True)
    compile: bool = _option(False, "compile the model by torch.compile", None)

    def resolved(self) -> Options:
        """With the sizes of this model in place of None.

        Raises
        ------
        ValueError
            Options that exclude each other.
        """
        made: Any = replace(self)  # sizes that are None until the loop below
        transformer = self.model == "transformer"
        if not transformer and self.heads is not None:
            raise ValueError("--heads is an option of the transformer")
        defaults = {
            "layers": 4 if transformer else 1,
            "width": 192 if transformer else 64,
            "heads": 6 if transformer else None,
            "context_length": self.sequence_length if transformer else 8,
        }
        for name, value in defaults.items():
            if getattr(made, name) is None:
                setattr(made, name, value)
        if made.hidden is None:
            made.hidden = 4 * made.width if transformer else 384
        if transformer and made.context_length < made.sequence_length:
            raise ValueError(
                f"--context-length, {made.context_length}, must be at least --sequence-length, {made.sequence_length}"
            )
        if made.accumulation > made.batch_size:
            raise ValueError(f"--accumulation, {made.accumulation}, must be at most --batch-size, {made.batch_size}")
        return made

    def model_config(self, vocab_size: int) -> dict:
        """Arguments of the model."""
        config: dict[str, Any] = {"vocab_size": vocab_size, "embedding_dim": self.width, "hidden_dim": self.hidden}
        config |= {"context_length": self.context_length, "dropout": self.dropout}
        if self.model == "mlp":
            return config | {"num_hidden_layers": self.layers}
        return config | {"num_layers": self.layers, "num_heads": self.heads}

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth, or no change."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run. Those that are not given leave nothing behind: what was given can be told from defaults."""
    for one in fields(Options):
        kind, text = one.metadata["kind"], one.metadata["help"]
        if one.default is not None and kind is not None:
            text += f" (default: {one.default})"
        keywords: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if kind is None:
            keywords["action"] = "store_true"
        elif isinstance(kind, tuple):
            keywords["choices"] = kind
        else:
            keywords |= {"type": kind, "metavar": "X" if one.type == "float" else "N" if kind is not str else "KIND"}
        parser.add_argument(flag(one.name), **keywords)


def given(arguments: argparse.Namespace) -> dict:
    """The options of the run that the command line names."""
    names = {one.name for one in fields(Options)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def changed(options: Options, wanted: dict) -> Options:
    """The options of a checkpoint with those that a resumed run may change.

    Raises
    ------
    ValueError
        One that would make it another run.
    """
    for one in fields(Options):
        if one.name in wanted and wanted[one.name] != getattr(options, one.name) and not one.metadata[CHANGEABLE]:
            free = ", ".join(flag(other.name) for other in fields(Options) if other.metadata[CHANGEABLE])
            raise ValueError(
                f"{flag(one.name)} cannot change in a resumed run, which has {getattr(options, one.name)}; "
                f"these can: {free}"
            )
    return replace(options, **wanted)
