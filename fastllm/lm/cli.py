"""The command line: ``fastllm train | generate | eval | bench | build | info``."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastllm import _native, backends
from fastllm._build import cache
from fastllm._build.toolchain import CompileFailed
from fastllm.lm.options import add_arguments, at_least


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastllm", description="Fused kernels for training language models in PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = argparse.ArgumentDefaultsHelpFormatter

    train = commands.add_parser("train", help="train a language model on a text")
    train.set_defaults(run=_train)
    where = train.add_argument_group("what it reads and writes")
    where.add_argument("--text", metavar="FILE", nargs="+", help="UTF-8 texts to train on (Python's own reference)")
    where.add_argument("--data", metavar="FILE.bin", help="tokens to train on, in the layout of nanoGPT or llm.c")
    where.add_argument("--out", metavar="FILE", help="the checkpoint (checkpoints/model.safetensors)")
    where.add_argument("--resume", metavar="FILE", help="go on with the run of this checkpoint")
    where.add_argument("--log", metavar="FILE.jsonl", help="a line of JSON every ten steps (beside the checkpoint)")
    where.add_argument("--log-dir", metavar="FOLDER", help="TensorBoard's events")
    where.add_argument("--plot", metavar="FILE.png", help="at the end, a plot of the losses")
    where.add_argument("--prompt", default="The value of", help="what the sample at the end continues")
    where.add_argument(
        "--dry-run", action="store_true", help="print parameters, FLOPs a token and memory; train nothing"
    )
    where.add_argument("--compare", action="store_true", help="at the end, time a step against eager PyTorch")
    where.add_argument("--device", help="cpu, cuda, cuda:1 ... (a GPU if there is one)")
    several = train.add_argument_group("several processes, started by `torchrun --nproc-per-node N -m fastllm train`")
    several.add_argument(
        "--fsdp", action="store_true", help="share parameters, gradients and the optimizer's state (FSDP2)"
    )
    several.add_argument(
        "--vocab-parallel", action="store_true", help="share the rows of the embedding and of the output layer"
    )
    add_arguments(train.add_argument_group("the run"))

    checkpoint = argparse.ArgumentParser(add_help=False)
    checkpoint.add_argument(
        "--checkpoint", metavar="FILE", default="checkpoints/model.safetensors", help="what `train` saved"
    )
    checkpoint.add_argument("--device", help="cpu, cuda, cuda:1 ... (by default a GPU if there is one)")
    generate = commands.add_parser("generate", help="continue a text", parents=[checkpoint], formatter_class=defaults)
    generate.set_defaults(run=_generate)
    generate.add_argument("--prompt", default="The value of", help="the text to continue")
    generate.add_argument("--tokens", type=at_least(0), default=100, help="number of tokens to add")
    generate.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable token")
    generate.add_argument("--top-k", type=int, default=None, help="draw among the k most probable tokens")
    generate.add_argument("--top-p", type=float, default=0.95, help="draw among the tokens of this much probability")
    generate.add_argument("--seed", type=at_least(0, 2**64 - 1), default=0, help="seed of the draws")

    evaluate = commands.add_parser("eval", help="loss of a text", parents=[checkpoint], formatter_class=defaults)
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("--text", metavar="FILE", nargs="+", required=True, help="UTF-8 texts")
    evaluate.add_argument("--batch-size", type=at_least(1), default=16, help="sequences at a time")

    bench = commands.add_parser(
        "bench", help="time the operations against PyTorch (runs benchmarks/run.py of the source tree)", add_help=False
    )
    bench.set_defaults(run=_bench)

    build = commands.add_parser(
        "build",
        help="compile the operations for this torch into the user's cache",
        description="Compiles the C++ and CUDA operations for the torch at hand. They go into the folder FASTLLM_HOME "
        "(default: fastllm in the user's cache folder), where `import fastllm` finds them. Needs g++ (or CXX), the Python "
        "package ninja and, for CUDA kernels, a CUDA build of torch and nvcc (CUDA_HOME, TORCH_CUDA_ARCH_LIST). "
        "MAX_JOBS limits the compilers that run at once.",
    )
    build.set_defaults(run=_build)
    kernels = build.add_mutually_exclusive_group()
    kernels.add_argument("--cuda", action="store_const", const="1", dest="cuda", help="CUDA kernels or an error")
    kernels.add_argument("--cpu", action="store_const", const="0", dest="cuda", help="no CUDA kernels")

    info = commands.add_parser("info", help="what is built and which backend serves which operation")
    info.set_defaults(run=_info)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from fastllm.lm import run

    return run.train(arguments)


def _generate(arguments: argparse.Namespace) -> int:
    from fastllm.lm import run

    return run.generate(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    from fastllm.lm import run

    return run.evaluate(arguments)


def _bench(options: argparse.Namespace) -> int:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"
    if not script.exists():
        raise ValueError(
            "the benchmarks are in fastllm's source tree: run `fastllm bench` from an editable install of it"
        )
    sys.path.insert(0, str(script.parent))
    spec = importlib.util.spec_from_file_location("fastllm_benchmarks_run", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(options.rest)


def _build(options: argparse.Namespace) -> int:
    wish = os.environ.get("FASTLLM_CUDA", "") if options.cuda is None else options.cuda
    loaded = _native.extension and Path(_native.extension.__file__)
    wants_cuda = wish == "1" or (wish != "0" and torch.version.cuda is not None)
    if (
        loaded
        and loaded.parent == Path(_native.__file__).parent
        and not (wants_cuda and _native.BUILD.get("cuda") is None)
    ):
        print(f"nothing to do: the package has compiled operations for this torch, {loaded}")
        return 0
    try:
        cache.build(wish, sys.stdout)
    except CompileFailed as error:
        print(f"fastllm build: {error}", file=sys.stderr)
        return 1
    return 0


def _info(options: argparse.Namespace) -> int:
    print(backends.info())
    return 0


def _silence(stream) -> None:
    """What could not be written to a closed pipe is not tried again when Python ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


def _rank() -> str:
    """Which of several processes speaks."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return f" (rank {torch.distributed.get_rank()})" if several else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status. A user's mistake is one line on stderr and status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal need not know every character
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "bench":
        options.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status = options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # as in `fastllm info | head -1`
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                _silence(stream)
        if options.command == "train":
            _say("fastllm train: what read its output has gone; the last whole step is saved")
        return 2
    except (ValueError, RuntimeError, OSError, MemoryError, OverflowError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        _say(f"fastllm {options.command}{_rank()}: {lines[0]}")
        return 2
    except KeyboardInterrupt:
        _say(f"\nfastllm {options.command}: interrupted")
        return 130
