"""``fastllm train`` over several processes trains what one trains, loses nothing, and ends together."""

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from processes import Processes

pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
pytest.importorskip("safetensors", reason="the package safetensors is not installed")

from fastllm.lm import checkpoint, processes, records
from fastllm.lm.cli import main
from fastllm.lm.training import Trainer

SMALL = (
    "--batch-size 5 --accumulation 2 --sequence-length 8 --tokenizer char --width 16 --hidden 32 --warmup 5 "
    "--learning-rate 0.02 --prompt one --steps 8"
).split()
MODELS = {"mlp": ["--model", "mlp"], "transformer": ["--layers", "2", "--heads", "2"]}
CUTS = {"ddp": [], "fsdp": ["--fsdp"], "vocabulary": ["--vocab-parallel"]}


@pytest.fixture(scope="module")
def four():
    with Processes(4) as group:
        yield group


@pytest.fixture(scope="module")
def two():
    with Processes(2) as group:
        yield group


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("one two three four five six seven eight nine ten. " * 30)
    return str(path)


def command(arguments):
    """Status, stdout and stderr of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as ending:
            status = ending.code or 0
    return status, out.getvalue(), err.getvalue()


def in_group(rank, size, arguments, happens=None):
    """``command`` in one of the processes that the test has. ``happens`` patches something for the call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "start", lambda on_gpu: processes.Processes(rank, size, rank))
        patch.setattr(processes, "end", lambda _: None)
        if happens is not None:
            globals()[happens](rank, patch)
        return command(arguments)


def arguments(text, out, model, *more):
    return ["train", "--text", text, "--out", str(out), *SMALL, *MODELS[model], *map(str, more)]


def close(a, b, **tolerance):
    a, b = checkpoint.read(a), checkpoint.read(b)
    strip = lambda c: {k: v for k, v in vars(c).items() if k not in ("tensors", "best_loss")}  # noqa: E731
    assert strip(a) == strip(b) and a.best_loss == pytest.approx(b.best_loss, rel=1e-5)
    assert a.tensors.keys() == b.tensors.keys()
    torch.testing.assert_close(a.tensors, b.tensors, **tolerance)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [2, 4])
def test_many_train_what_one_trains(request, size, model, cut, text, tmp_path):
    """Five sequences in two parts over two and four processes: unequal shares, and shares of nothing."""
    group = request.getfixturevalue({2: "two", 4: "four"}[size])
    one, many = tmp_path / "one.safetensors", tmp_path / "many.safetensors"
    more = ["--dropout", 0, "--eval-every", 3]
    assert command(arguments(text, one, model, *more))[0] == 0
    results = group.run(in_group, [*arguments(text, many, model, *more), *CUTS[cut]])
    assert [status for status, _, _ in results] == [0] * size, results
    close(one, many, rtol=1e-4, atol=1e-5)
    close(one.with_suffix(".best.safetensors"), many.with_suffix(".best.safetensors"), rtol=1e-4, atol=1e-5)
    first, *others = results
    assert f"processes: {size}" in first[1] and "sample: one" in first[1] and "tokens/s" in first[2]
    assert all(said == errors == "" for _, said, errors in others)
    a, b = (records.read(path.with_suffix(".jsonl")) for path in (one, many))
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for x, y in zip(a, b, strict=True):
        for name in x.keys() - {"tokens_per_second"}:
            assert x[name] == pytest.approx(y[name], rel=1e-4), name
    assert sorted(p.name for p in tmp_path.glob("many*")) == ["many.best.safetensors", "many.jsonl", "many.safetensors"]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resumed(two, text, tmp_path, cut, optimizer):
    """Bit for bit over as many processes; and one process goes on with what two have saved."""
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    more = ["--dropout", 0.2, "--schedule", "constant", "--eval-every", 0, "--optimizer", optimizer, *CUTS[cut]]
    for out, steps in ((whole, 8), (parts, 3)):
        results = two.run(in_group, [*arguments(text, out, "transformer", *more), "--steps", steps])
        assert results[0][0] == results[1][0] == 0, results
    before = parts.read_bytes()
    results = two.run(in_group, ["train", "--resume", str(parts), "--steps", 8, "--prompt", "one", *CUTS[cut]])
    assert results[0][0] == results[1][0] == 0, results
    a, b = checkpoint.read(whole), checkpoint.read(parts)
    assert a.step == b.step == 8 and all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())
    parts.write_bytes(before)
    status, said, errors = command(["train", "--resume", parts, "--steps", 8, "--prompt", "one"])
    assert status == 0 and "at step 3 of 8" in said, errors
    assert command(["generate", "--checkpoint", parts, "--prompt", "one", "--tokens", 3])[0] == 0


def asked_to_end(rank, patch):
    original = Trainer.train_step

    def train_step(self):
        result = original(self)
        if self.step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    patch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize("cut", CUTS)
def test_a_signal_to_one_ends_all_after_the_same_step(two, text, tmp_path, cut):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    more = ["--eval-every", 0, "--save-every", 0, *CUTS[cut]]
    assert two.run(in_group, arguments(text, whole, "mlp", *more))[0][0] == 0
    results = two.run(in_group, arguments(text, out, "mlp", *more), "asked_to_end")
    assert [status for status, _, _ in results] == [143, 143] and "interrupted at step 3; saved" in results[0][1]
    assert checkpoint.read(out).step == 3
    assert two.run(in_group, ["train", "--resume", str(out), "--prompt", "one", *CUTS[cut]])[0][0] == 0
    a, b = checkpoint.read(whole), checkpoint.read(out)
    assert all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())


