"""The packages of the extra ``fastllm[train]``: imported when something needs one, with an error that names the extra."""

from __future__ import annotations

import importlib
from types import ModuleType


def need(name: str, purpose: str) -> ModuleType:
    """Import the module ``name``.

    Raises
    ------
    RuntimeError
        The package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.split(".")[0]
        if (error.name or "").split(".")[0] not in (package, "tensorboard"):
            raise
        missing = "tensorboard" if "tensorboard" in name else package
        raise RuntimeError(
            f"{purpose} needs the package {missing}, which is not installed: pip install 'fastllm[train]'"
        ) from None
