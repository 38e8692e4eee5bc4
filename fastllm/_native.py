"""Loads the compiled operations, or says once what is missing and how to mend it.

The extension is built against one PyTorch; loading it under another can crash on an undefined symbol, so versions are
compared before it is imported.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch

from fastllm import operations  # noqa: F401 - declares what the extension implements

REMEDY = "run `pip install --no-build-isolation .` in fastllm's source directory, with this torch and a C++ compiler"
CUDA_REMEDY = "building them takes a CUDA build of torch and nvcc of the same major version"


def _same_release(built: str, running: str) -> bool:
    """Whether an extension built with torch ``built`` may be loaded by torch ``running``.

    Patch releases of one build (``2.13.0+cpu``, ``2.13.1+cpu``) share their symbols; another minor version, another
    local tag (``+cpu``, ``+cu130``) or any two pre-releases may not.
    """
    if built == running:
        return True
    keys = []
    for version in (built, running):
        public, _, local = version.partition("+")
        if not public.replace(".", "").isdigit():
            return False
        keys.append((public.split(".")[:2], local))
    return keys[0] == keys[1]


def _load() -> tuple[ModuleType | None, dict, str | None]:
    """The extension or None, what it was built with, and why it is not there."""
    try:
        build = importlib.import_module("fastllm._build_info").BUILD
    except ImportError:
        return None, {}, "the compiled operations (fastllm._C) are not built"
    if not _same_release(build["torch"], torch.__version__):
        reason = (
            f"the compiled operations were built with torch {build['torch']}, but this is torch {torch.__version__}"
        )
        return None, build, reason
    try:
        return importlib.import_module("fastllm._C"), build, None
    except (ImportError, OSError, RuntimeError) as error:
        return None, build, f"the compiled operations (fastllm._C) cannot be loaded: {error}"


extension, BUILD, MISSING = _load()
if MISSING is not None:
    warnings.warn(f"fastllm: {MISSING}; using the eager backend. To mend it, {REMEDY}.", stacklevel=2)
