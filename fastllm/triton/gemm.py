"""A matrix product with an epilogue, in bfloat16 and float16: what linear_relu and relu_mlp are made of.

Fused into the product's epilogue, on its float32 sums: bias and ReLU (forward), or the ReLU's mask and the column sums
that make the bias's gradient (backward of a hidden layer). Each saves a read and a write of the whole output.

The kernel is persistent: one program a multiprocessor walks over output tiles, in groups of rows so that tiles in
flight share operands in the L2 cache (Triton's tutorial on persistent matrix products). Operands come by tensor
descriptors (TMA where the target has it) where their rows are multiples of 16 bytes, else by masked pointers.

float32 and float64 products stay with PyTorch's library, whose settings for TF32 they follow.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastllm import invariance
from fastllm.triton import INTERPRETED, tuning
from fastllm.triton.common import launch, multiprocessors

GROUP_ROWS = 8  # tile rows whose tiles are in flight together

# Tiles (M, N, K), pipeline stages, warps. Hopper and Blackwell: 128 x 256 with two consumer warpgroups is the largest
# tile whose sums fit the register file, three stages of 48 KB fit shared memory (CUTLASS's default for large bfloat16
# products); an epilogue that also holds a tile of the hidden activation gets 128 x 128. Ampere and Ada: 128 x 128 within
# the 100 KB of shared memory of their smallest parts; AMD's gfx9: two stages within 64 KB of LDS. "small": few rows, so
# that more multiprocessors have a tile, and operands without descriptors, whose addresses take registers. Held against
# the compilers' reports (tests/triton_aot.py); none has been timed.
TILES = {
    ("cuda", 9): {"plain": (128, 256, 64, 3, 8), "masked": (128, 128, 64, 4, 8), "small": (64, 64, 64, 4, 4)},
    ("cuda", 10): {"plain": (128, 256, 64, 3, 8), "masked": (128, 128, 64, 4, 8), "small": (64, 64, 64, 4, 4)},
    ("cuda", 8): {"plain": (128, 128, 32, 4, 8), "masked": (128, 64, 32, 4, 8), "small": (64, 64, 32, 4, 4)},
    ("hip", 9): {"plain": (128, 128, 64, 2, 8), "masked": (128, 64, 64, 2, 8), "small": (64, 64, 64, 2, 4)},
    ("cpu", 0): {"plain": (32, 32, 16, 1, 4), "masked": (32, 16, 16, 1, 4), "small": (16, 16, 16, 1, 4)},
}
SMALL_ROWS = 512  # up to this many rows, small tiles


@triton.jit
def _load(operand, row, column, rows, columns, row_stride, DESCRIPTOR: tl.constexpr, ROWS: tl.constexpr,
          COLUMNS: tl.constexpr):  # fmt: skip
    """A tile (ROWS, COLUMNS) of a row-major operand, zeros outside of it."""
    if DESCRIPTOR:
        tile = operand.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        tile = tl.load(operand + r.to(tl.int64)[:, None] * row_stride + c[None, :], mask=mask, other=0.0)
    return tile


@triton.jit(do_not_specialize=["rows"])
def _matmul(
    a, b, c, bias, hidden, column_sums,  # (M, K); (N, K) or (K, N); (M, N); (N,); (M, N); (tiles of M, N) float32
    rows, columns, inner, a_stride, b_stride,
    DESCRIPTORS: tl.constexpr, B_TURNED: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, MASK: tl.constexpr,
    SUMS: tl.constexpr, OPERAND: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(rows, M)
    column_tiles = tl.cdiv(columns, N)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
        group = tile // (GROUP * column_tiles)
        first_row = group * GROUP
        group_rows = tl.minimum(row_tiles - first_row, GROUP)
        within = tile - group * GROUP * column_tiles
        row_tile = first_row + within % group_rows
        row = row_tile * M
        column = (within // group_rows) * N
        total = tl.zeros((M, N), tl.float32)
        for k in tl.range(0, inner, K):
            left = _load(a, row, k, rows, inner, a_stride, DESCRIPTORS, M, K)
            if B_TURNED:
                right = _load(b, column, k, columns, inner, b_stride, DESCRIPTORS, N, K).T
            else:
                right = _load(b, k, column, inner, columns, b_stride, DESCRIPTORS, K, N)
            total = tl.dot(left.to(OPERAND), right.to(OPERAND), total)
        r = row + tl.arange(0, M)
        cols = column + tl.arange(0, N)
        mask = (r < rows)[:, None] & (cols < columns)[None, :]
        offsets = r.to(tl.int64)[:, None] * columns + cols[None, :]
        if BIAS:
            total += tl.load(bias + cols, mask=cols < columns, other=0.0).to(tl.float32)[None, :]
        if RELU:
            total = tl.where(total <= 0, 0.0, total)  # NaN stays
        if MASK:
            total = tl.where(tl.load(hidden + offsets, mask=mask, other=0.0) <= 0, 0.0, total)
        if SUMS:
            tl.store(
                column_sums + row_tile.to(tl.int64) * columns + cols,
                tl.sum(tl.where(mask, total, 0.0), 0),
                mask=cols < columns,
            )
        tl.store(c + offsets, total.to(c.dtype.element_ty), mask=mask)


def serves(a: Tensor) -> bool:
    """Whether the kernel, rather than PyTorch's library, multiplies operands like ``a``.

    Never on a GPU older than sm_80, for which there are no tiles, nor under ``batch_invariant``, for tiles follow the
    number of rows.
    """
    if invariance.active():
        return False
    kind, generation = target(a.device)
    return a.dtype in (torch.bfloat16, torch.float16) and (kind != "cuda" or generation >= 8)


def target(device: torch.device) -> tuple[str, int]:
    """The kind of a device and its generation, as ``TILES`` names them."""
    if device.type != "cuda":
        return device.type, 0
    return "hip" if torch.version.hip else "cuda", torch.cuda.get_device_capability(device)[0]


def tiles(device: torch.device, rows: int, descriptors: bool, masked: bool) -> tuning.Tile:
    """Tile, stages and warps for a device and a product."""
    kind, major = target(device)
    table = TILES.get((kind, major)) or TILES[("hip", 9) if kind == "hip" else ("cuda", 8)]
    if rows <= SMALL_ROWS or not descriptors:
        return table["small"]
    return table["masked" if masked else "plain"]


def _operand(dtype: torch.dtype) -> tl.dtype:
    """What the matrix instructions are fed with. The interpreter multiplies bfloat16 as integers: it gets float32."""
    if INTERPRETED:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


@lru_cache
def _name(device: torch.device) -> str:
    return torch.get_device_module(device).get_device_name(device) if device.type != "cpu" else "cpu"


def _describable(tensor: Tensor) -> bool:
    return (
        tensor.stride(1) == 1
        and tensor.stride(0) >= tensor.size(1)  # one row of an expanded tensor has stride 0
        and tensor.data_ptr() % 16 == 0
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.numel() > 0
    )


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 and tensor.stride(0) >= tensor.size(1) else tensor.contiguous()


def product(a: Tensor, b: Tensor, *, turned: bool, bias: Tensor | None = None, relu: bool = False,
            hidden: Tensor | None = None, sums: bool = False) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """a (M, K) times b (K, N), or times the transpose of b (N, K) if ``turned``, with its epilogue.

    Parameters
    ----------
    bias, relu
        (N,), added to the float32 sums, and ReLU after it.
    hidden
        (M, N): where it is <= 0 the product becomes 0.
    sums
        Return also the column sums (N,) in float32, before rounding, in a fixed order.
    """
    a, b = _rows_contiguous(a), _rows_contiguous(b)
    rows, inner = a.shape
    columns = b.size(0) if turned else b.size(1)
    c = a.new_empty(rows, columns)
    descriptors = _describable(a) and _describable(b)
    column_sums = None

    def run(tile: tuning.Tile) -> None:
        nonlocal column_sums
        m, n, k, stages, warps = tile
        row_tiles, column_tiles = triton.cdiv(rows, m), triton.cdiv(columns, n)
        if sums:
            column_sums = a.new_empty(row_tiles, columns, dtype=torch.float32)
        left, right = a, b
        if descriptors:
            left = TensorDescriptor.from_tensor(a, [m, k])
            right = TensorDescriptor.from_tensor(b, [n, k] if turned else [k, n])
        launch(
            _matmul, (min(row_tiles * column_tiles, multiprocessors(a.device)),), a, left, right, c, bias, hidden,
            column_sums, rows, columns, inner, a.stride(0), b.stride(0), DESCRIPTORS=descriptors, B_TURNED=turned,
            BIAS=bias is not None, RELU=relu, MASK=hidden is not None, SUMS=sums, OPERAND=_operand(a.dtype), M=m, N=n,
            K=k, GROUP=GROUP_ROWS, num_stages=stages, num_warps=warps,
        )  # fmt: skip

    kind = ("turned " if turned else "") + ("masked " if hidden is not None else "") + ("tma" if descriptors else "")
    entry = tuning.key(_name(a.device), a.dtype, rows, columns, inner, kind)
    tile = tuning.tuned(entry)
    if tile is None and tuning.asked() and not INTERPRETED:
        tile = tuning.tune(entry, run, triton.testing.do_bench)
    run(tile or tiles(a.device, rows, descriptors, hidden is not None))
    return c, column_sums.sum(0) if sums else None
