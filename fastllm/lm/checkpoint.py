"""Checkpoints: one safetensors file, its tensors and, in the header, JSON. Nothing in it is code.

A file is written beside the old one, brought to the disk, and renamed over it: whenever the machine stops, the old or the
new one is there whole.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from fastllm.lm.packages import need
from fastllm.lm.tokenizer import Tokenizer
from fastllm.models import MLPLanguageModel, TransformerLanguageModel
from fastllm.models.base import LanguageModel
from fastllm.operations.checks import is_placed

VERSION = 1
MODELS = {"mlp": MLPLanguageModel, "transformer": TransformerLanguageModel}
_KEY = "fastllm"
_KINDS = {"str": str, "int": int, "float": (int, float), "dict": dict, "None": type(None)}


@dataclass
class Checkpoint:
    """What a run is, and where it stands."""

    model: str  # a key of MODELS
    config: dict  # arguments of the model
    tokenizer: str | None
    options: dict
    source: dict  # where the training data is, and its SHA-256
    step: int
    best_loss: float | None
    evaluations_without_gain: int
    scaler: dict | None
    tensors: dict[str, Tensor]  # "model.NAME" and "optimizer.NAME.STATE", NAME a parameter's

    def parameters(self) -> dict[str, Tensor]:
        return {name.removeprefix("model."): t for name, t in self.tensors.items() if name.startswith("model.")}

    def build_model(self, path: str | Path) -> LanguageModel:
        """The model, on the CPU."""
        if self.model not in MODELS:
            raise ValueError(f"{path} holds a model of the kind {self.model!r}, which this fastllm does not have")
        try:
            model = MODELS[self.model](**self.config)
        except TypeError as error:
            raise ValueError(f"{path} does not describe its model: {error}") from None
        fill(dict(model.named_parameters()), self.parameters(), path)
        return model

    def build_tokenizer(self) -> Tokenizer | None:
        return None if self.tokenizer is None else Tokenizer.from_json(self.tokenizer)


def fill(targets: dict[str, Tensor], values: dict[str, Tensor], path: str | Path) -> None:
    """Copy values into tensors of the same names and shapes.

    Raises
    ------
    ValueError
        They are not the same; ``path`` is of another model.
    """
    for name in sorted(targets.keys() | values.keys()):
        expected, found = (tuple(t[name].shape) if name in t else None for t in (targets, values))
        if expected != found:
            raise ValueError(
                f"{path} is of another model: its tensor {name} is {'absent' if found is None else f'of shape {found}'}, "
                f"{'none is' if expected is None else f'shape {expected} is'} expected"
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(_placed_as(target, values[name]))


def _placed_as(target: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, of which this process takes its part where ``target`` is cut over processes."""
    if not is_placed(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(target.device_mesh.device_type)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)  # nothing is sent


def write(path: str | Path, checkpoint: Checkpoint) -> None:
    """Replace the file ``path`` in one step.

    Raises
    ------
    OSError
        It cannot be written; the file that was there is unchanged.
    """
    safetensors = need("safetensors.torch", "a checkpoint")
    path = Path(path)
    scalars = {name: value for name, value in vars(checkpoint).items() if name != "tensors"}
    header = {_KEY: json.dumps({"version": VERSION, **scalars}, allow_nan=False)}
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.open("wb").close()
        mode = part.stat().st_mode  # that of a new file here; safetensors gives its own
        safetensors.save_file({name: t.contiguous() for name, t in checkpoint.tensors.items()}, part, metadata=header)
        part.chmod(mode)
        _to_disk(part)
        os.replace(part, path)
        _to_disk(path.parent)
    except (OSError, _safetensors_error()) as error:
        with contextlib.suppress(OSError):
            part.unlink()
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise OSError(f"cannot write the checkpoint {path}: {reason}") from error


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _safetensors_error() -> type[Exception]:
    return need("safetensors", "a checkpoint").SafetensorError


def read(path: str | Path, optimizer: bool = True) -> Checkpoint:
    """What :func:`write` wrote; without ``optimizer`` the model's tensors alone.

    Raises
    ------
    ValueError
        No such file, no whole checkpoint, one of another version, or with other fields.
    """
    safetensors = need("safetensors", "a checkpoint")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            scalars = _scalars(path, (file.metadata() or {}).get(_KEY))
            names = [name for name in file.keys() if optimizer or name.startswith("model.")]  # noqa: SIM118
            return Checkpoint(**scalars, tensors={name: file.get_tensor(name) for name in names})
    except OSError as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole checkpoint of fastllm: {error}") from error


def _scalars(path: str | Path, header: str | None) -> dict:
    try:
        found = json.loads(header or "")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a checkpoint of fastllm")
    version = found.pop("version", None)
    if version != VERSION:
        raise ValueError(f"{path} is a checkpoint of version {version}; this fastllm reads version {VERSION}")
    expected = {field.name: field.type for field in fields(Checkpoint) if field.name != "tensors"}
    check_fields(path, found, expected)
    for name, kind in expected.items():
        kinds = tuple(_KINDS[part] for part in kind.split(" | "))
        if not any(isinstance(found[name], k) for k in kinds) or isinstance(found[name], bool):
            raise ValueError(f"{path}: the field {name!r} of the checkpoint must be {kind}, got {found[name]!r:.40}")
    return found


def check_fields(path: str | Path, found: dict, expected: dict) -> None:
    """ValueError that names a field too few or too many."""
    for names, what in (
        (expected.keys() - found.keys(), "lacks the field"),
        (found.keys() - expected.keys(), "has the unknown field"),
    ):
        if names:
            raise ValueError(f"{path}: the checkpoint {what} {min(names)!r}")
