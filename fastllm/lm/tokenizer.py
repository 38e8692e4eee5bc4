"""Tokenizers by Hugging Face's ``tokenizers``, trained on the text: characters, words, or byte pairs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fastllm.lm.packages import need

KINDS = ("char", "word", "bpe")
UNKNOWN = "<unk>"

# A word or a number with the space before it, other signs, white space: joined, they are the text again.
_WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Merging takes longer than linearly in the length of a word, and a text without spaces is one word.
_LONG_WORD = r"\S{256}"
_BLOCK = 1 << 16  # characters encoded at a time
_BORDER = re.compile(r"(?<=\S)\n(?=\S)")  # where cutting a text changes none of its tokens


def _library():
    return need("tokenizers", "a tokenizer")


class Tokenizer:
    """A tokenizer whose ``decode(encode(text))`` is ``text``, if it knows all of the text's characters or words.

    Parameters
    ----------
    inner : tokenizers.Tokenizer
        The tokenizer of the library.
    """

    def __init__(self, inner) -> None:
        self.inner = inner

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.inner.get_vocab_size()

    @property
    def unknown_id(self) -> int | None:
        """The id of what the vocabulary lacks; None if it lacks nothing."""
        return self.inner.token_to_id(UNKNOWN)

    @classmethod
    def train(cls, text: str, kind: str = "bpe", vocab_size: int = 4096) -> Tokenizer:
        """Make a vocabulary from ``text``.

        Parameters
        ----------
        kind : str
            ``"char"``: every character of the text; ``vocab_size`` is not read. ``"word"``: the most frequent words,
            with the space before them. Both have an id for all else. ``"bpe"``: bytes, and merges of the most frequent
            neighbours (Sennrich et al., arXiv:1508.07909) until the vocabulary is full or no pair occurs twice.

        Raises
        ------
        ValueError
            Another kind, or a ``vocab_size`` below 2, below 256 for ``"bpe"``.
        """
        if kind not in KINDS:
            raise ValueError(f"tokenizer: the kind must be one of {', '.join(KINDS)}, got {kind!r}")
        least = {"char": 0, "word": 2, "bpe": 256}[kind]
        if vocab_size < least:
            raise ValueError(f"tokenizer: vocab_size must be at least {least} for {kind}, got {vocab_size}")
        return cls({"char": _characters, "word": _words, "bpe": _byte_pairs}[kind](_library(), text, vocab_size))

    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``, int32.

        Raises
        ------
        ValueError
            ``text`` holds surrogates, which are no characters.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not Unicode: character {error.start} is a surrogate") from None
        blocks = self.inner.encode_batch_fast(list(_blocks(text)), add_special_tokens=False)
        return np.concatenate([np.zeros(0, np.int32), *(np.asarray(block.ids, np.int32) for block in blocks)])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; bytes that are no UTF-8, which a sample may hold, become the replacement character.

        Raises
        ------
        IndexError
            An id outside ``[0, vocab_size)``.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise IndexError(f"Tokenizer.decode: ids must be in [0, {self.vocab_size}), got {i}")
        return self.inner.decode(ids, skip_special_tokens=False)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ``ids`` in pieces, each as soon as its characters are whole."""
        waiting: list[int] = []
        for i in ids:
            waiting.append(i)
            text = self.decode(waiting)
            # A character's bytes are at most four; what is still no character then is none.
            if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(waiting) >= 4:
                yield text
                waiting = []
        if waiting:
            yield self.decode(waiting)

    def to_json(self) -> str:
        """The tokenizer as the library saves it."""
        return self.inner.to_str()

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Read what :meth:`to_json` or ``tokenizers.Tokenizer.save`` wrote.

        Raises
        ------
        ValueError
            It is none.
        """
        try:
            return cls(_library().Tokenizer.from_str(text))
        except RuntimeError:
            raise  # the package is missing
        except Exception as error:
            raise ValueError(f"not a tokenizer of the package tokenizers: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a JSON file; errors as :meth:`from_json`, and OSError."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not a tokenizer of the package tokenizers") from None


def _blocks(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _BLOCK:
        border = _BORDER.search(text, start + _BLOCK)
        if border is None:
            break
        yield text[start : border.end()]
        start = border.end()
    yield text[start:]


def _pattern(library, text: str):
    return library.pre_tokenizers.Split(library.Regex(text), "isolated")


def _characters(library, text: str, vocab_size: int):
    vocabulary = {UNKNOWN: 0} | {character: 1 + k for k, character in enumerate(sorted(set(text)))}
    inner = library.Tokenizer(library.models.BPE(vocabulary, [], unk_token=UNKNOWN))
    inner.pre_tokenizer = _pattern(library, r"[\s\S]{1,64}")
    inner.decoder = library.decoders.Fuse()
    return inner


def _words(library, text: str, vocab_size: int):
    inner = library.Tokenizer(library.models.WordLevel({UNKNOWN: 0}, unk_token=UNKNOWN))
    inner.pre_tokenizer = _pattern(library, _WORDS)
    inner.decoder = library.decoders.Fuse()
    trainer = library.trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=[UNKNOWN], show_progress=False)
    inner.train_from_iterator(_blocks(text), trainer)
    return inner


def _byte_pairs(library, text: str, vocab_size: int):
    byte_level = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.Sequence([_pattern(library, _LONG_WORD), byte_level])
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False, initial_alphabet=byte_level.alphabet()
    )
    inner.train_from_iterator(_blocks(text), trainer)
    return inner
