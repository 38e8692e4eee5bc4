"""Tiles chosen by timing them, for those who ask: ``FASTLLM_AUTOTUNE=1``.

The first product of a shape then runs each candidate, which takes seconds, and the fastest is written to a table in the
user's cache: ``$XDG_CACHE_HOME/fastllm/tiles.json`` (``~/.cache`` unless set). The table is read whether or not the
variable is set; without an entry, the tiles shipped in ``gemm.TILES`` are taken and nothing is timed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import triton

Tile = tuple[int, int, int, int, int]
# Tiles (M, N, K), stages and warps that are tried; those that a GPU's shared memory or registers cannot hold drop out.
CANDIDATES: tuple[Tile, ...] = (
    (128, 256, 64, 3, 8),
    (128, 256, 64, 4, 8),
    (256, 128, 64, 3, 8),
    (128, 128, 64, 4, 8),
    (128, 128, 64, 3, 4),
    (128, 128, 32, 4, 8),
    (64, 256, 64, 4, 8),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 64, 32, 3, 4),
)


def table_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastllm" / "tiles.json"


@lru_cache
def _table() -> dict[str, list[int]]:
    try:
        return json.loads(table_file().read_text())
    except (OSError, ValueError):  # none yet, or not one of ours
        return {}


def _save(table: dict[str, list[int]]) -> None:
    """Whole or not at all, though several processes may write."""
    file = table_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
        json.dump(table, new, indent=1, sort_keys=True)
    os.replace(new.name, file)


def key(device: str, dtype: torch.dtype, rows: int, columns: int, inner: int, kind: str) -> str:
    """What an entry is for; rows by powers of two, so that a batch of another length needs no new one."""
    bucket = triton.next_power_of_2(max(rows, 16))
    return f"{device} | triton {triton.__version__} | {dtype} | {bucket} x {columns} x {inner} | {kind}"


def tuned(entry: str) -> Tile | None:
    """The table's choice for an entry, or None."""
    found = _table().get(entry)
    return tuple(found) if found else None


def tune(entry: str, run: Callable[[Tile], object], measure: Callable[[Callable], float]) -> Tile | None:
    """Time every candidate, write the fastest to the table and return it; None where none of them runs."""
    times = {}
    for tile in CANDIDATES:
        try:
            times[tile] = measure(lambda tile=tile: run(tile))
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
            continue
    if not times:
        return None
    best = min(times, key=times.get)
    _table()[entry] = list(best)
    _save(_table())
    return best


def asked() -> bool:
    """Whether tiles may be timed now: asked for, and no CUDA graph is being captured."""
    return os.environ.get("FASTLLM_AUTOTUNE") == "1" and not (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )
