"""The command line, as a user runs it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fastllm.lm import data
from fastllm.lm.cli import _InterruptAfterStep, main

SMALL = ["--steps", "8", "--batch-size", "4", "--sequence-length", "8", "--vocab-size", "280", "--embedding-dim", "8"]


def fastllm(*arguments, **kwargs):
    command = [sys.executable, "-m", "fastllm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


def status(arguments):
    """What a process of these arguments would end with."""
    try:
        return main(arguments)
    except SystemExit as ending:
        return ending.code or 0


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("one two three four five six seven eight nine ten. " * 60)
    return path


def test_train_and_generate(text, tmp_path):
    out = tmp_path / "m.pt"
    run = fastllm("train", "--text", text, "--out", out, "--prompt", "one", "--compare-eager", *SMALL)
    assert run.returncode == 0, run.stderr
    for line in ("held-out perplexity before", "held-out perplexity after", "sample: one", "eager / fastllm", "saved"):
        assert line in run.stdout
    assert "loss" in run.stderr
    first = fastllm("generate", "--checkpoint", out, "--prompt", "one", "--tokens", 5)
    again = fastllm("generate", "--checkpoint", out, "--prompt", "one", "--tokens", 5)
    assert first.returncode == 0 and first.stdout.startswith("one") and first.stdout == again.stdout


def test_interrupt_saves_and_says_how_to_resume(text, tmp_path):
    out = tmp_path / "m.pt"
    arguments = [*SMALL, "--steps", "200000"]
    command = [sys.executable, "-m", "fastllm", "train", "--text", str(text), "--out", str(out), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()  # the text
    process.stdout.readline()  # the model
    process.stdout.readline()  # the perplexity: training begins
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert f"fastllm train --resume {out}" in stdout and out.exists()


def test_interrupt_waits_for_the_end_of_a_step():
    """Between the optimizer's tensors a checkpoint would hold half of a step. A second Ctrl-C does not wait."""
    with _InterruptAfterStep() as interrupt:
        interrupt.step_ends()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.step_ends()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_interrupt_outside_of_training(monkeypatch, capsys):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "read_text", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "\nfastllm train: interrupted\n"


def test_resume(text, tmp_path):
    out = tmp_path / "m.pt"
    assert fastllm("train", "--text", text, "--out", out, *SMALL).returncode == 0
    run = fastllm("train", "--resume", out)
    assert run.returncode == 0 and "resuming" in run.stdout and "step 8 of 8" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--text", "absent.txt"], "cannot read absent.txt"),
        (["train", "--resume", "absent.pt"], "cannot read checkpoint"),
        (["generate", "--checkpoint", "absent.pt"], "cannot read checkpoint"),
        (["train", "--steps", "0"], "at least 1"),
        (["train", "--vocab-size", "3"], "vocab_size"),
        (["train", "--nonsense"], "unrecognized"),
        (["train", "--out", "/proc/absent/m.pt"], "/proc/absent"),
        (["train", "--out", "/"], "cannot write a checkpoint to /"),
        (["train", "--prompt", ""], "prompt must not be empty"),
        ([], "required"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    """In this process: starting one for each would take most of the time of this file."""
    assert status(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error, error


def test_a_mistake_of_a_process():
    run = fastllm("train", "--text", "absent.txt")
    assert run.returncode == 2 and "cannot read absent.txt" in run.stderr and "Traceback" not in run.stderr, run.stderr


@pytest.mark.parametrize("command", [[], ["train"], ["generate"], ["bench"], ["build"], ["info"]])
def test_help(command, capsys):
    assert status([*command, "--help"]) == 0
    assert "usage" in capsys.readouterr().out


def test_info():
    run = fastllm("info")
    assert run.returncode == 0 and "instruction_set" in run.stdout and "backends" in run.stdout
