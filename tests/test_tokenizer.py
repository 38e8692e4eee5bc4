"""Tokenizers, texts, token files, and the windows that are cut from them."""

import random

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")

from fastllm.lm import data
from fastllm.lm import tokenizer as tokenizer_module
from fastllm.lm.tokenizer import KINDS, Tokenizer, _blocks

TEXT = "the cat sat on the mat; the cat ate the rat. " * 30 + "Ünïcödé 日本語 🙂\n\t x_1 = 2**3\n"


def random_text(seed):
    source = random.Random(seed)
    alphabet = [chr(c) for c in (*range(0, 128), 0xE9, 0x3B1, 0x4E2D, 0x1F642, 0x200D, 0xFFFF, 0x10FFFF)]
    return "".join(source.choice(alphabet) for _ in range(source.randrange(200)))


@pytest.mark.parametrize("size", [256, 280, 400])
def test_byte_pairs_know_any_text(size):
    tokenizer = Tokenizer.train(TEXT, "bpe", size)
    assert tokenizer.vocab_size <= size and tokenizer.unknown_id is None
    for text in [TEXT, "", " ", "\n\n", "never seen before", "a" * 1000, *(random_text(s) for s in range(200))]:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["char", "word"])
def test_characters_and_words(kind):
    tokenizer = Tokenizer.train(TEXT, kind, 1000)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and tokenizer.unknown_id not in ids
    assert kind == "word" or len(ids) == len(TEXT)
    unknown = tokenizer.encode("the zebra")
    assert tokenizer.unknown_id in unknown and tokenizer.decode(unknown).startswith("the")


def test_a_small_vocabulary_keeps_the_most_frequent_words():
    tokenizer = Tokenizer.train(TEXT, "word", 3)
    assert tokenizer.vocab_size == 3 and tokenizer.decode(tokenizer.encode(" the cat")) == " the cat"


def test_merges_shorten():
    tokenizer = Tokenizer.train("ab ab ab ab cd cd", "bpe", 400)
    assert len(tokenizer.encode(" ab")) == 1 and len(tokenizer.encode("ab")) == 1
    assert len(Tokenizer.train(TEXT, "bpe", 400).encode(TEXT)) < len(TEXT) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_depends_on_the_text_alone(kind):
    first, second = (Tokenizer.train(TEXT, kind, 300).to_json() for _ in range(2))
    assert first == second
    assert np.array_equal(Tokenizer.from_json(first).encode(TEXT), Tokenizer.train(TEXT, kind, 300).encode(TEXT))


def test_one_long_word():
    word = "".join(random.Random(0).choices("abcdefghij", k=60_000))
    tokenizer = Tokenizer.train(word, "bpe", 300)
    assert tokenizer.decode(tokenizer.encode(word)) == word


