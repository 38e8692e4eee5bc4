"""A byte-pair tokenizer made from a text.

Text is split into words with the space before them, words into UTF-8 bytes, and the most frequent neighbouring pair of
symbols is merged until the vocabulary is full (Sennrich et al., arXiv:1508.07909, over bytes as in GPT-2). Bytes are
in the vocabulary, so any text is encoded, and ``decode(encode(text)) == text``.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

# A word with one space before it, a number, other signs, or white space.
_SPLIT = re.compile(r" ?[^\W\d_]+| ?\d| ?[^\w\s]+|_+|\s+(?!\S)|\s", re.UNICODE)

Pair = tuple[int, int]


class Tokenizer:
    """Byte-pair encoding.

    Parameters
    ----------
    merges : iterable of pairs
        Pairs of ids in the order of merging: pair k makes id 256 + k.
    """

    def __init__(self, merges: Iterable[Pair] = ()) -> None:
        self.merges = [(int(a), int(b)) for a, b in merges]
        self._rank = {pair: 256 + k for k, pair in enumerate(self.merges)}
        self._bytes = [bytes([b]) for b in range(256)]
        for a, b in self.merges:
            self._bytes.append(self._bytes[a] + self._bytes[b])
        self._cache: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._bytes)

    @classmethod
    def train(cls, text: str, vocab_size: int = 4096) -> Tokenizer:
        """Learn merges from ``text`` until there are ``vocab_size`` ids, or no pair occurs twice.

        Raises
        ------
        ValueError
            ``vocab_size`` below 256, the number of bytes.
        """
        if vocab_size < 256:
            raise ValueError(f"Tokenizer.train: vocab_size must be at least 256 (the bytes), got {vocab_size}")
        counted = Counter(_SPLIT.findall(text))
        words = [list(word.encode()) for word in counted]
        counts = list(counted.values())
        pairs: Counter[Pair] = Counter()
        where: defaultdict[Pair, set[int]] = defaultdict(set)
        for i, word in enumerate(words):
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += counts[i]
                where[pair].add(i)
        merges: list[Pair] = []
        while len(merges) < vocab_size - 256 and pairs:
            # Ties go to the smaller pair: the result depends on the text alone.
            best = min(pairs, key=lambda p: (-pairs[p], p))
            if pairs[best] < 2:
                break
            merges.append(best)
            for i in where.pop(best):
                _change(words, counts, pairs, where, i, best, 255 + len(merges))
            pairs.pop(best, None)
        return cls(merges)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``."""
        ids: list[int] = []
        for word in _SPLIT.findall(text):
            known = self._cache.get(word)
            if known is None:
                known = self._cache[word] = self._encode_word(word)
            ids += known
        return ids

    def _encode_word(self, word: str) -> list[int]:
        ids = list(word.encode("utf-8", "surrogatepass"))
        while len(ids) > 1:
            # The earliest learnt merge first.
            pair = min(zip(ids, ids[1:], strict=False), key=lambda p: self._rank.get(p, self.vocab_size))
            if pair not in self._rank:
                break
            ids = _merged(ids, pair, self._rank[pair])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; bytes that are no UTF-8, which a sample may hold, become the replacement character.

        Raises
        ------
        IndexError
            An id outside ``[0, vocab_size)``.
        """
        parts = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise IndexError(f"Tokenizer.decode: ids must be in [0, {self.vocab_size}), got {i}")
            parts.append(self._bytes[i])
        data = b"".join(parts)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def save(self, path: str | Path) -> None:
        """Write the merges as JSON."""
        Path(path).write_text(json.dumps({"merges": self.merges}), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read what :meth:`save` wrote."""
        return cls(json.loads(Path(path).read_text(encoding="utf-8"))["merges"])


def _merged(ids: list[int], pair: Pair, new: int) -> list[int]:
    out: list[int] = []
    i = 0
    while i < len(ids):
        if i + 1 < len(ids) and ids[i] == pair[0] and ids[i + 1] == pair[1]:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def _change(words, counts, pairs, where, i: int, pair: Pair, new: int) -> None:
    """Merge ``pair`` in word i and bring the counts of pairs up to date."""
    old = words[i]
    changed = _merged(old, pair, new)
    for p in zip(old, old[1:], strict=False):
        pairs[p] -= counts[i]
        if pairs[p] <= 0:
            del pairs[p]
    for p in zip(changed, changed[1:], strict=False):
        pairs[p] += counts[i]
        where[p].add(i)
    words[i] = changed
