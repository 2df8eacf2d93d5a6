"""Batches of text to tokens: those of the whole text, in its order, from one process or several."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data import encoding
from fastgpt.data.encoding import batches_of, encode, encoded
from fastgpt.tokenizer import BPETokenizer, CharTokenizer
from helpers import PANGRAM

BPE = BPETokenizer.train(PANGRAM, 270).with_end()


@given(st.lists(st.lists(st.text(alphabet="ab \nü", max_size=9), max_size=4), max_size=6), st.booleans())
def test_batches_are_the_documents(documents, with_ends) -> None:
    whole = ["".join(document) for document in documents]
    tokenizer = CharTokenizer("ab \nü\x03")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BATCH_CHARACTERS", 5)
        batches = list(batches_of(documents, with_ends))
    assert all(sum(len(text) for text, _ in batch) >= 5 for batch in batches[:-1])
    end = "\x03" if with_ends else ""
    text, ends, n = "", [], 0
    for batch in batches:
        tokens, its_ends, n_characters = encode(batch, tokenizer)
        ends += [len(text) + its_end for its_end in its_ends]
        text, n = text + tokenizer.decode(tokens), n + n_characters
    assert text == "".join(document + end for document in whole if document)
    assert n == sum(map(len, whole)) and (not ends or ends[-1] == len(text))
    assert [text[end - 1] for end in ends] == [end for document in whole if document and end]


def test_the_tokens_of_pieces_are_those_of_the_text(monkeypatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr("fastgpt.bpe._PIECE_CHARS", 20)
    text = PANGRAM + "zwölf\n\n  x = 1\n日本語 über\n" * 20
    pieces = [text[i : i + 7] for i in range(0, len(text), 7)]
    for tokenizer in (BPE, CharTokenizer.train(text)):
        found = list(encoded(batches_of([pieces], False), tokenizer, 1))
        assert len(found) > 3
        assert np.array_equal(np.concatenate([tokens for tokens, _, _ in found]), tokenizer.encode_array(text))


def test_large_vocabularies_take_uint32() -> None:
    chars = "".join(map(chr, range(0x10000, 0x21000)))
    tokens, _, _ = encode([(chars, False)], CharTokenizer(chars))
    assert tokens.dtype == np.uint32 and np.array_equal(tokens, np.arange(len(chars)))


def _end(batch):
    os.kill(os.getpid(), signal.SIGKILL)


def test_several_processes_keep_the_order_and_one_that_is_killed_is_told(monkeypatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 100)
    documents = [[PANGRAM[i:]] for i in range(0, 2000, 200)]
    one, two = (list(encoded(batches_of(documents, True), BPE, n)) for n in (1, 2))
    assert len(one) == len(two) >= 10
    assert all(np.array_equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(one, two, strict=True))
    monkeypatch.setattr(encoding, "_encode", _end)
    with pytest.raises(RuntimeError, match=r"ended from outside, .*: give fewer --processes; the same command goes on"):
        list(encoded(batches_of(documents, True), BPE, 2))
