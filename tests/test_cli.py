"""The command line without the packages of the training program."""

import subprocess
import sys

import pytest
from helpers import run_python

from fastllm.lm.cli import main


def fastllm(*arguments, **kwargs):
    command = [sys.executable, "-m", "fastllm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


def status(arguments):
    """What a process of these arguments would end with."""
    try:
        return main(arguments)
    except SystemExit as ending:
        return ending.code or 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["train", "--nonsense"], "unrecognized"),
        (["train", "--steps", "0"], "must be at least 1, got 0"),
        (["train", "--steps", "many"], "must be a whole number, got 'many'"),
        (["train", "--steps", "9" * 30], "must be at most"),
        (["train", "--learning-rate", "nan"], "must be a finite number of at least 0, got nan"),
        (["train", "--learning-rate", "inf"], "finite"),
        (["train", "--dropout", "1"], "must be in [0, 1), got 1"),
        (["train", "--seed", str(2**64)], "must be at most"),
        (["train", "--seed", "-1"], "must be at least 0"),
        (["train", "--model", "rnn"], "invalid choice"),
        (["generate", "--tokens", "-1"], "at least 0"),
        (["eval"], "--text"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    """In this process: starting one for each would take most of the time of this file."""
    assert status(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error, error


@pytest.mark.parametrize("command", [[], ["train"], ["generate"], ["eval"], ["bench"], ["build"], ["info"]])
def test_help(command, capsys):
    assert status([*command, "--help"]) == 0
    assert "usage" in capsys.readouterr().out


def test_info():
    run = fastllm("info")
    assert run.returncode == 0 and "instruction_set" in run.stdout and "backends" in run.stdout


def test_a_reader_that_goes_away():
    command = f"{sys.executable} -m fastllm info | head -1"
    run = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.startswith("fastllm") and run.stderr == ""


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("tokenizers", ["train"]), ("safetensors", ["generate"]), ("safetensors", ["train", "--resume", "absent"])],
)
def test_a_package_that_is_missing(package, arguments):
    code = f"import sys; sys.modules[{package!r}] = None; from fastllm.lm.cli import main; sys.exit(main({arguments}))"
    run = run_python(code)
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert f"needs the package {package}, which is not installed: pip install 'fastllm[train]'" in run.stderr


def test_importing_the_kernels_needs_no_package_of_the_program():
    packages = ["tokenizers", "safetensors", "tqdm", "tensorboard", "matplotlib"]
    code = f"import sys; sys.modules.update(dict.fromkeys({packages})); import fastllm, fastllm.models, fastllm.lm.training"
    run = run_python(code)
    assert run.returncode == 0, run.stderr
