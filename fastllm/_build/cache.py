"""Extensions that ``python -m fastllm build`` compiled for this user, and the command itself.

A folder ``builds/<key>`` in the cache belongs to one version of fastllm and its sources, one release of torch, one
Python and one architecture; builds for others lie beside it. ``build.json`` in it names the library that serves. It is
written last, and replaced in one step: what it names is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from fastllm._version import __version__

from . import builder, plan, toolchain
from .toolchain import CannotBuild

COMMAND = "python -m fastllm build"


@dataclass(frozen=True)
class CachedBuild:
    """A library in the cache and what it was built with."""

    library: Path
    info: dict


def home() -> Path:
    """The cache's folder: ``FASTLLM_HOME``, or ``fastllm`` in the user's cache folder.

    Raises
    ------
    CannotBuild
        Neither a folder is named nor has the user a home.
    """
    try:
        if named := os.environ.get("FASTLLM_HOME"):
            return Path(named).expanduser().absolute()
        base = os.environ.get("XDG_CACHE_HOME", "")
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fastllm"
    except RuntimeError as error:
        raise CannotBuild(f"this user has no home folder ({error}): set FASTLLM_HOME to a folder for builds") from error


def _prefix(torch_version: str) -> str:
    abi = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
    return f"{__version__}-torch{toolchain.torch_release(torch_version)}-{abi}-{platform.machine()}-"


def folder_for(torch_version: str) -> Path:
    """The folder of builds for this package, torch, Python and architecture."""
    return home() / "builds" / (_prefix(torch_version) + plan.fingerprint())


def find(torch_version: str) -> CachedBuild | None:
    """The build that serves this package under this torch, or None.

    Raises
    ------
    CannotBuild
        There is one, and it is damaged.
    """
    try:
        builds = home() / "builds"
        # Sources are read only where a build may be there.
        if not any(name.startswith(_prefix(torch_version)) for name in os.listdir(builds)):
            return None
        folder = builds / (_prefix(torch_version) + plan.fingerprint())
        record = json.loads((folder / "build.json").read_text())
        library, expected, info = folder / record["library"], record["size"], record["info"]
    except (OSError, CannotBuild):
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise CannotBuild(f"{folder / 'build.json'} is damaged ({error!r})") from error
    size = library.stat().st_size if library.exists() else 0
    if size != expected:
        raise CannotBuild(f"{library} is damaged: it was built with {expected} bytes and has {size}")
    return CachedBuild(library, info)


def _load_error(library: Path) -> str | None:
    """Why a fresh interpreter cannot load ``library``, or None."""
    code = (
        "import sys, importlib.util as u, torch\n"
        "spec = u.spec_from_file_location('fastllm._C', sys.argv[1])\n"
        "module = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "module.cpu_capability()\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True)
    if result.returncode == 0:
        return None
    return (result.stderr.strip().splitlines() or [f"the interpreter ended with status {result.returncode}"])[-1]


def _publish(folder: Path, built: Path, info: dict) -> Path:
    """Make ``built`` the library that serves, in one step."""
    library = folder / f"{time.time_ns()}-{built.name}"
    record = folder / "build.json.new"
    os.replace(built, library)
    record.write_text(json.dumps({"library": library.name, "size": library.stat().st_size, "info": info}, indent=1))
    for path in (library, record):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    os.replace(record, folder / "build.json")
    # The one before stays: a process that has just read its name will load it.
    for older in sorted(folder.glob(f"*-{built.name}"))[:-2]:
        older.unlink()
    return library


def _serves(found: CachedBuild | None, tools: toolchain.Toolchain) -> bool:
    """Whether a build is what ``tools`` would make."""
    if found is None or _load_error(found.library) is not None:
        return False
    targets = [] if tools.cuda is None else tools.cuda.targets
    made = (found.info["cxx_version"], found.info["cuda"], found.info["cuda_architectures"])
    return made == (tools.cxx_version, None if tools.cuda is None else tools.cuda.version, targets)


def build(wish_cuda: str, out: TextIO) -> Path:
    """Compile the extension for this torch into the cache, unless it is there.

    Parameters
    ----------
    wish_cuda
        As ``FASTLLM_CUDA``: ``"1"`` requires CUDA kernels, ``"0"`` leaves them out, ``""`` builds them if possible.
    out
        Where progress is shown.

    Returns
    -------
    Path
        The library.

    Raises
    ------
    CompileFailed
        The message names the log.
    CannotBuild
        Something is missing, or the cache cannot be written.
    """

    def say(line: str) -> None:
        print(line, file=out, flush=True)

    tools = toolchain.find(wish_cuda, say)
    folder = folder_for(tools.torch_version)
    try:
        with builder.locked(folder, say) as lock:
            with contextlib.suppress(CannotBuild):
                found = find(tools.torch_version)
                if _serves(found, tools):
                    say(f"already built: {found.library}")
                    return found.library
            return _build_locked(tools, folder, wish_cuda == "1", lock, say, builder.Progress(out))
    except OSError as error:
        raise CannotBuild(f"cannot write to the cache: {error}; FASTLLM_HOME names another folder") from error


def _build_locked(tools, folder, cuda_required, lock, say, show) -> Path:
    kernels = "with" if tools.cuda else "without"
    say(f"compiling for torch {tools.torch_version} {kernels} CUDA kernels by {tools.cxx_version}, a few minutes")
    if tools.cuda is None:
        say(f"no CUDA kernels: {tools.cuda_missing}")
    objects, log = folder / "objects", folder / "build.log"
    say(f"the log is {log}")
    target = objects / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    info = builder.build_extension(
        tools, target, objects, log, __version__, cuda_required=cuda_required, show=show, say=say, keep_open=(lock,)
    )
    failed = _load_error(target)
    library = None if failed else _publish(folder, target, info)
    shutil.rmtree(objects)  # nothing of a library that does not load is used again
    if failed:
        raise toolchain.CompileFailed(f"what was built cannot be loaded: {failed}; the log is {log}")
    say(f"built {library}")
    return library