def test_cutting_a_long_text_changes_no_token(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_BLOCK", 300)
    text = "".join(random.Random(0).choices(["word", " ", "\n", "\n\n", "x\ny", " \n", "é"], k=6000))
    assert len(list(_blocks(text))) > 20 and "".join(_blocks(text)) == text
    for kind in KINDS:
        tokenizer = Tokenizer.train(text, kind, 300)
        assert tokenizer.encode(text).tolist() == tokenizer.inner.encode(text).ids


def test_stream_is_the_text():
    tokenizer = Tokenizer.train("abc", "bpe", 256)  # each character of four bytes is four tokens
    pieces = list(tokenizer.stream(tokenizer.encode(TEXT)))
    assert "".join(pieces) == TEXT and "🙂" in pieces
    broken = tokenizer.encode("🙂").tolist()[:2]
    assert "".join(tokenizer.stream(broken)) == "\N{REPLACEMENT CHARACTER}"


def test_errors(tmp_path):
    for kind, size in (("bpe", 255), ("word", 1)):
        with pytest.raises(ValueError, match=f"vocab_size must be at least .* got {size}"):
            Tokenizer.train(TEXT, kind, size)
    with pytest.raises(ValueError, match="char, word, bpe, got 'syllable'"):
        Tokenizer.train(TEXT, "syllable")
    with pytest.raises(IndexError, match="999"):
        Tokenizer.train(TEXT, "bpe", 256).decode([999])
    with pytest.raises(ValueError, match="surrogate"):
        Tokenizer.train(TEXT, "bpe", 256).encode("a\udc80")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        Tokenizer.load(tmp_path / "t.json")


def test_default_text_is_english():
    text = data.default_text()
    assert len(text) > 300_000 and text.count(" the ") > 3000 and "**" not in text
    assert data.read_text([]) == text and len(data.digest([])) == 64


def test_texts_are_joined_without_marks(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone ")
    (tmp_path / "b").write_text("tw\N{LATIN SMALL LETTER O WITH DIAERESIS}", encoding="utf-8")
    assert data.read_text([tmp_path / "a", tmp_path / "b"]) == "one tw\N{LATIN SMALL LETTER O WITH DIAERESIS}"


def test_bad_files(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "wide").write_text("text", encoding="utf-16")
    (tmp_path / "wider").write_text("text", encoding="utf-32")
    (tmp_path / "folder").mkdir()
    messages = {"latin": "UTF-8", "empty": "no text", "absent": "No such file", "wide": "UTF-16", "wider": "UTF-32"}
    for name, message in {**messages, "folder": "directory"}.items():
        with pytest.raises(data.TextError, match=message):
            data.read_text([tmp_path / name])


@pytest.mark.parametrize(("magic", "version", "kind"), [(20240520, 1, np.uint16), (20240801, 7, np.uint32)])
def test_token_files(tmp_path, magic, version, kind):
    path = tmp_path / "t.bin"
    tokens = np.arange(1000, dtype=kind)
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())
    read = data.read_tokens(path)
    assert isinstance(read, np.memmap) and read.dtype == kind and np.array_equal(read, tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes()[:-4])
    with pytest.raises(data.TextError, match="1000 tokens"):
        data.read_tokens(path)


def test_token_files_without_a_header(tmp_path):
    tokens = np.arange(60_000, dtype=np.uint16)
    (tmp_path / "t.bin").write_bytes(tokens.tobytes())
    read = data.read_tokens(tmp_path / "t.bin")
    assert isinstance(read, np.memmap) and np.array_equal(read, tokens) and data.largest(read) == 59_999
    for content, message in ((b"", "no tokens"), (b"abc", "odd")):
        (tmp_path / "bad.bin").write_bytes(content)
        with pytest.raises(data.TextError, match=message):
            data.read_tokens(tmp_path / "bad.bin")
    with pytest.raises(data.TextError, match="No such file"):
        data.read_tokens(tmp_path / "absent")


def test_split_has_no_leak():
    train, test = data.split(1003)
    positions = [p for start, stop in (*train, *test) for p in range(start, stop)]
    assert sorted(positions) == list(range(1003))
    assert 0.03 < sum(stop - start for start, stop in test) / 1003 < 0.07
    assert data.split(1003, 0.0)[1] == []


def test_windows_stay_in_their_stretch():
    ids = np.arange(100)
    windows = data.Windows(ids, [(0, 10), (20, 24), (50, 57)], 5)
    drawn = windows.draw(2000, np.random.default_rng(0))
    assert set(drawn.tolist()) == {0, 1, 2, 3, 4, 50, 51} and len(windows) == 7
    x, y = windows.batch(drawn[:8])
    assert x.shape == (8, 5) and torch.equal(x + 1, y) and y[:, -1].tolist() == (drawn[:8] + 5).tolist()


def test_windows_in_order_predict_each_word_once():
    windows = data.Windows(np.arange(100), [(0, 14), (20, 24), (30, 41)], 5)
    batches = list(windows.in_order(2))
    assert all(torch.equal(x + 1, y) for x, y in batches)
    assert sorted(torch.cat([y.flatten() for _, y in batches]).tolist()) == [
        *range(1, 14),
        *range(21, 24),
        *range(31, 41),
    ]
    few = torch.cat([y for _, y in windows.in_order(2, limit=12)])
    assert few.shape == (2, 5)
    assert list(data.Windows(np.arange(100), [], 5).in_order(2)) == []
