"""A corpus: a text that is split, encoded and long enough."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fastgpt.data.corpus import Corpus
from fastgpt.data.sources import DataError
from fastgpt.tokenizer import BPETokenizer, CharTokenizer
from helpers import PANGRAM


def test_corpus_is_split_and_mapped(text_file) -> None:
    corpus = Corpus.load(text_file, "char", block_size=16)
    assert isinstance(corpus.train, np.memmap) and corpus.train.dtype == np.uint16
    assert len(corpus.train) == len(PANGRAM) * 9 // 10
    assert corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.val])) == PANGRAM
    with pytest.raises(ValueError, match="read-only"):
        corpus.train[0] = 1


def test_corpus_with_bpe(text_file) -> None:
    corpus = Corpus.load(str(text_file), "bpe", vocab_size=270, block_size=4)
    assert isinstance(corpus.tokenizer, BPETokenizer) and corpus.tokenizer.vocab_size == 270
    assert corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.val])) == PANGRAM
    with pytest.raises(ValueError, match="vocab_size"):
        Corpus.load(text_file, "bpe")
    with pytest.raises(ValueError, match="'word'"):
        Corpus.load(text_file, "word")


def test_large_vocabularies_take_uint32(text_file) -> None:
    everything = "".join(chr(i) for i in range(70_000) if not 0xD800 <= i < 0xE000) + "".join(
        map(chr, range(70_000, 73_000))
    )
    corpus = Corpus.load(text_file, CharTokenizer(everything))
    assert corpus.train.dtype == np.uint32


def test_too_short_texts(tmp_path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("ab" * 50)
    Corpus.load(file, block_size=9)
    for block_size, words in ((10, "val split of .*short.txt.* has 10 tokens"), (100, "short.txt.* has 100 tokens")):
        with pytest.raises(DataError, match=words) as error:
            Corpus.load(file, block_size=block_size)
        assert "smaller block_size" in str(error.value) and "\n" not in str(error.value)


def test_unknown_character_in_a_corpus(text_file) -> None:
    for layout in ("blocks", "names"):
        with pytest.raises(DataError, match=f"^{re.escape(repr(str(text_file)))}: character '.*' at position "):
            Corpus.load(text_file, CharTokenizer.train("abc\n"), layout=layout)


def test_the_fingerprint_is_that_of_the_data(tmp_path) -> None:
    def fingerprint(text: str, layout: str = "blocks") -> str:
        (tmp_path / "data").write_text(text, encoding="utf-8")
        return Corpus.load(tmp_path / "data", CharTokenizer("abc\n\x03"), block_size=6, layout=layout).fingerprint

    text = "abc\n" * 20
    assert fingerprint(text) == fingerprint(text) != fingerprint(text[:-2] + "b\n"), "the end counts, too"
    lines = ['{"prompt": "a", "completion": "bc"}', '{"prompt": "ab", "completion": "c"}']
    one, other = (fingerprint(f"{line}\n{line}\n", "completions") for line in lines)
    assert one != other, "where a prompt ends"
