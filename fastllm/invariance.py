"""Batch invariance: the numbers of a row do not depend on what else is in the batch.

A library's matrix product chooses its order of summation by the shape of the whole product, so that the same token gets
other last bits in a batch of another size. Under :func:`batch_invariant` products over tokens are made so that each row
is summed in one order: on the CPU by a kernel of ours, elsewhere by the library in blocks of one fixed number of rows.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as TF

from fastllm import _native

ROWS = 128  # of a block; a multiple of 64, so that blocks of contiguous rows start at whole 256 bytes


def _from_environment() -> bool:
    text = os.environ.get("FASTLLM_BATCH_INVARIANT", "0")
    if text not in ("0", "1"):
        raise ValueError(f"FASTLLM_BATCH_INVARIANT: expected 0 or 1, got {text!r}")
    return text == "1"


_default = _from_environment()
_depth = 0  # of `with` blocks that are open, in all threads: a backward pass runs in threads of its own
_lock = threading.Lock()


def _in_process() -> bool:
    return _default or _depth > 0


def active() -> bool:
    """Whether products are batch-invariant now: in this process, or in the backward pass that runs in this thread."""
    if _native.extension is None or torch.compiler.is_compiling():
        return _in_process()
    return _native.extension.batch_invariant()


def _enter(change: int) -> None:
    global _depth
    with _lock:
        _depth += change
        if _native.extension is not None:
            _native.extension.set_batch_invariant(_in_process())


_enter(0)


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """Within the ``with`` block, each row's values and input gradient have the same bits in any batch.

    Whatever other rows there are, wherever the row stands, however chunks are cut: for every function of
    ``fastllm.functional``, on every backend. Gradients of parameters are sums over the batch and are not covered; neither
    is a ``mean``, whose gradient is divided by the number of rows. It holds in all threads of the process, and for the
    backward pass of what was computed in the block. ``FASTLLM_BATCH_INVARIANT=1`` turns it on for a whole process.

    Raises
    ------
    RuntimeError
        Entered inside code that ``torch.compile`` traces: enter it around the call of the compiled function.

    Example
    -------
    >>> with fastllm.batch_invariant():
    ...     stats = F.linear_log_probs(hidden, head, tokens)
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("batch_invariant: enter it around the call of the compiled function, not inside it")
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def mode_of(invariant: bool) -> contextlib.AbstractContextManager:
    """For the backward pass of a forward pass that ran when ``active()`` was ``invariant``."""
    return batch_invariant() if invariant and not active() else contextlib.nullcontext()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.linear`, batch-invariant where that is asked for; differentiable."""
    if not active() or input.dim() == 0 or input.numel() == 0 or weight.numel() == 0:
        return TF.linear(input, weight, bias)
    if weight.dim() == 1:
        output = linear(input, weight[None])[..., 0]
        return output if bias is None else output + bias
    rows = input.reshape(-1, input.shape[-1])
    padded = TF.pad(rows, (0, 0, 0, -len(rows) % ROWS))
    output = torch.cat([TF.linear(block, weight, bias) for block in padded.split(ROWS)])[: len(rows)]
    return output.reshape(*input.shape[:-1], weight.shape[0])


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``a @ b + bias`` for ``a`` (M, K) of one row a token; not differentiable.

    Parameters
    ----------
    out
        (M, N), written: its rows apart, its items side by side.
    """
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1])
    if not active():
        return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    # One layout of a row, whatever tensor it stands in: the library looks at strides and alignment, too.
    a = a.contiguous().view(-1).view(a.shape)
    if a.data_ptr() % 64:
        a = a.clone()
    for first in range(0, a.shape[0], ROWS):
        rows, result = a[first : first + ROWS], out[first : first + ROWS]
        size = rows.shape[0]
        if size < ROWS:
            rows = TF.pad(rows, (0, 0, 0, ROWS - size))
            result = out.new_empty_strided((ROWS, out.shape[1]), out.stride())
        torch.mm(rows, b, out=result) if bias is None else torch.addmm(bias, rows, b, out=result)
        if size < ROWS:
            out[first:] = result[:size]
    return out
