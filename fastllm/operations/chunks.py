"""How many rows of logits are held at once where a loss or a statistic walks them in chunks (csrc/ops/chunks.h)."""

from __future__ import annotations

import os

WORKSPACE = 80 << 20  # bytes of logits held at once, unless FASTLLM_LOSS_WORKSPACE gives another number
GPU_WORKSPACE = 2 << 30  # those that linear_cross_entropy holds on a GPU
ROW_MULTIPLE = 64


def chunk_rows(rows: int, classes: int, item: int, size: int, beside: int = 0) -> int:
    """Rows of a chunk: even chunks, none of them much smaller than the others, of 64 rows at least.

    Parameters
    ----------
    item
        Bytes of a logit.
    size
        Most bytes of a chunk's logits, unless ``FASTLLM_LOSS_WORKSPACE`` gives another number.
    beside
        Bytes that several chunks need and one does not: chunks that save no memory are not taken.
    """
    text = os.environ.get("FASTLLM_LOSS_WORKSPACE")
    if text is not None:
        if not text.isdecimal() or int(text) == 0:
            raise ValueError(f"FASTLLM_LOSS_WORKSPACE: expected a number of bytes > 0, got {text!r}")
        size = int(text)
    row = max(classes * item, 1)
    most = max(size // row // ROW_MULTIPLE * ROW_MULTIPLE, ROW_MULTIPLE)
    if rows * row <= most * row + beside:
        return max(rows, 1)
    chunks = -(-rows // most)
    return -(-rows // (chunks * ROW_MULTIPLE)) * ROW_MULTIPLE
