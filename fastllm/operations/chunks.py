"""How many rows of logits are held at once where a loss or a statistic walks them in chunks."""

from __future__ import annotations

import os

CHUNK_ROWS = 4096
ROW_MULTIPLE = 64


def rows_within(size: int, classes: int, item: int) -> int:
    """Rows whose logits take at most ``size`` bytes: a multiple of 64, and at least 64."""
    return max(size // max(classes * item, 1) // ROW_MULTIPLE * ROW_MULTIPLE, ROW_MULTIPLE)


def chunk_rows(rows: int, classes: int, item: int, most: int = CHUNK_ROWS) -> int:
    """Rows of a chunk: even chunks, none of them much smaller than the others.

    ``most`` is the limit unless ``FASTLLM_LOSS_WORKSPACE`` gives one in bytes, for items of ``item`` bytes.
    """
    text = os.environ.get("FASTLLM_LOSS_WORKSPACE")
    if text is not None:
        if not text.isdecimal() or int(text) == 0:
            raise ValueError(f"FASTLLM_LOSS_WORKSPACE: expected a number of bytes > 0, got {text!r}")
        most = rows_within(int(text), classes, item)
    if rows <= most:
        return max(rows, 1)
    chunks = -(-rows // most)
    return -(-rows // (chunks * ROW_MULTIPLE)) * ROW_MULTIPLE