def full_disk(rank, patch):
    def write(path, state):
        raise OSError(f"cannot write the checkpoint {path}: No space left on device")

    patch.setattr(checkpoint, "write", write)


def not_finite(rank, patch):
    original = Trainer.train_step

    def train_step(self):
        result = original(self)
        if self.step == 2:
            with torch.no_grad():
                for p in self.model.parameters():
                    (p.to_local() if hasattr(p, "to_local") else p).view(-1)[-1:] = float("nan") if rank == 1 else 1.0
        return result

    patch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    ("happens", "message"), [("full_disk", "No space left"), ("not_finite", "is not finite at step 2")]
)
def test_what_one_finds_is_everyones_error(two, text, tmp_path, happens, message, cut):
    out = tmp_path / "out.safetensors"
    results = two.run(in_group, [*arguments(text, out, "mlp", "--save-every", 2), *CUTS[cut]], happens)
    for rank, (status, _, errors) in enumerate(results):
        assert status == 2 and message in errors and f"(rank {rank})" in errors, errors
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fsdp"], "--fsdp needs several processes: torchrun"),
        (["--vocab-parallel"], "--vocab-parallel needs several processes: torchrun"),
    ],
)
def test_a_single_process_refuses_what_needs_several(text, tmp_path, more, message):
    status, _, errors = command(arguments(text, tmp_path / "m", "mlp", *more))
    assert status == 2 and message in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fsdp", "--vocab-parallel"], "--fsdp and --vocab-parallel exclude each other"),
        (["--fsdp", "--dtype", "fp16"], "--dtype fp16 needs whole gradients"),
        (["--vocab-parallel", "--compile"], "--compile and --vocab-parallel exclude each other"),
        (["--compare"], "--compare times a single process"),
        (["--text", "absent.txt"], "cannot read absent.txt"),
        (["--tokenizer", "bpe", "--vocab-size", "3"], "vocab_size must be at least 256"),
        (["--out", "/proc/absent/m"], "/proc/absent"),
    ],
)
def test_several_processes_refuse(two, text, tmp_path, more, message):
    for status, _, errors in two.run(in_group, arguments(text, tmp_path / "m", "mlp", *more)):
        assert status == 2 and message in errors and errors.count("\n") == 1, errors


def shares(rank, size):
    """Of the small things that all of a run is built on."""
    import numpy as np

    own = processes.Processes(rank, size, rank)
    part, count = own.share(np.arange(3))
    assert (part.tolist(), count) == ([[0], [1], [2], [0]][rank], [1, 1, 1, 0][rank])
    assert own.most(rank * 5) == 15 and own.sums([rank, 0.5]) == [6.0, 2.0]
    assert own.of_first(lambda: f"of {rank}") == "of 0"

    def fails():
        raise FileNotFoundError(2, "no such file")

    with pytest.raises(OSError, match="no such file") if rank == 0 else pytest.raises((OSError, ValueError)):
        own.of_first(fails)
    dist.barrier()


def test_what_processes_tell_each_other(four):
    four.run(shares)


def test_one_process_tells_itself():
    assert processes.ALONE.most(3) == 3 and processes.ALONE.sums([1, 2]) == [1, 2]
    assert processes.ALONE.of_first(lambda: 7) == 7 and processes.start(False) is processes.ALONE


# --- by torchrun

KILLED = """
import os, sys, threading
from fastllm.lm.cli import main
from fastllm.lm.training import Trainer
original, step, delay, victim = Trainer.train_step, {step}, {delay}, "{victim}"
def train_step(self):
    if self.step == step and os.environ["RANK"] == victim:
        threading.Timer(delay, os.kill, (os.getpid(), 9)).start()
    return original(self)
Trainer.train_step = train_step
sys.exit(main(sys.argv[1:]))
"""


def torchrun(script, arguments, timeout=240):
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *script]
    return subprocess.run([*start, *map(str, arguments)], capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(6))
def test_killed_and_resumed(text, tmp_path, case):
    """kill -9 of one of two processes at a random moment: the other ends with an error, the checkpoint before is whole,
    and the rest of the run is the same bits."""
    source = random.Random(case)
    cut = list(CUTS)[case % 3]
    more = ["--save-every", 2, "--eval-every", 4, "--dropout", 0.2, *CUTS[cut], "--steps", 24]
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    assert torchrun(["-m", "fastllm"], arguments(text, whole, "transformer", *more)).returncode == 0
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(step=source.randrange(4, 20), delay=source.uniform(0, 0.02), victim=case % 2))
    begin = time.monotonic()
    ended = torchrun([str(script)], arguments(text, killed, "transformer", *more), timeout=120)
    assert ended.returncode != 0 and time.monotonic() - begin < 120, ended.stderr
    assert 2 <= checkpoint.read(killed).step < 24
    ended = torchrun(["-m", "fastllm"], ["train", "--resume", killed, "--prompt", "one", *CUTS[cut]])
    assert ended.returncode == 0, ended.stderr
    a, b = checkpoint.read(whole), checkpoint.read(killed)
    assert a.step == b.step == 24 and all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())


@pytest.mark.slow
def test_torchrun_passes_a_signal_on(text, tmp_path):
    out = tmp_path / "out.safetensors"
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "fastllm"]
    more = ["--steps", "1000000", "--save-every", "1"]
    with open(tmp_path / "said", "w") as said:
        run = subprocess.Popen([*start, *arguments(text, out, "mlp", *more)], stdout=said, stderr=said)
    end = time.monotonic() + 120
    while not out.exists() and time.monotonic() < end:
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    run.wait(timeout=60)
    assert "interrupted at step" in (tmp_path / "said").read_text() and checkpoint.read(out).step >= 1
