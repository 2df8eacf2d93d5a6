"""How text is cut for BPE changes no token, and training takes bounded memory for a text of any size."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import bpe, tokenizer
from fastgpt.tokenizer import BPETokenizer
from helpers import PANGRAM

TRAINED = BPETokenizer.train(PANGRAM + "We're all résumés — 日本語 🎉🎉! It's 1623.\n\n  x_1 = 'über'\n" * 3, 320)
PARTS = ["a", "b", "'s", "'", " ", "\n", "\n\n", "\t", "\x1c", "\x85", "\u3000", ".", "_", "7", "é", "日", "。", "🎉"]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PARTS), max_size=40), st.lists(st.integers(0, 60), max_size=6).map(sorted))
def test_no_cut_changes_a_token_and_all_cuts_follow_from_the_text(parts, places) -> None:
    text = "".join(parts)
    given_texts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "_PIECE_CHARS", 2)
        patch.setattr(tokenizer, "_PIECES_PER_CALL", 2)
        pieces = list(bpe.cut(given_texts))
        assert pieces == list(bpe.cut([text]))
        assert "".join(pieces) == text and all(pieces)
        assert TRAINED.encode(text) == TRAINED._encoder.encode(text).ids
        assert not any(re.search(r"\S\S [^\s]", piece[1:-1]) for piece in pieces)


@pytest.mark.parametrize(
    "text", ["to be or not\n" * 10_000, "if(a)b();" * 10_000, "日本語です。" * 10_000, "ACGT" * 40_000]
)
def test_the_pieces_of_long_texts_are_short(text) -> None:
    lengths = [len(piece) for piece in bpe.cut([text])]
    assert max(lengths) <= (1 << 16 if text.startswith("ACGT") else (1 << 14) + 9)
    assert min(lengths[:-1]) >= 1 << 14
    assert TRAINED.decode(TRAINED.encode(text)) == text


def test_a_text_without_a_place_to_cut_is_cut_all_the_same(monkeypatch) -> None:
    monkeypatch.setattr(bpe, "_PIECE_CHARS", 4)
    monkeypatch.setattr(bpe, "_LONGEST_PIECE_CHARS", 10)
    for texts in (["abcdefg"] * 3 + ["h i"], ["abcdefg" * 3 + "h i"]):
        assert list(bpe.cut(texts)) == ["abcdefgabc", "defgabcdef", "gh i"]


def test_a_sample_is_spread_evenly_and_keeps_its_bounds(monkeypatch) -> None:
    pieces = [f"piece {i:03}" for i in range(100)]
    every = lambda step: [piece.encode() for piece in pieces[::step]]  # noqa: E731
    assert bpe.sample(pieces) == every(1)
    monkeypatch.setattr(bpe, "_SAMPLE_BYTES", 400)  # 9 bytes a piece: at most 44 of them
    assert bpe.sample(pieces) == every(4)
    assert bpe.sample(iter(pieces[:45])) == every(1)[:45:2]
    assert bpe.sample(pieces[:44]) == every(1)[:44]
    monkeypatch.setattr(bpe, "_SAMPLE_WORD_BYTES", 5 + 4 * 12)  # "piece", and " 001" of each
    assert bpe.sample(pieces) == every(16)
    assert bpe.sample(["piece 001"] * 44) == [b"piece 001"] * 44
    monkeypatch.setattr(bpe, "_SAMPLE_WORD_BYTES", 1)
    assert bpe.sample(pieces) == every(128)


def test_training_sees_the_sample_alone(monkeypatch) -> None:
    monkeypatch.setattr(bpe, "_PIECE_CHARS", 1)
    text = "".join(f" {word}" for word in ["even", "odd"] * 50)
    whole = BPETokenizer.train(text, 300)
    assert {b" even", b" odd"} <= {whole.token_bytes(i) for i in range(256, whole.vocab_size)}
    monkeypatch.setattr(bpe, "_SAMPLE_BYTES", 300)
    half = BPETokenizer.train(text, 300)
    learned = {half.token_bytes(i) for i in range(256, half.vocab_size)}
    assert b" even" in learned and b" odd" not in learned
    assert half.decode(half.encode(text)) == text


@pytest.mark.parametrize("text", ["a" * 20_000, "日本" * 5_000, " " * 20_000, "ab\n\n" + "\n" * 20_000, "07" * 10_000])
def test_training_on_a_text_without_blanks_sees_it_in_parts(text: str) -> None:
    """huggingface/tokenizers#1395, huggingface/tokenizers#1313: on Chinese and on DNA training never ended."""
    parts = [part for part, _ in bpe.training_pre_tokenizer().pre_tokenize_str(text)]
    assert max(map(len, parts)) == bpe.LONGEST_PRE_TOKEN
    assert b"".join(map(bpe.spelled_bytes, parts)).decode() == text
    trained = BPETokenizer.train(text, 300)
    assert max(len(trained.token_bytes(i)) for i in range(trained.vocab_size)) <= bpe.LONGEST_PRE_TOKEN
    assert trained.decode(trained.encode(text)) == text
    assert TRAINED.decode(TRAINED.encode(text)) == text


def test_the_parts_change_nothing_where_no_pre_token_is_long(monkeypatch) -> None:
    from tokenizers import pre_tokenizers

    text = PANGRAM * 3
    in_parts = BPETokenizer.train(text, 320).to_json()
    monkeypatch.setattr(bpe, "training_pre_tokenizer", lambda: pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert BPETokenizer.train(text, 320).to_json() == in_parts
