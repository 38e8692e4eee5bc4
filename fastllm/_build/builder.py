"""Runs ninja, shows how far it is, and records what was built with what."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from . import plan
from .toolchain import CannotBuild, CompileFailed, Toolchain


class Progress:
    """Shows ninja's lines ``[done/all] step``: over one another on a terminal, else one every few seconds."""

    EVERY = 5.0  # seconds

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._terminal = stream, stream.isatty()
        self._next, self._unfinished = time.monotonic(), False

    def __call__(self, line: str) -> None:
        """Show ``line``; an empty one ends the line that the terminal shows."""
        counts = re.match(r"\[(\d+)/(\d+)\]", line)
        if counts and self._terminal:
            print(f"\r\033[K{line[:76]}", end="", file=self._stream, flush=True)
            self._unfinished = True
        elif counts and (counts.group(1) == counts.group(2) or time.monotonic() >= self._next):
            print(line, file=self._stream, flush=True)
            self._next = time.monotonic() + self.EVERY
        elif not line and self._unfinished:
            print(file=self._stream, flush=True)
            self._unfinished = False


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[int]:
    """Let one process at a time build in ``folder``.

    Yields the file descriptor of the lock: a process that inherits it holds the lock as well, until it ends.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is building in {folder}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def run_ninja(
    command: list[str | Path], folder: Path, log: Path, show: Callable[[str], None], keep_open: tuple[int, ...] = ()
) -> str | None:
    """Run ``command`` in ``folder``.

    Parameters
    ----------
    log
        Everything that it prints is added to this file.
    show
        Is given each line, and an empty one at the end.
    keep_open
        File descriptors that ninja and its compilers inherit: a lock lasts as long as one of them lives.

    Returns
    -------
    str or None
        None if all went well, else the first line that tells of an error.
    """
    error = None
    with log.open("a", buffering=1, errors="replace") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=keep_open,
        )
        try:
            for line in process.stdout:
                file.write(line)
                if error is None and re.search(r"\berror:|cannot find|undefined reference|No space left", line):
                    error = line.strip()
                show(line.rstrip("\n"))
        except BaseException:  # Ctrl-C reaches only this process if it was not typed at a terminal
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        finally:
            show("")
        if process.wait() == 0:
            return None
    return error or f"ninja ended with status {process.returncode}"


def build_extension(
    tools: Toolchain,
    target: Path,
    folder: Path,
    log: Path,
    version: str,
    *,
    cuda_required: bool = False,
    show: Callable[[str], None],
    say: Callable[[str], None] = print,
    keep_open: tuple[int, ...] = (),
) -> dict:
    """Compile the extension into ``target``; what is up to date in ``folder`` is not compiled again.

    Environment: MAX_JOBS (parallel compilers), FASTLLM_WERROR=1 (warnings are errors), FASTLLM_SANITIZE=address.

    Parameters
    ----------
    folder
        Of the objects and the ninja file.
    log
        Gets the toolchain and everything that ninja and the compilers print.
    cuda_required
        Failing CUDA kernels are an error; else they are left out with a line given to ``say``.

    Returns
    -------
    dict
        What ``fastllm.info()`` shows of a build.

    Raises
    ------
    CompileFailed
        The message holds the compiler's first error and the path of the log.
    CannotBuild
        The folder or the target cannot be written.
    """
    try:
        for path in (folder, target.parent, log.parent):
            path.mkdir(parents=True, exist_ok=True)
        log.write_text(f"{tools}\n")
    except OSError as error:
        raise CannotBuild(f"cannot write to {folder}: {error}") from error
    ninja_file = folder / "build.ninja"

    def compiles(tools: Toolchain) -> str | None:
        options = {
            "werror": os.environ.get("FASTLLM_WERROR") == "1",
            "sanitizer": os.environ.get("FASTLLM_SANITIZE"),
        }
        out = target.name if target.parent == folder else target
        ninja_file.write_text(plan.ninja_text(*plan.extension(tools, out, **options)))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        return run_ninja([tools.ninja, "-j", jobs], folder, log, show, keep_open)

    failed = compiles(tools)
    if failed and tools.cuda is not None and not cuda_required:
        missing = f"nvcc {tools.cuda.version} or the compiler failed on them when fastllm was built: {failed}"
        say(f"fastllm: trying without CUDA C++ kernels: {missing}")
        tools = dataclasses.replace(tools, cuda=None, cuda_missing=missing)
        failed = compiles(tools)
    if failed:
        raise CompileFailed(f"the compiler failed ({tools.cxx_version}): {failed}; its whole output is in {log}")
    return {
        "version": version,
        "missing": None,
        "torch": tools.torch_version,
        "python": platform.python_version(),
        "cxx": " ".join(tools.cxx),
        "cxx_version": tools.cxx_version,
        "isa": plan.ISAS,
        "cuda": None if tools.cuda is None else tools.cuda.version,
        "cuda_architectures": [] if tools.cuda is None else tools.cuda.targets,
        "cuda_missing": tools.cuda_missing,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def write_compile_commands(tools: Toolchain, folder: Path, out: Path) -> None:
    """Write ``compile_commands.json``, which editors read, from the ninja file of ``folder``."""
    database = subprocess.run([tools.ninja, "-t", "compdb"], cwd=folder, capture_output=True, text=True, check=True)
    out.write_text(database.stdout)


def write_build_info(path: Path, info: dict) -> None:
    """Write the module ``fastllm._build_info``."""
    path.write_text(f'"""Written when fastllm was built."""\n\nBUILD = {info!r}\n')


def not_built(version: str, reason: str) -> dict:
    """What ``fastllm._build_info`` holds where nothing was compiled."""
    return {"version": version, "missing": reason}
