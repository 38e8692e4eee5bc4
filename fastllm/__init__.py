"""Fused kernels for training language models in PyTorch.

``fastllm.functional`` holds the operations, ``fastllm.nn`` the layers, ``fastllm.models`` a small language model.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "fastllm needs PyTorch, which is not installed here: pip install 'torch>=2.11'", name="torch"
    ) from None

from fastllm import functional, memory, nn
from fastllm._version import __version__
from fastllm.acceleration import accelerate, accelerated
from fastllm.backends import info, set_backend, use_backend
from fastllm.invariance import batch_invariant
from fastllm.nn import (
    CrossEntropyLoss,
    Embedding,
    LinearCrossEntropyLoss,
    LinearLogProbs,
    LinearReLU,
    MSELoss,
    ReLUMLP,
)

__all__ = [
    "CrossEntropyLoss",
    "Embedding",
    "LinearCrossEntropyLoss",
    "LinearLogProbs",
    "LinearReLU",
    "MSELoss",
    "ReLUMLP",
    "__version__",
    "accelerate",
    "accelerated",
    "batch_invariant",
    "distributed",
    "functional",
    "info",
    "memory",
    "models",
    "nn",
    "set_backend",
    "use_backend",
]


def __getattr__(name: str):
    if name in ("distributed", "models"):
        import importlib

        return importlib.import_module(f"fastllm.{name}")
    raise AttributeError(f"module 'fastllm' has no attribute {name!r}")
