"""``fastllm train``, ``generate`` and ``eval``: what a user runs, what goes wrong, and that nothing is lost."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from helpers import run_python

pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
pytest.importorskip("safetensors", reason="the package safetensors is not installed")

from fastllm.lm import checkpoint, records, run
from fastllm.lm.cli import main
from fastllm.lm.training import Trainer

SMALL = (
    "--batch-size 4 --sequence-length 8 --vocab-size 280 --width 16 --hidden 32 --warmup 5 --learning-rate 0.02".split()
)
MODELS = {"mlp": ["--model", "mlp"], "transformer": ["--layers", "2", "--heads", "2"]}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("one two three four five six seven eight nine ten. " * 60)
    return str(path)


def fastllm(*arguments):
    """Status, stdout and stderr of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as ending:
            status = ending.code or 0
    return status, out.getvalue(), err.getvalue()


def train(text, out, *more, model="transformer", steps=8):
    return fastllm(
        "train", "--text", text, "--out", out, "--steps", steps, "--prompt", "one", *SMALL, *MODELS[model], *more
    )


def same(a, b):
    a, b = checkpoint.read(a), checkpoint.read(b)
    assert {k: v for k, v in vars(a).items() if k != "tensors"} == {k: v for k, v in vars(b).items() if k != "tensors"}
    assert a.tensors.keys() == b.tensors.keys()
    for name, value in a.tensors.items():
        assert torch.equal(value, b.tensors[name]), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["bpe", "char", "word"])
def test_train_generate_and_eval(text, tmp_path, model, kind):
    out = tmp_path / "deep" / "m.safetensors"
    more = ["--tokenizer", kind, "--compare"] if kind == "bpe" else ["--tokenizer", kind]
    status, said, errors = train(text, out, *more, model=model, steps=20)
    assert status == 0, errors
    for line in ("held-out perplexity before", "held-out perplexity after", "sample: one", f"saved {out}"):
        assert line in said
    assert "loss" in errors and "tokens/s" in errors and "% of products" in errors
    assert ("eager / fastllm" in said) == (kind == "bpe")
    assert sorted(p.name for p in out.parent.iterdir()) == ["m.best.safetensors", "m.jsonl", "m.safetensors"]
    assert [line["step"] for line in records.read(out.with_suffix(".jsonl")) if "loss" in line] == [10, 20]
    first, again = (fastllm("generate", "--checkpoint", out, "--prompt", "one", "--tokens", 5) for _ in range(2))
    assert first[0] == 0 and first[1].startswith("one") and first == again
    status, said, errors = fastllm("eval", "--checkpoint", out, "--text", text)
    assert status == 0 and "bits a byte" in said, errors


def test_eval_is_the_loss_of_the_text(text, tmp_path):
    out = tmp_path / "m.safetensors"
    train(text, out, "--tokenizer", "char")
    said = dict(line.split(": ") for line in fastllm("eval", "--checkpoint", out, "--text", text)[1].splitlines())
    model, state = run.load_model(out)
    ids = torch.from_numpy(state.build_tokenizer().encode(open(text).read())).long()
    parts = [ids[k : k + 9] for k in range(0, len(ids) - 1, 8)]
    with torch.no_grad():
        total = sum(model.loss(part[:-1], part[1:]).item() * (len(part) - 1) for part in parts)
    mean = total / (len(ids) - 1)
    assert float(said["loss"].split()[0]) == pytest.approx(mean, abs=1e-3)
    assert float(said["perplexity"]) == pytest.approx(np.exp(mean), rel=1e-3)
    assert float(said["bits a byte"]) == pytest.approx(mean / np.log(2), rel=1e-3)  # a character is a byte here


