"""Checkpoints: whole or refused, and never less than before."""

import json
import os
import stat

import pytest
import torch
from helpers import run_python

safetensors_torch = pytest.importorskip("safetensors.torch", reason="the package safetensors is not installed")
pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")

from safetensors import safe_open  # noqa: E402

from fastllm.lm import checkpoint  # noqa: E402
from fastllm.models import TransformerLanguageModel  # noqa: E402


def example():
    torch.manual_seed(0)
    model = TransformerLanguageModel(10, 8, 1, 2, context_length=4)
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {"optimizer.norm.weight.step": torch.tensor(3.0)}
    return checkpoint.Checkpoint("transformer", model.config, None, {"seed": 1}, {}, 3, 1.5, 0, None, tensors)


@pytest.fixture
def path(tmp_path):
    checkpoint.write(tmp_path / "deep" / "c.safetensors", example())
    return tmp_path / "deep" / "c.safetensors"


def rewrite(path, change):
    """Change the JSON in a checkpoint's header."""
    with safe_open(path, framework="pt") as file:
        tensors, header = {n: file.get_tensor(n) for n in file.keys()}, json.loads(file.metadata()["fastllm"])  # noqa: SIM118
    change(header, tensors)
    safetensors_torch.save_file(tensors, path, metadata={"fastllm": json.dumps(header)})


def test_round_trip(path):
    first, read = example(), checkpoint.read(path)
    for name, value in vars(first).items():
        assert name == "tensors" or getattr(read, name) == value, name
    assert read.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(read.tensors[name], value) for name, value in first.tensors.items())
    assert [p.name for p in path.parent.iterdir()] == ["c.safetensors"]
    mask = os.umask(0o22)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert "optimizer.norm.weight.step" not in checkpoint.read(path, optimizer=False).tensors
    model = read.build_model(path)
    assert model.output is None and torch.equal(model.embedding.weight, first.tensors["model.embedding.weight"])


def test_what_is_no_checkpoint(tmp_path, path):
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*absent"):
        checkpoint.read(tmp_path / "absent")
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        checkpoint.read(tmp_path)
    (tmp_path / "text").write_text("not a checkpoint, and more than eight bytes")
    torch.save({"a": 1}, tmp_path / "pickle")
    (tmp_path / "empty").touch()
    for name in ("text", "pickle", "empty"):
        with pytest.raises(ValueError, match=f"{name} is not a whole checkpoint of fastllm"):
            checkpoint.read(tmp_path / name)
    safetensors_torch.save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="is not a checkpoint of fastllm"):
        checkpoint.read(tmp_path / "other")


def test_every_truncation_is_refused(path):
    whole = path.read_bytes()
    for length in (*range(0, 64), *range(64, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a whole checkpoint"):
            checkpoint.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, tensors: header.update(version=2), "version 2; this fastllm reads version 1"),
        (lambda header, tensors: header.pop("version"), "version None"),
        (lambda header, tensors: header.pop("step"), "lacks the field 'step'"),
        (lambda header, tensors: header.update(more=1), "has the unknown field 'more'"),
        (lambda header, tensors: header.update(step="7"), "'step' .* must be int, got '7'"),
        (lambda header, tensors: header.update(step=True), "'step' .* must be int, got True"),
        (lambda header, tensors: header.update(config=[]), "'config' .* must be dict"),
        (lambda header, tensors: header.update(model="rnn"), "kind 'rnn'"),
        (lambda header, tensors: header["config"].pop("vocab_size"), "does not describe its model"),
        (lambda header, tensors: header["config"].update(more=1), "does not describe its model"),
        (
            lambda header, tensors: header["config"].update(embedding_dim=16),
            r"of another model: .* \(24, 8\), shape \(48, 16\)",
        ),
        (lambda header, tensors: header["config"].update(num_layers=2), "blocks.1.* is absent"),
        (lambda header, tensors: header["config"].update(tie_weights=False), "output.weight is absent"),
        (lambda header, tensors: tensors.pop("model.norm.weight"), "norm.weight is absent"),
        (
            lambda header, tensors: tensors.update({"model.more": torch.zeros(2)}),
            "more is of shape .* none is expected",
        ),
    ],
)
def test_other_content_is_refused(path, change, message):
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        checkpoint.read(path).build_model(path)


def test_a_full_disk_leaves_the_file_before():
    """A limit on the size of files stands for the disk's end."""
    code = """
import os, resource, signal, sys, tempfile, pathlib
import torch
from fastllm.lm import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = pathlib.Path(tempfile.mkdtemp())
make = lambda n: checkpoint.Checkpoint("mlp", {}, None, {}, {}, n, None, 0, None, {"model.a": torch.full((n,), float(n))})
checkpoint.write(folder / "c", make(10))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.write(folder / "c", make(100_000))
except OSError as error:
    print(error)
assert os.listdir(folder) == ["c"] and checkpoint.read(folder / "c").step == 10
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "cannot write the checkpoint" in result.stdout and "File too large" in result.stdout


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*: File exists"):
        checkpoint.write(tmp_path / "file" / "c", example())


def test_not_a_number_is_refused(tmp_path):
    bad = example()
    bad.best_loss = float("nan")
    with pytest.raises(ValueError):
        checkpoint.write(tmp_path / "c", bad)
    assert list(tmp_path.iterdir()) == []
