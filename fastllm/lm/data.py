"""Text or token files to train on, and batches of them."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Stretch = tuple[int, int]  # the positions from the first up to the second, which is not in it

# llm.c's files begin with 256 int32, of which these are the first two and tell the type of a token.
_LLM_C = {(20240520, 1): np.uint16, (20240801, 7): np.uint32}
_HEADER = 256 * 4
_MARKS = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class TextError(ValueError):
    """A text that cannot be trained on; the message says why."""


def default_text() -> str:
    """Python's own reference (``pydoc_data.topics``, several hundred kB of English), without its mark-up."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    text = re.sub(r"^[*=~\-^\"#]{3,}$", "", text, flags=re.MULTILINE)  # rules under headings
    text = re.sub(r"\*\*|``|\"\"", "", text)
    text = re.sub(r"^[ \t]+", "", text, flags=re.MULTILINE)
    text = re.sub(r"[ \t]+", " ", text)
    # Lines of a paragraph belong together.
    text = re.sub(r"(?<=[^\n])\n(?=[^\n])", " ", text)
    return re.sub(r"\n{2,}", "\n", text).strip() + "\n"


def read_text(paths: Sequence[str | Path]) -> str:
    """The UTF-8 texts of the files one after another, without byte-order marks; the default text for none.

    Raises
    ------
    TextError
        A file that cannot be read, that is not UTF-8, or with nothing in it.
    """
    return "".join(_read(path) for path in paths) if paths else default_text()


def _read(path: str | Path) -> str:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise TextError(f"{path} is {encoding} text; it must be UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise TextError(f"{path} holds no text")
    return text


def read_tokens(path: str | Path) -> np.ndarray:
    """The tokens of a file, mapped into memory: uint16 without a header, as nanoGPT writes them, or llm.c's layout.

    Raises
    ------
    TextError
        A file that cannot be read, or of another layout.
    """
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(_HEADER), np.uint8)
        if len(header) < 2:
            raise TextError(f"{path} holds no tokens")
        if len(header) == _HEADER:
            magic, version, count = (int(number) for number in header.view(np.int32)[:3])
            kind = _LLM_C.get((magic, version))
            if kind is not None:
                if size != _HEADER + count * np.dtype(kind).itemsize:
                    raise TextError(f"{path} is cut off: its header tells of {count} tokens")
                return np.memmap(path, kind, "r", _HEADER)
        if size % 2:
            raise TextError(f"{path} is no file of uint16 tokens: its size, {size} bytes, is odd")
        return np.memmap(path, np.uint16, "r")
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error


def largest(ids: np.ndarray) -> int:
    """The largest id, read piece by piece."""
    piece = 1 << 24
    return max(int(ids[k : k + piece].max()) for k in range(0, len(ids), piece))


def digest(paths: Sequence[str | Path]) -> str:
    """SHA-256 of the files' bytes, or of the default text."""
    whole = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                while piece := file.read(1 << 20):
                    whole.update(piece)
        except OSError as error:
            raise TextError(f"cannot read {path}: {error.strerror}") from error
    if not paths:
        whole.update(default_text().encode())
    return whole.hexdigest()


def split(count: int, held_out: float = 0.05, blocks: int = 20) -> tuple[list[Stretch], list[Stretch]]:
    """Cut positions into stretches to train on and stretches to test on.

    The text is cut into ``blocks`` stretches and the end of each is held out, so that both parts see every region of a
    text whose subject drifts; no position is in both.
    """
    train, test = [], []
    borders = [count * k // blocks for k in range(blocks + 1)]
    for start, stop in itertools.pairwise(borders):
        middle = stop - (max(1, round((stop - start) * held_out)) if held_out > 0 else 0)
        train.append((start, middle))
        test.append((middle, stop))
    return train, test if held_out > 0 else []


class Windows:
    """Sequences of ``length`` words, each with the word after it, inside stretches of ``ids``; nothing is copied before
    a batch is made, so that ``ids`` may be a mapped file.

    Parameters
    ----------
    ids : numpy.ndarray
        ``(n,)`` integers.
    """

    def __init__(self, ids: np.ndarray, stretches: Sequence[Stretch], length: int) -> None:
        self.ids, self.length = ids, length
        self.stretches = [(start, stop) for start, stop in stretches if stop - start > 1]
        # Places at which a window may start, counted through.
        self._counts = np.array([max(0, stop - start - length) for start, stop in self.stretches], np.int64)
        self._ends = self._counts.cumsum()

    @property
    def words(self) -> int:
        return sum(stop - start for start, stop in self.stretches)

    def __len__(self) -> int:
        """The number of different windows."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def draw(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Places at which ``count`` random windows start."""
        drawn = random.integers(0, len(self), count)
        stretch = np.searchsorted(self._ends, drawn, side="right")
        before = self._ends[stretch] - self._counts[stretch]
        return np.array([start for start, _ in self.stretches], np.int64)[stretch] + drawn - before

    def batch(self, starts: np.ndarray, length: int | None = None) -> tuple[Tensor, Tensor]:
        """``(B, length)`` words from the places ``starts`` on, and the words that follow them."""
        length = self.length if length is None else length
        if len(starts) == 0:
            return torch.zeros(0, length, dtype=torch.int64), torch.zeros(0, length, dtype=torch.int64)
        rows = torch.from_numpy(np.stack([self.ids[start : start + length + 1] for start in starts]).astype(np.int64))
        return rows[:, :-1], rows[:, 1:]

    def in_order(self, batch_size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches in which each word but the first of its stretch is predicted once; with ``limit``, of at most so many
        words, evenly spread."""
        starts = [np.arange(start, stop - self.length, self.length) for start, stop in self.stretches]
        whole = np.concatenate([np.zeros(0, np.int64), *starts])
        thinned = limit is not None and len(whole) * self.length > limit
        if thinned:
            count = max(1, limit // self.length)
            whole = whole[np.arange(count) * len(whole) // count]
        for k in range(0, len(whole), batch_size):
            yield self.batch(whole[k : k + batch_size])
        for start, stop in [] if thinned else self.stretches:
            rest = (stop - start - 1) % self.length
            if rest:
                yield self.batch(np.array([stop - rest - 1]), rest)