def test_token_files(tmp_path):
    np.tile(np.arange(50, dtype=np.uint16), 40).tofile(tmp_path / "t.bin")
    arguments = ["train", "--data", tmp_path / "t.bin", "--steps", 5, *SMALL, *MODELS["mlp"]]
    status, said, errors = fastllm(*arguments, "--out", tmp_path / "m.safetensors")
    assert status == 0 and "data: 2,000 tokens of 280" in said, errors
    status, said, errors = fastllm("generate", "--checkpoint", tmp_path / "m.safetensors")
    assert status == 2 and "has no tokenizer" in errors
    status, _, errors = fastllm(*arguments, "--vocab-size", 49, "--out", tmp_path / "n.safetensors")
    assert status == 2 and "holds the token 49; the vocabulary has 49" in errors


def test_dry_run_trains_nothing(text, tmp_path):
    status, said, errors = train(text, tmp_path / "m.safetensors", "--dry-run")
    assert status == 0 and "parameters" in said and "FLOPs a token" in said and "MiB at the peak" in said, errors
    assert list(tmp_path.iterdir()) == []


def test_early_stop(text, tmp_path):
    out = tmp_path / "m.safetensors"
    more = ["--eval-every", "1", "--patience", "2", "--learning-rate", "0", "--schedule", "constant"]
    status, said, errors = train(text, out, *more, steps=50)
    assert status == 0 and "stopped at step 3: 2 evaluations without a gain" in said, errors
    assert checkpoint.read(out).step == 3


def test_best_is_kept(text, tmp_path):
    out = tmp_path / "m.safetensors"
    assert train(text, out, "--eval-every", "2", steps=12)[0] == 0
    losses = {
        line["step"]: line["validation_loss"]
        for line in records.read(out.with_suffix(".jsonl"))
        if "perplexity" in line
    }
    best = checkpoint.read(out.with_suffix(".best.safetensors"))
    assert len(losses) == 6 and best.best_loss == min(losses.values()) == losses[best.step]


@pytest.mark.parametrize("model", MODELS)
def test_resume_is_the_same_run(text, tmp_path, model):
    more = ["--dropout", "0.2", "--eval-every", "4", "--save-every", "3"]
    whole, halves = tmp_path / "whole.safetensors", tmp_path / "halves.safetensors"
    assert train(text, whole, *more, model=model, steps=12)[0] == 0
    assert train(text, halves, *more, "--schedule", "constant", model=model, steps=5)[0] == 0
    assert train(text, whole, *more, "--schedule", "constant", model=model, steps=12)[0] == 0
    status, said, errors = fastllm("train", "--resume", halves, "--steps", 12, "--prompt", "one")
    assert status == 0 and "at step 5 of 12" in said, errors
    # The evaluation at the end of the first run counts, too.
    a, b = (checkpoint.read(path) for path in (whole, halves))
    assert all(torch.equal(value, b.tensors[name]) for name, value in a.tensors.items()) and a.step == b.step == 12


def test_resume_with_other_options(text, tmp_path):
    out, other = tmp_path / "m.safetensors", tmp_path / "other.safetensors"
    assert train(text, out)[0] == 0
    before = out.read_bytes()
    for option, value in (("--width", 32), ("--batch-size", 5), ("--seed", 1), ("--model", "mlp"), ("--dtype", "bf16")):
        status, _, errors = fastllm("train", "--resume", out, option, value)
        assert status == 2 and f"{option} cannot change in a resumed run" in errors, errors
    status, _, errors = fastllm("train", "--resume", out, "--steps", 3)
    assert status == 2 and "--steps, 3, must be at least 8" in errors
    (tmp_path / "other.txt").write_text("another text " * 100)
    status, _, errors = fastllm("train", "--resume", out, "--text", tmp_path / "other.txt")
    assert status == 2 and "is not what" in errors and "SHA-256" in errors
    assert out.read_bytes() == before
    changes = [
        "--steps",
        10,
        "--learning-rate",
        0.5,
        "--save-every",
        1,
        "--out",
        other,
        "--width",
        16,
        "--prompt",
        "one",
    ]
    status, _, errors = fastllm("train", "--resume", out, *changes)
    assert status == 0, errors
    found = checkpoint.read(other)
    assert (found.step, found.options["learning_rate"], found.options["steps"]) == (10, 0.5, 10)
    assert out.read_bytes() == before


