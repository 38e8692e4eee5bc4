"""The command line: ``fastllm train | generate | bench | build | info``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastllm import _native, backends
from fastllm._build import cache
from fastllm._build.toolchain import CompileFailed
from fastllm.lm import data, training
from fastllm.lm.tokenizer import Tokenizer
from fastllm.models import MLPLanguageModel


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastllm", description="Fused kernels for training language models in PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = argparse.ArgumentDefaultsHelpFormatter

    train = commands.add_parser("train", help="train a small language model on a text", formatter_class=defaults)
    train.set_defaults(run=_train)
    train.add_argument("--text", metavar="FILE", help="UTF-8 text to train on; Python's own reference if not given")
    train.add_argument("--out", metavar="FILE", default="checkpoints/model.pt", help="where the checkpoint goes")
    train.add_argument("--resume", metavar="FILE", help="go on with the run of this checkpoint")
    train.add_argument("--steps", type=_positive, default=1500, help="steps of the optimizer")
    train.add_argument("--batch-size", type=_positive, default=16, help="sequences in a batch")
    train.add_argument("--sequence-length", type=_positive, default=64, help="words in a sequence")
    train.add_argument("--learning-rate", type=float, default=2e-3, help="highest learning rate")
    train.add_argument("--vocab-size", type=int, default=4096, help="size of the byte-pair vocabulary")
    train.add_argument("--embedding-dim", type=_positive, default=64, help="size of an embedding")
    train.add_argument("--hidden-dim", type=_positive, default=384, help="size of the hidden layers")
    train.add_argument("--context-length", type=_positive, default=8, help="words that a prediction sees")
    train.add_argument("--num-hidden-layers", type=_positive, default=1, help="number of hidden layers")
    train.add_argument("--dropout", type=float, default=0.2, help="dropout of hidden activations")
    train.add_argument("--seed", type=int, default=0, help="seed of everything random")
    train.add_argument("--prompt", default="The value of", help="what the sample at the end continues")
    train.add_argument(
        "--compare-eager",
        action="store_true",
        help="at the end, time a step against the same model in eager PyTorch",
    )

    generate = commands.add_parser("generate", help="continue a text", formatter_class=defaults)
    generate.set_defaults(run=_generate)
    generate.add_argument("--checkpoint", metavar="FILE", default="checkpoints/model.pt", help="what `train` saved")
    generate.add_argument("--prompt", default="The value of", help="the text to continue")
    generate.add_argument("--tokens", type=int, default=100, help="number of tokens to add")
    generate.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable token")
    generate.add_argument("--top-k", type=int, default=None, help="draw among the k most probable tokens")
    generate.add_argument("--top-p", type=float, default=0.95, help="draw among the tokens of this much probability")
    generate.add_argument("--seed", type=int, default=0, help="seed of the draws")

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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _new_trainer(options: argparse.Namespace) -> training.Trainer:
    text = data.read_text(options.text)
    tokenizer = Tokenizer.train(text, options.vocab_size)
    ids = torch.tensor(tokenizer.encode(text))
    train_ids, test_ids = data.split_ids(ids)
    print(f"text: {len(text):,} characters, {len(ids):,} tokens of {tokenizer.vocab_size}; {len(test_ids):,} held out")
    torch.manual_seed(options.seed)
    model = MLPLanguageModel(
        tokenizer.vocab_size,
        options.embedding_dim,
        options.hidden_dim,
        options.context_length,
        options.num_hidden_layers,
        options.dropout,
    )
    run = training.TrainingOptions(
        options.steps, options.batch_size, options.sequence_length, options.learning_rate, seed=options.seed
    )
    return training.Trainer(model, tokenizer, train_ids, run, test_ids)


def _check_writable(out: str) -> None:
    """OSError now, not after hours of training."""
    file = Path(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise OSError(f"cannot write a checkpoint to {out}")


class _InterruptAfterStep:
    """Ctrl-C waits for the end of a step, so that what is saved is a whole one; a second Ctrl-C does not wait."""

    def __enter__(self) -> _InterruptAfterStep:
        self._asked = False
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def step_ends(self) -> None:
        if self._asked:
            raise KeyboardInterrupt


def _train(options: argparse.Namespace) -> int:
    if not options.prompt:
        raise ValueError("the prompt must not be empty")
    if options.resume:
        trainer = training.Trainer.load(options.resume)
        options.out = options.resume
        print(f"resuming {options.resume} at step {trainer.step} of {trainer.options.steps}")
    else:
        _check_writable(options.out)
        trainer = _new_trainer(options)
    model, test_ids = trainer.model, trainer.test_ids
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model: {parameters:,} parameters; backend: {backends.get_backend()}; threads: {torch.get_num_threads()}")
    before = training.perplexity(model, test_ids)
    print(f"held-out perplexity before training: {before:,.1f}")
    progress = training.ProgressBar(trainer.options.steps)
    per_step = trainer.options.batch_size * trainer.options.sequence_length
    first = trainer.step

    def show(step: int, loss: float) -> None:
        rate = (step - first) * per_step / max(progress.elapsed(), 1e-9)
        progress.update(step, f"loss {loss:.3f}  {rate:,.0f} tokens/s")
        interrupt.step_ends()

    try:
        with _InterruptAfterStep() as interrupt:
            trainer.run(callback=show)
    except KeyboardInterrupt:
        trainer.save(options.out)
        print(f"\ninterrupted at step {trainer.step}; saved. To go on: fastllm train --resume {options.out}")
        return 130
    trainer.save(options.out)
    after = training.perplexity(model, test_ids)
    print(f"held-out perplexity after training: {after:,.1f} (before: {before:,.1f})")
    print(f"saved {options.out}; to continue a text: fastllm generate --checkpoint {options.out} --prompt TEXT")
    print(f"sample: {_continue(model, trainer.tokenizer, options.prompt, 60, 0.8, None, 0.95, options.seed)}")
    if options.compare_eager:
        _print_comparison(trainer)
    return 0


def _print_comparison(trainer: training.Trainer) -> None:
    times = training.compare_with_eager(trainer)
    print("time of a training step's forward and backward, same model and batches, in alternation (ms):")
    for name, (least, median) in times.items():
        print(f"  {name:<8} minimum {least:.2f}  median {median:.2f}")
    least, median = (times["eager"][k] / times["fastllm"][k] for k in (0, 1))
    print(f"  eager / fastllm: {least:.2f}x by minimum, {median:.2f}x by median")


def _continue(model, tokenizer, prompt, tokens, temperature, top_k, top_p, seed) -> str:
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt must not be empty")
    generator = torch.Generator().manual_seed(seed)
    out = model.generate(torch.tensor(ids), tokens, temperature, top_k, top_p, generator)
    return tokenizer.decode(out.tolist())


def _generate(options: argparse.Namespace) -> int:
    model, tokenizer = training.load_model(options.checkpoint)
    print(
        _continue(
            model,
            tokenizer,
            options.prompt,
            options.tokens,
            options.temperature,
            options.top_k,
            options.top_p,
            options.seed,
        )
    )
    return 0


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status. A user's mistake is one line on stderr and status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "bench":
        options.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"fastllm {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nfastllm {options.command}: interrupted", file=sys.stderr)
        return 130
