"""The Triton backend: kernels for CUDA, ROCm and XPU tensors, and, with ``TRITON_INTERPRET=1``, for CPU tensors.

One file an operation; its launchers take and return tensors as the plain operations ``torch.ops.fastllm.*`` do, and are
registered under the same names in ``torch.ops.fastllm_triton``. Importing this package does not import Triton: the
first call of a launcher does.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable

import torch

from fastllm import _native
from fastllm.operations import OPERATIONS

TRITON = 3  # the backend's number in csrc/ops/backend.h
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE_TYPES = ("cuda", "xpu", "cpu") if INTERPRETED else ("cuda", "xpu")


def why_missing() -> str | None:
    """Why this backend cannot be used, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return None


def _launcher(operation: str, kernel: str) -> Callable:
    """``mse_loss_forward`` of ``mse_loss``: the function ``forward`` of ``fastllm/triton/mse_loss.py``."""
    found = None

    def launch(*args):
        nonlocal found
        if found is None:
            found = getattr(
                importlib.import_module(f"fastllm.triton.{operation}"), kernel.removeprefix(f"{operation}_")
            )
        return found(*args)

    return launch


def _interpreted(kernel: str, launch: Callable) -> Callable:
    """The compiled CPU kernel of a kernel operation, unless the chosen backend is Triton: then its interpreter."""
    compiled = torch.library.get_kernel(f"fastllm::{kernel}", "CPU")

    def call(keys, *args):
        if _native.extension.current_backend() == TRITON:
            return launch(*args)
        return compiled.call_boxed(keys, *args)

    return call


_libraries: list[torch.library.Library] = []  # registrations last as long as these


def register() -> None:
    """Register every launcher, once.

    With the compiled extension, ``fastllm`` routes tensors of a GPU to the backend that is chosen; without it, Triton is
    the only one that implements the kernel operations.
    """
    routed = _native.extension is not None
    backend, plain = torch.library.Library("fastllm_triton", "IMPL"), torch.library.Library("fastllm", "IMPL")
    _libraries.extend((backend, plain))
    for operation in OPERATIONS:
        for kernel in operation.kernels:
            if kernel.function is not None:
                continue
            launch = _launcher(operation.name, kernel.name)
            for key in ("CUDA", "XPU"):
                backend.impl(kernel.name, launch, key)
                if not routed:
                    plain.impl(kernel.name, launch, key)
            if INTERPRETED and not routed:
                plain.impl(kernel.name, launch, "CPU")
            elif INTERPRETED:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Warning only once for all operators")
                    interpreted = _interpreted(kernel.name, launch)
                    plain.impl(kernel.name, interpreted, "CPU", with_keyset=True, allow_override=True)