def interrupted_at(step, number, monkeypatch):
    original = Trainer.train_step

    def train_step(self):
        result = original(self)
        if self.step == step:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save(text, tmp_path, monkeypatch, number):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "m.safetensors"
    assert train(text, whole, "--eval-every", "0")[0] == 0
    with monkeypatch.context() as patched:
        interrupted_at(3, number, patched)
        status, said, _ = train(text, out, "--eval-every", "0")
    assert status == 128 + number and f"interrupted at step 3; saved. To go on: fastllm train --resume {out}" in said
    assert checkpoint.read(out).step == 3 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert fastllm("train", "--resume", out, "--prompt", "one")[0] == 0
    same(whole, out)


def test_interrupt_waits_for_the_end_of_a_step():
    """Between the optimizer's tensors a checkpoint would hold half of a step. A second Ctrl-C does not wait."""
    with run.InterruptAfterStep() as interrupt:
        interrupt.step_ends()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.step_ends()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_half_of_a_step_is_not_saved(text, tmp_path, monkeypatch):
    def half(self):
        self.whole = False
        raise KeyboardInterrupt

    out = tmp_path / "m.safetensors"
    monkeypatch.setattr(Trainer, "train_step", half)
    status, _, errors = train(text, out)
    assert status == 130 and errors.endswith("fastllm train: interrupted\n") and not out.exists()


def test_from_a_thread(text, tmp_path):
    ended = []
    thread = threading.Thread(target=lambda: ended.append(train(text, tmp_path / "m.safetensors")))
    thread.start()
    thread.join()
    assert ended[0][0] == 0, ended[0][2]


KILLED = """
import os, sys, threading
from fastllm.lm.cli import main
from fastllm.lm.training import Trainer
original, step, delay = Trainer.train_step, {step}, {delay}
def train_step(self):
    if self.step == step:
        threading.Timer(delay, os.kill, (os.getpid(), 9)).start()
    return original(self)
Trainer.train_step = train_step
sys.exit(main({arguments}))
"""


@pytest.mark.parametrize("case", [0, 1, *(pytest.param(k, marks=pytest.mark.slow) for k in range(2, 10))])
def test_killed_and_resumed(text, tmp_path, case):
    """kill -9 at a random moment, in a step or in the writing of a checkpoint: the rest of the run is the same bits."""
    source = random.Random(case)
    steps, more = 40, ["--save-every", "2", "--eval-every", "4", "--dropout", "0.2"]
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    assert train(text, whole, *more, steps=steps)[0] == 0
    common = ["train", "--text", text, "--out", str(killed), "--steps", str(steps), "--prompt", "one"]
    arguments = [*common, *SMALL, *MODELS["transformer"], *more]
    code = KILLED.format(step=source.randrange(4, steps - 8), delay=source.uniform(0, 0.02), arguments=arguments)
    result = run_python(code)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert 2 <= checkpoint.read(killed).step < steps
    status, _, errors = fastllm("train", "--resume", killed, "--prompt", "one")
    assert status == 0, errors
    same(whole, killed)
    a, b = (records.read(path.with_suffix(".jsonl")) for path in (whole, killed))
    strip = lambda lines: [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]  # noqa: E731
    assert strip(a) == strip(b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--text", "absent.txt"], "cannot read absent.txt"),
        (["train", "--resume", "absent"], "cannot read the checkpoint absent"),
        (["generate", "--checkpoint", "absent"], "cannot read the checkpoint absent"),
        (["train", "--vocab-size", "3"], "vocab_size must be at least 256 for bpe, got 3"),
        (["train", "--tokenizer", "syllable"], "one of char, word, bpe"),
        (["train", "--tokenizer", "absent.json"], "cannot read the tokenizer absent.json"),
        (["train", "--out", "/proc/absent/m"], "/proc/absent"),
        (["train", "--out", "/"], "cannot write a checkpoint to /"),
        (["train", "--device", "abacus"], "--device abacus cannot be used"),
        (["train", "--layers", "1000000000"], "GiB are free"),
        (["train", "--width", "9000000000"], "overflowed"),
        (["train", "--batch-size", "100000000"], "GiB are free"),
        (["train", "--heads", "5"], "num_heads must divide embedding_dim"),
        (["train", "--data", "absent.bin"], "cannot read absent.bin"),
        (["eval", "--text", "absent.txt", "--checkpoint", "absent"], "cannot read"),
    ],
)
def test_mistakes_are_one_line(arguments, message, text, tmp_path):
    if arguments[0] == "train" and not {"--text", "--data", "--resume"} & set(arguments):
        arguments = [*arguments, "--text", text]
    if "--out" not in arguments and arguments[0] == "train":
        arguments = [*arguments, "--out", tmp_path / "m.safetensors"]
    status, _, errors = fastllm(*arguments)
    assert status == 2 and message in errors and errors.count("\n") == 1, errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no text"),
        (b"short", "words to train on"),
        (b"caf\xe9" * 99, "UTF-8"),
        ("text".encode("utf-16"), "UTF-16"),
    ],
)
def test_bad_texts(tmp_path, content, message):
    (tmp_path / "t").write_bytes(content)
    status, _, errors = train(tmp_path / "t", tmp_path / "m.safetensors")
    assert status == 2 and message in errors and errors.count("\n") == 1, errors


