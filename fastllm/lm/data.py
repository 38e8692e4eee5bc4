"""Text to train on, and batches of it."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor


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


def read_text(path: str | Path | None) -> str:
    """The UTF-8 text of a file, or the default text for None.

    Raises
    ------
    TextError
        No such file, not UTF-8, or nothing in it.
    """
    if path is None:
        return default_text()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise TextError(f"{path} holds no text")
    return text


def split_ids(ids: Tensor, held_out: float = 0.05, blocks: int = 20) -> tuple[Tensor, Tensor]:
    """Cut ids into a part to train on and one to test on.

    The text is cut into ``blocks`` stretches and the end of each is held out, so that both parts see every region of a
    text whose subject drifts; no position is in both.
    """
    train, test = [], []
    for stretch in ids.tensor_split(blocks):
        kept = len(stretch) - max(1, round(len(stretch) * held_out))
        train.append(stretch[:kept])
        test.append(stretch[kept:])
    return torch.cat(train), torch.cat(test)


def random_batch(ids: Tensor, batch_size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``(batch_size, length)`` words at random places, and the words that follow them."""
    starts = torch.randint(0, len(ids) - length, (batch_size, 1), generator=generator)
    positions = starts + torch.arange(length)
    return ids[positions], ids[positions + 1]
