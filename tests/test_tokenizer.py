"""The byte-pair tokenizer and the texts."""

import random

import pytest
import torch

from fastllm.lm import data
from fastllm.lm.tokenizer import Tokenizer

TEXT = "the cat sat on the mat; the cat ate the rat. " * 30 + "Ünïcödé 日本語 🙂\n\t x_1 = 2**3\n"


def random_text(seed):
    source = random.Random(seed)
    alphabet = [chr(c) for c in (*range(0, 128), 0xE9, 0x3B1, 0x4E2D, 0x1F642, 0x200D, 0xFFFF, 0x10FFFF)]
    return "".join(source.choice(alphabet) for _ in range(source.randrange(200)))


@pytest.mark.parametrize("size", [256, 280, 400])
def test_round_trip(size):
    tokenizer = Tokenizer.train(TEXT, size)
    for text in [TEXT, "", " ", "\n\n", "never seen before", *(random_text(s) for s in range(200))]:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text


def test_first_merges_are_the_most_frequent_pairs():
    tokenizer = Tokenizer.train("ab ab ab ab cd cd", 400)
    assert tokenizer.decode([256]) in ("ab", " a")
    assert len(tokenizer.encode(" ab")) == 1
    assert len(tokenizer.encode(TEXT)) < len(TEXT)


def test_counts_stay_exact():
    """Merging by updated counts gives what counting from scratch at each step gives."""
    from collections import Counter

    from fastllm.lm.tokenizer import _SPLIT, _merged

    words = Counter(_SPLIT.findall(TEXT))
    spelled = {w: list(w.encode()) for w in words}
    for k, merge in enumerate(Tokenizer.train(TEXT, 300).merges):
        pairs = Counter()
        for w, n in words.items():
            for pair in zip(spelled[w], spelled[w][1:], strict=False):
                pairs[pair] += n
        assert merge == min(pairs, key=lambda p: (-pairs[p], p))
        spelled = {w: _merged(s, merge, 256 + k) for w, s in spelled.items()}


def test_save_and_load(tmp_path):
    tokenizer = Tokenizer.train(TEXT, 300)
    tokenizer.save(tmp_path / "t.json")
    again = Tokenizer.load(tmp_path / "t.json")
    assert again.merges == tokenizer.merges and again.encode(TEXT) == tokenizer.encode(TEXT)


def test_errors():
    with pytest.raises(ValueError, match="vocab_size"):
        Tokenizer.train(TEXT, 255)
    with pytest.raises(IndexError, match="999"):
        Tokenizer().decode([999])
    assert Tokenizer().decode([0xFF]) == "\ufffd"


def test_default_text_is_english():
    text = data.default_text()
    assert len(text) > 300_000 and text.count(" the ") > 3000 and "**" not in text


def test_bad_files(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_text(" \n")
    for name, message in (("latin", "UTF-8"), ("empty", "no text"), ("absent", "No such file")):
        with pytest.raises(data.TextError, match=message):
            data.read_text(tmp_path / name)


def test_split_has_no_leak():
    ids = torch.arange(1003)
    train, test = data.split_ids(ids)
    assert sorted([*train.tolist(), *test.tolist()]) == ids.tolist()
    assert 0.03 < len(test) / len(ids) < 0.07
    x, y = data.random_batch(ids, 8, 5, torch.Generator().manual_seed(0))
    assert x.shape == (8, 5) and torch.equal(x + 1, y)
