"""The cache of tokens and tokenizers: what it holds is reused, checked, and never mistaken for another."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest

from fastgpt.data.corpus import Corpus
from fastgpt.files import cache_dir
from fastgpt.tokenizer import BPETokenizer, CharTokenizer
from helpers import PANGRAM


def test_cache_folder(monkeypatch, tmp_path) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("FASTGPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "fastgpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "fastgpt"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # its specification: ignored
    assert cache_dir() == tmp_path / ".cache" / "fastgpt"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/xdg")
    assert cache_dir() == tmp_path / "xdg" / "fastgpt"
    monkeypatch.setenv("FASTGPT_CACHE", "~/own")
    assert cache_dir() == tmp_path / "own"


def test_cache_is_reused(text_file, cache, monkeypatch) -> None:
    first = Corpus.load(text_file)
    monkeypatch.setattr(CharTokenizer, "encode_array", lambda *_: pytest.fail("encoded again"))
    again = Corpus.load(text_file, first.tokenizer)
    assert np.array_equal(first.train, again.train) and np.array_equal(first.val, again.val)
    assert len(list(cache.iterdir())) == 1


def test_cache_knows_text_and_tokenizer(text_file, cache) -> None:
    Corpus.load(text_file)
    Corpus.load(text_file, CharTokenizer.train(PANGRAM + "!"))
    text_file.write_text(PANGRAM.replace("quick", "slick"))
    corpus = Corpus.load(text_file, CharTokenizer.train(PANGRAM))
    assert corpus.tokenizer.decode(corpus.train[:9]) == "the slick"
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize(
    "damage",
    [lambda raw: b"", lambda raw: raw[:100], lambda raw: raw[:-1], lambda raw: raw[:500] + b"\xff" + raw[501:],
     lambda raw: b"x" * 32, lambda raw: b"not an array" + raw],
)  # fmt: skip
def test_damaged_cache_is_rebuilt(text_file, cache, damage) -> None:
    Corpus.load(text_file)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    corpus = Corpus.load(text_file)
    assert corpus.tokenizer.decode(corpus.train) + corpus.tokenizer.decode(corpus.val) == PANGRAM
    del corpus
    assert file.read_bytes() == good


def test_unwritable_cache_falls_back_to_memory(text_file, cache) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="tokens stay in memory.*FASTGPT_CACHE"):
        corpus = Corpus.load(text_file)
    assert corpus.tokenizer.decode(corpus.val) == PANGRAM[len(corpus.train) :]
    assert not corpus.train.flags.writeable


def test_no_home_folder_is_like_no_cache(text_file, tmp_path, monkeypatch) -> None:
    """dottxt-ai/outlines#1425: in a container whose user has no home folder the cache could not be made."""
    for name in ("FASTGPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", os.fspath)  # as without HOME and without a user of this number
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="home folder '~' is not known.*tokens stay in memory.*FASTGPT_CACHE"):
        corpus = Corpus.load(text_file)
    assert corpus.tokenizer.decode(corpus.val) == PANGRAM[len(corpus.train) :]
    assert not (tmp_path / "~").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs a umask")
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_cached_files_have_the_mode_that_the_umask_gives(text_file, cache, umask) -> None:
    """astral-sh/ruff#24786: cached files that only their owner reads cannot be shared by a group."""
    before = os.umask(umask)
    try:
        Corpus.load(text_file, "bpe", vocab_size=260)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in cache.iterdir()} == {0o666 & ~umask}


def untrainable(monkeypatch) -> None:
    monkeypatch.setattr(BPETokenizer, "train", lambda *_: pytest.fail("trained again"))


def test_a_trained_tokenizer_is_kept(text_file, cache, monkeypatch) -> None:
    first = Corpus.load(text_file, "bpe", vocab_size=270)
    assert sorted(file.name.partition("-")[0] for file in cache.iterdir()) == ["bpe", "tokens"]
    untrainable(monkeypatch)
    again = Corpus.load(text_file, "bpe", vocab_size=np.int64(270))
    assert again.tokenizer.to_json() == first.tokenizer.to_json()
    assert np.array_equal(first.train, again.train)


@pytest.mark.parametrize("what", ["text", "vocab_size", "training_version"])
def test_a_kept_tokenizer_is_taken_for_no_other(text_file, monkeypatch, what) -> None:
    Corpus.load(text_file, "bpe", vocab_size=270)
    if what == "text":
        text_file.write_text(PANGRAM.replace("quick", "slick"), encoding="utf-8")
    if what == "training_version":
        monkeypatch.setattr(BPETokenizer, "training_version", -1)
    untrainable(monkeypatch)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        Corpus.load(text_file, "bpe", vocab_size=271 if what == "vocab_size" else 270)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:-1],
        lambda raw: raw.replace(b"[", b"[ ", 1),
        lambda raw: b"\xff" + raw,
        lambda raw: raw[raw.index(b"\n") + 1 :],
        lambda raw: sealed(b"{}"),
        lambda raw: sealed(b'{"kind": "char", "chars": "a"}'),
    ],
)
def test_a_damaged_tokenizer_is_trained_again(text_file, cache, damage) -> None:
    good = Corpus.load(text_file, "bpe", vocab_size=270).tokenizer.to_json()
    (file,) = cache.glob("bpe-*")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert Corpus.load(text_file, "bpe", vocab_size=270).tokenizer.to_json() == good
    assert file.read_bytes() == whole


def sealed(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def test_a_tokenizer_that_cannot_be_kept(text_file, cache) -> None:
    cache.write_text("a file where the folder should be", encoding="utf-8")
    with pytest.warns(UserWarning, match="the tok.*FASTGPT_CACHE") as said:
        corpus = Corpus.load(text_file, "bpe", vocab_size=270)
    consequences = [str(warning.message).split("): ")[1].split(";")[0] for warning in said]
    assert consequences == ["the tokenizer is trained again next time", "the tokens stay in memory"]
    assert corpus.tokenizer.decode(corpus.val) == PANGRAM[-len(corpus.tokenizer.decode(corpus.val)) :]


def test_failed_write_leaves_nothing_behind(text_file, cache, monkeypatch) -> None:
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        Corpus.load(text_file)
    assert list(cache.iterdir()) == []
