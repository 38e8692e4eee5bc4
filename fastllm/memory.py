"""The pool of reused memory blocks behind large CPU results.

PyTorch's CPU allocator gives every large block back to the system, and the next one faults in page by page, which takes
longer than writing it. fastllm's CPU operations take results and gradients of 512 KiB and more from blocks that earlier
tensors freed. At most ``get_pool_limit()`` bytes are kept idle (an eighth of the machine's memory and at most 4 GiB,
unless the environment variable ``FASTLLM_POOL_LIMIT`` gives a number of bytes; 0 turns the pool off).
"""

from __future__ import annotations

from fastllm import _native


def _extension():
    if _native.extension is None:
        raise RuntimeError(f"fastllm.memory: {_native.MISSING}; {_native.REMEDY}")
    return _native.extension


def get_pool_limit() -> int:
    """Most bytes that the pool keeps idle."""
    return _extension().pool_limit()


def set_pool_limit(bytes: int) -> None:
    """Keep at most ``bytes`` idle from now on; 0 turns the pool off. Blocks above the limit are freed at once."""
    _extension().set_pool_limit(bytes)


def pool_stats() -> dict[str, int]:
    """Bytes ``idle``, ``in_use`` and ``limit``; requests that the pool (``hits``) or the system (``misses``) served."""
    return _extension().pool_stats()


def empty_pool() -> None:
    """Return every idle block to the system."""
    _extension().pool_clear()
