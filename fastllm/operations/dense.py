"""Matrix products and large tensors of what is written in Python over the row kernels, into memory that is reused.

On the CPU the compiled extension serves them, where it is built: its pool spares the page faults of fresh memory, its
products choose a library.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

from fastllm import invariance
from fastllm.operations.declaration import accumulator

_extension: ModuleType | None = None


def use(extension: ModuleType) -> None:
    global _extension
    _extension = extension


def _compiled(tensor: Tensor) -> bool:
    return _extension is not None and tensor.is_cpu and type(tensor) in (Tensor, Parameter)


def empty(like: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised contiguous matrix."""
    if _compiled(like):
        return _extension.empty(like, rows, columns)
    return like.new_empty(rows, columns)


def empty_product(like: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised matrix with the distance between rows that suits who multiplies into it."""
    if _compiled(like):
        return _extension.empty(like, rows, _extension.row_stride(like, columns))[:, :columns]
    return in_pieces(like, rows, columns)


def in_pieces(like: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised matrix whose rows start at whole pieces of 16 bytes: by other rows the product of a GPU's library
    is up to four times as slow."""
    pieces = 16 // like.element_size()
    return like.new_empty(rows, -(-columns // pieces) * pieces)[:, :columns]


def multiply(out: Tensor, a: Tensor, b: Tensor, plus: Tensor | None = None) -> None:
    """``out = a b + plus``; ``plus`` is a row (a bias) or ``out`` itself. Every product goes through here."""
    if _compiled(out):
        _extension.multiply(out, a, b, plus)
    elif plus is None:
        torch.mm(a, b, out=out)
    elif out.dtype == a.dtype:
        torch.addmm(plus, a, b, out=out)
    else:
        torch.ops.aten.addmm.dtype_out(plus, a, b, out.dtype, out=out)


def multiply_rows(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """``out = a b + bias`` for ``a`` of one row a token: batch-invariant where that is asked for."""
    if _compiled(out):
        _extension.multiply(out, a, b, bias)
    else:
        invariance.product(a, b, bias, out)


class Sum:
    """A sum of products that ends in ``out``: of several in bfloat16 and float16 in float32, rounded once."""

    def __init__(self, out: Tensor, of_several: bool) -> None:
        self.out = out
        self.low = of_several and out.dtype != accumulator(out.dtype)
        self.total = empty(out.new_empty(0, dtype=torch.float32), *out.shape) if self.low else out
        self.first = True

    def add(self, a: Tensor, b: Tensor) -> None:
        first, self.first = self.first, False
        if not self.low:
            multiply(self.out, a, b, None if first else self.out)
            return
        if a.is_cuda and torch.version.cuda is not None:  # its library adds products of these dtypes in float32
            multiply(self.total.zero_() if first else self.total, a, b, self.total)
            return
        multiply(self.out, a, b)
        self.total.copy_(self.out) if first else self.total.add_(self.out)

    def rounded(self) -> Tensor:
        return self.out.copy_(self.total) if self.low else self.out