def test_a_damaged_checkpoint_is_one_line(text, tmp_path):
    out = tmp_path / "m.safetensors"
    assert train(text, out)[0] == 0
    whole = out.read_bytes()
    for content in (whole[: len(whole) // 2], whole.replace(b"warmup", b"warmap"), whole.replace(b"sha256", b"sha255")):
        out.write_bytes(content)
        status, _, errors = fastllm("train", "--resume", out)
        assert status == 2 and errors.count("\n") == 1 and "Traceback" not in errors, errors


def process(arguments, **streams):
    command = [sys.executable, "-m", "fastllm", *map(str, arguments)]
    return subprocess.run(command, timeout=120, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams})


def test_closed_streams(text, tmp_path):
    out = tmp_path / "m.safetensors"
    arguments = " ".join(
        ["train", "--text", text, "--out", str(out), "--steps", "5", "--prompt", "one", *SMALL, "--heads", "2"]
    )
    command = f"{sys.executable} -m fastllm {arguments} >&- 2>&-"
    assert subprocess.run(command, shell=True, timeout=120).returncode == 0
    assert checkpoint.read(out).step == 5


def test_a_reader_that_goes_away_in_training(text, tmp_path):
    """The last whole step is saved."""
    out = tmp_path / "m.safetensors"
    read, write = os.pipe()
    os.close(read)
    arguments = ["train", "--text", text, "--out", out, "--steps", "20", *SMALL, "--heads", "2"]
    result = process(arguments, stderr=write)
    os.close(write)
    assert result.returncode == 2 and checkpoint.read(out).step < 20


def test_a_terminal_that_knows_few_characters(tmp_path):
    (tmp_path / "t").write_text("日本語 " * 200, encoding="utf-8")
    out = tmp_path / "m.safetensors"
    assert train(tmp_path / "t", out, "--prompt", "日")[0] == 0
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = process(["generate", "--checkpoint", out, "--prompt", "日", "--tokens", "5"], env=env)
    assert result.returncode == 0 and result.stdout.startswith(b"?"), result.stderr


def test_failed_training_is_not_saved(text, tmp_path):
    out = tmp_path / "m.safetensors"
    options = ["--learning-rate", "1e30", "--clip", "0", "--optimizer", "sgd", "--save-every", "0", "--warmup", "0"]
    status, _, errors = train(text, out, *options, steps=20)
    assert status == 2 and "training has failed" in errors and not out.exists()


def test_metadata_is_json(text, tmp_path):
    train(text, tmp_path / "m.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["fastllm"])
    assert header["version"] == 1 and header["step"] == 8 and header["source"]["text"] == [text]
