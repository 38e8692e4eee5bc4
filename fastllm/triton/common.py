"""What the launchers share: the launch itself, accumulators, a device's size, checks of indices."""

from __future__ import annotations

import contextlib
import os
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from fastllm.operations.declaration import DTYPES, accumulator
from fastllm.triton import INTERPRETED

ACCUMULATORS = {dtype: accumulator(dtype) for dtype in DTYPES}
CHECKED = INTERPRETED or os.environ.get("FASTLLM_CHECK") == "1"
# Assertions on ids and targets stay in the kernels; arithmetic is not watched for overflow.
ASSERTING = {"debug": True, "sanitize_overflow": False}


def constant(dtype: torch.dtype) -> tl.dtype:
    """The accumulator of a dtype, as a kernel's constant."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def launch(kernel, grid: tuple[int, ...], tensor: Tensor, *args, **options) -> None:
    """Run a kernel on the device of ``tensor``, whichever device is current; an empty grid runs nothing."""
    if 0 in grid:
        return
    if INTERPRETED:
        for name in ("num_warps", "num_stages", *ASSERTING):
            options.pop(name, None)
        guard = contextlib.nullcontext()
    else:
        guard = torch.get_device_module(tensor.device).device(tensor.device)
    with guard:
        kernel[grid](*args, **options)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs side by side at the least."""
    if device.type == "cpu":
        return 3  # the interpreter's: few, so that every program loops
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count


def check_indices(op: str, expected: str, indices: Tensor, bound: int, ignore_index: int | None = None) -> None:
    """IndexError that names an index outside ``[0, bound)``: with ``FASTLLM_CHECK=1``, for it waits for the device."""
    if not CHECKED:
        return
    outside = (indices < 0) | (indices >= bound)
    if ignore_index is not None:
        outside &= indices != ignore_index
    if outside.any():
        position = int(outside.flatten().nonzero()[0])
        raise IndexError(f"{op}: {expected}, got {int(indices.flatten()[position])} at position {position}")
