"""Whether Triton can launch a kernel here: it needs a C compiler for its driver, and a GPU that it compiles for.

Both show at the first launch alone, so one is made before ``auto`` relies on Triton.
"""

from __future__ import annotations

from functools import lru_cache

import torch


def _reason(error: Exception) -> str:
    """The error in one line, with what is missing where that is known."""
    text = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
    if "C compiler" in str(error) or isinstance(error, FileNotFoundError):
        return f"Triton needs a C compiler for its driver (Debian: apt-get install gcc; or set CC): {text}"
    return f"Triton cannot launch a kernel: {type(error).__name__}: {text}"


@lru_cache
def why_not(device: torch.device) -> str | None:
    """Why no kernel can be launched on ``device``, or None; one small kernel is launched on the first call."""
    try:
        from fastllm.triton.mse_loss import forward

        x = torch.zeros(16, device=device)
        forward(x, x, None, 1, False)
        torch.get_device_module(device).synchronize(device)
    except Exception as error:  # a missing compiler, an unknown GPU, a broken driver: each has a type of its own
        return _reason(error)
    return None


def _is_old(device: torch.device) -> bool:
    """Whether a GPU is older than what Triton supports in full (sm_80)."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0)


def serves_every_device(kind: str) -> bool:
    """Whether no device of a kind needs a look at each operation."""
    count = torch.get_device_module(kind).device_count()
    return all(why_not(d) is None and not _is_old(d) for d in (torch.device(kind, i) for i in range(count)))


@lru_cache
def why_not_operation(operation: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why ``operation`` cannot be computed by Triton on ``device``, or None.

    GPUs older than sm_80 try each operation and dtype once. For newer ones the tests compile all of them ahead of time,
    and nothing but :func:`why_not` is tried.
    """
    reason = why_not(device)
    if reason is not None or not _is_old(device):
        return reason
    x, w, y = (torch.zeros(16, 16, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    ids = torch.zeros(16, dtype=torch.int64, device=device)
    ops = torch.ops.fastllm
    calls = {
        "embedding": lambda: ops.embedding(ids, w, -1, False, False),
        "linear_relu": lambda: ops.linear_relu(x, w, None),
        "relu_mlp": lambda: ops.relu_mlp(x, w, None, y, None),
        "mse_loss": lambda: ops.mse_loss(x, y, None, 1),
        "cross_entropy": lambda: ops.cross_entropy(x, ids, None, 1, -100, 0.0, 0.0, None, False),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(x, w, ids, None, None, 1, -100, 0.0, 0.0, None, False),
    }
    try:
        with torch.enable_grad():
            calls[operation]().sum().backward()
        torch.cuda.synchronize(device)
    except Exception as error:
        return _reason(error)
    return None
