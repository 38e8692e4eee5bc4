"""Loads the compiled operations, or says once what is missing and how to mend it.

They lie in the package, or in the user's cache where ``python -m fastllm build`` puts them. The extension is built
against one PyTorch; loading it under another can crash on an undefined symbol, so versions are compared before it is
imported. Nothing is compiled here.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch

from fastllm import operations  # noqa: F401 - declares what the extension implements
from fastllm._build import cache
from fastllm._build.toolchain import CannotBuild, torch_release

REMEDY = f"run `{cache.COMMAND}`, which compiles them for this torch (it needs g++ and the Python package ninja)"
CUDA_REMEDY = "building them takes a CUDA build of torch and nvcc of the same major version"
Candidate = tuple[dict, Callable[[], ModuleType]]  # what it was built with, and the function that loads it


def _same_release(built: str, running: str) -> bool:
    """Whether an extension built with torch ``built`` may be loaded by torch ``running``."""
    return torch_release(built) == torch_release(running)


def _why_not_packaged(build: dict) -> str | None:
    """Why the extension in the package, as its ``_build_info`` tells of it, cannot be loaded; or None."""
    if not build:
        return "the compiled operations (fastllm._C) are not built"
    if build.get("missing") is not None:
        return f"the compiled operations (fastllm._C) are not built: {build['missing']}"
    if not _same_release(build["torch"], torch.__version__):
        return f"the compiled operations were built with torch {build['torch']}, but this is torch {torch.__version__}"
    python = build.get("python", platform.python_version())
    if python.split(".")[:2] != platform.python_version().split(".")[:2]:
        return (
            f"the compiled operations were built with Python {python}, but this is Python {platform.python_version()}"
        )
    return None


def _load_packaged() -> ModuleType:
    return importlib.import_module("fastllm._C")


def _load_file(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastllm._C", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fastllm._C"] = module
    return module


def _candidates(reasons: list[str]) -> Iterator[Candidate]:
    """What may be loaded, the best first; ``reasons`` collects why others may not."""
    try:
        packaged = importlib.import_module("fastllm._build_info").BUILD
    except ImportError:
        packaged = {}
    why_not = _why_not_packaged(packaged)
    lacks_cuda = packaged.get("cuda") is None and torch.version.cuda is not None
    if why_not is None and not lacks_cuda:
        yield packaged, _load_packaged
    try:
        cached = cache.find(torch.__version__)
    except CannotBuild as error:
        cached = None
        reasons.append(str(error))
    # Beside a usable package, a build of the user's own is asked for its CUDA kernels.
    if cached is not None and (why_not is not None or not lacks_cuda or cached.info["cuda"] is not None):
        yield cached.info, lambda: _load_file(cached.library)
    if why_not is None and lacks_cuda:
        yield packaged, _load_packaged
    if why_not is not None:
        reasons.insert(0, why_not)


def _load() -> tuple[ModuleType | None, dict, str | None]:
    """The extension or None, what it was built with, and why it, or one that was asked first, was not loaded."""
    reasons: list[str] = []
    for build, load in _candidates(reasons):
        try:
            return load(), build, "; ".join(reasons) or None
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(f"the compiled operations (fastllm._C) cannot be loaded: {error}")
    return None, {}, "; ".join(reasons)


extension, BUILD, _problem = _load()
MISSING = _problem if extension is None else None
_building = sys.argv[1:2] == ["build"] and Path(sys.argv[0]).name in ("-m", "fastllm")  # which mends it just now
if _problem is not None and not _building:
    _using = "the eager backend" if extension is None else extension.__file__
    warnings.warn(f"fastllm: {_problem}; using {_using}. To mend it, {REMEDY}.", stacklevel=2)
