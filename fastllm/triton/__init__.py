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

TRITON = 3  # the backend's number in csrc/ops/backend.h
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE_TYPES = ("cuda", "xpu", "cpu") if INTERPRETED else ("cuda", "xpu")
LAUNCHERS = {  # plain operation: module, function
    "cross_entropy_forward": ("cross_entropy", "forward"),
    "cross_entropy_backward": ("cross_entropy", "backward"),
    "cross_entropy_backward_": ("cross_entropy", "backward_"),
    "cross_entropy_correct_": ("cross_entropy", "correct_"),
    "embedding_forward": ("embedding", "forward"),
    "embedding_backward": ("embedding", "backward"),
    "linear_cross_entropy_forward": ("linear_cross_entropy", "forward"),
    "linear_cross_entropy_backward": ("linear_cross_entropy", "backward"),
    "linear_cross_entropy_scale_": ("linear_cross_entropy", "scale_"),
    "linear_relu_forward": ("linear_relu", "forward"),
    "linear_relu_backward": ("linear_relu", "backward"),
    "mse_loss_forward": ("mse_loss", "forward"),
    "mse_loss_backward": ("mse_loss", "backward"),
    "mse_loss_correct_": ("mse_loss", "correct_"),
    "relu_mlp_forward": ("relu_mlp", "forward"),
    "relu_mlp_backward": ("relu_mlp", "backward"),
}


def why_missing() -> str | None:
    """Why this backend cannot be used, or None."""
    if _native.MISSING is not None:
        return _native.MISSING
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return None


def _launcher(module: str, function: str) -> Callable:
    found = None

    def launch(*args):
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module(f"fastllm.triton.{module}"), function)
        return found(*args)

    return launch


def _interpreted(operation: str, launch: Callable) -> Callable:
    """The CPU kernel of a plain operation, unless the chosen backend is Triton: then its interpreter."""
    compiled = torch.library.get_kernel(f"fastllm::{operation}", "CPU")

    def call(keys, *args):
        if _native.extension.current_backend() == TRITON:
            return launch(*args)
        return compiled.call_boxed(keys, *args)

    return call


_libraries: list[torch.library.Library] = []  # registrations last as long as these


def register() -> None:
    """Register every launcher, once."""
    backend, plain = torch.library.Library("fastllm_triton", "IMPL"), torch.library.Library("fastllm", "IMPL")
    _libraries.extend((backend, plain))
    for operation, (module, function) in LAUNCHERS.items():
        launch = _launcher(module, function)
        for key in ("CUDA", "XPU"):
            backend.impl(operation, launch, key)
        if INTERPRETED:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Warning only once for all operators")
                plain.impl(operation, _interpreted(operation, launch), "CPU", with_keyset=True, allow_override=True)
