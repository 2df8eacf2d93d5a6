"""Tokenizers: nothing is lost, everything is named, and a cut or a stream changes no token."""

from __future__ import annotations

import codecs
import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.tokenizer import BPETokenizer, CharTokenizer, StreamDecoder, label, tokenizer_from_json

SAMPLE = "First Citizen:\nWe're all résumés, naïve — 日本語 🎉🎉!\n\n  Speak, speak. It's 1623.\n" * 20


@functools.cache
def bpe() -> BPETokenizer:
    return BPETokenizer.train(SAMPLE, 320)


@given(st.text(min_size=1))
def test_char_round_trip(text: str) -> None:
    tokenizer = CharTokenizer.train(text)
    ids = tokenizer.encode(text)
    assert tokenizer.chars == "".join(sorted(set(text)))
    assert ids == [tokenizer.chars.index(c) for c in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer_from_json(tokenizer.to_json()).to_json() == tokenizer.to_json()


@given(st.text())
def test_bpe_round_trip(text: str) -> None:
    ids = bpe().encode(text)
    assert bpe().decode(ids) == text
    assert b"".join(map(bpe().token_bytes, ids)) == text.encode()


@given(st.lists(st.integers(0, 300)))
def test_stream_gives_what_decode_gives(ids: list[int]) -> None:
    ids = [i % bpe().vocab_size for i in ids]
    stream = StreamDecoder(bpe())
    assert "".join([*map(stream.push, ids), stream.flush()]) == bpe().decode(ids)


def test_stream_holds_back_half_a_character() -> None:
    tokenizer = BPETokenizer.train("plain", 256)
    ids = tokenizer.encode("a🎉b")
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in ids] == ["a", "", "", "", "🎉", "b"]
    assert stream.flush() == ""
    assert stream.push(torch.tensor(ids[1])) == ""
    assert stream.flush() == "�"
    assert stream.push(ids[0]) == "a"


def test_stream_of_characters() -> None:
    tokenizer = CharTokenizer.train("añ🎉")
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, tokenizer.encode("🎉ña"))) == "🎉ña"


@pytest.mark.parametrize(("text", "position"), [("abz", 2), ("a🎉", 1), ("\x00", 0), ("ab\ud800", 2), ("ac", 1)])
def test_unknown_character(text: str, position: int) -> None:
    with pytest.raises(ValueError, match=f"at position {position} .*train the tokenizer") as error:
        CharTokenizer.train("abd").encode(text)
    assert repr(text[position]) in str(error.value)
    assert "\n" not in str(error.value)


def test_surrogates_are_refused() -> None:
    for call in (CharTokenizer.train, bpe().encode, lambda t: BPETokenizer.train(t, 300)):
        with pytest.raises(ValueError, match="surrogate"):
            call("a\udc80")


@pytest.mark.parametrize("make", [lambda: CharTokenizer.train("abc"), bpe])
def test_ids_of_every_sort(make) -> None:
    tokenizer = make()
    ids = tokenizer.encode("cab")
    assert isinstance(ids, list) and all(type(i) is int for i in ids)
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == "" and tokenizer.decode(torch.empty(0)) == ""
    sorts = (
        ids,
        tuple(ids),
        np.array(ids, np.uint16),
        torch.tensor(ids),
        torch.tensor(ids).int(),
        list(torch.tensor(ids)),
    )
    for sort in sorts:
        assert tokenizer.decode(sort) == "cab"


@pytest.mark.parametrize("make", [lambda: CharTokenizer.train("abc"), bpe])
def test_bad_ids_are_named(make) -> None:
    tokenizer = make()
    for bad in (-1, tokenizer.vocab_size, 2**63, 2**70):
        with pytest.raises(ValueError, match=f"token id {bad} at position 1 "):
            tokenizer.decode([0, bad])
        with pytest.raises(ValueError, match=f"token id {bad} "):
            StreamDecoder(tokenizer).push(bad)
    with pytest.raises(ValueError, match=r"shape \(1, 2\); decode one row"):
        tokenizer.decode(torch.zeros(1, 2, dtype=torch.int64))
    for bad in ([0.5], [True], ["a"], [None], torch.ones(2)):
        with pytest.raises(ValueError, match="expected integers"):
            tokenizer.decode(bad)


def test_training_is_repeatable_and_reaches_the_size() -> None:
    assert bpe().vocab_size == 320
    again = BPETokenizer.train(SAMPLE, 320)
    assert again.to_json() == bpe().to_json() and again.fingerprint() == bpe().fingerprint()
    assert BPETokenizer.train(SAMPLE, 300).fingerprint() != bpe().fingerprint()
    assert BPETokenizer.train("ab", 1000).vocab_size == 256


def test_a_vocab_size_of_another_library() -> None:
    assert BPETokenizer.train(SAMPLE, np.int64(320)).to_json() == bpe().to_json()


@pytest.mark.parametrize("size", [255, 0, True, 300.0, "300", None])
def test_bpe_needs_the_bytes(size) -> None:
    with pytest.raises(ValueError, match="at least 256"):
        BPETokenizer.train("text", size)


def test_empty_training_text() -> None:
    with pytest.raises(ValueError, match="empty text"):
        CharTokenizer.train("")
    with pytest.raises(ValueError, match="empty text"):
        BPETokenizer.train("", 300)


def test_json_round_trip_and_fingerprints() -> None:
    for tokenizer in (CharTokenizer.train(SAMPLE), bpe()):
        copy = tokenizer_from_json(tokenizer.to_json())
        assert type(copy) is type(tokenizer) and copy.fingerprint() == tokenizer.fingerprint()
        assert copy.encode(SAMPLE) == tokenizer.encode(SAMPLE)
        assert json.loads(tokenizer.to_json())["kind"] == tokenizer.kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "kind is None"),
        ('{"kind": "word"}', "kind is 'word'"),
        ('{"kind": "char"}', "'chars' is missing"),
        ('{"kind": "char", "chars": "aa"}', "only once"),
        ('{"kind": "bpe", "vocab": ["a"], "merges": [], "special_tokens": {}}', "255 of the 256"),
        ('{"kind": "bpe", "vocab": [], "merges": [["a"]], "special_tokens": {}}', "merge 0"),
        ('{"kind": "bpe", "vocab": [], "merges": [["a", 1]], "special_tokens": {}}', "merge 0"),
        ('{"kind": "bpe", "vocab": [], "merges": 1, "special_tokens": {}}', "merges: expected a list, got int"),
        ('{"kind": "bpe", "vocab": [1], "merges": [], "special_tokens": {}}', "vocab: expected a list of texts"),
        (
            '{"kind": "bpe", "vocab": ["a"], "merges": [], "special_tokens": {"a": 1}}',
            "special_tokens: 'a' has the id 1",
        ),
        ('{"kind": "bpe", "vocab": ["a"], "merges": [], "special_tokens": 1}', "a field has another type"),
        ('{"kind": "char", "chars": ["a"]}', "chars: expected a text of all characters, got list"),
        pytest.param("[" * 100_000, "not JSON", id="deep"),
    ],
)
def test_bad_json(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_from_json(text)


def write_gpt2_files(folder, tokenizer: BPETokenizer) -> None:
    vocab = {token: i for i, token in enumerate([*tokenizer.vocab, "<|endoftext|>"])}
    merges = [f"{a} {b}" for a, b in tokenizer.merges]
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    single = {
        "added_tokens": [{"id": len(vocab) - 1, "content": "<|endoftext|>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(single), encoding="utf-8")


def test_gpt2_files(tmp_path) -> None:
    write_gpt2_files(tmp_path, bpe())
    from_two = BPETokenizer.from_gpt2_files(tmp_path)
    (tmp_path / "merges.txt").unlink()
    from_one = BPETokenizer.from_gpt2_files(tmp_path)
    assert from_one.to_json() == from_two.to_json()
    assert from_one.encode(SAMPLE) == bpe().encode(SAMPLE)
    end = from_one.special_tokens["<|endoftext|>"]
    assert end == 320 and from_one.decode([end]) == "<|endoftext|>"
    assert end not in from_one.encode("<|endoftext|>")
    assert tokenizer_from_json(from_one.to_json()).special_tokens == from_one.special_tokens


def test_gpt2_files_encode_as_transformers_does(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    write_gpt2_files(tmp_path, bpe())
    theirs = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    ours = BPETokenizer.from_gpt2_files(tmp_path)
    for text in (SAMPLE, SAMPLE.replace("\n", "").replace(" ", ""), "résumés" * 2_000, "Speak,  " * 500 + " \n \n"):
        assert ours.encode(text) == theirs(text)["input_ids"]
    theirs.save_pretrained(tmp_path / "again")
    assert BPETokenizer.from_gpt2_files(tmp_path / "again").to_json() == ours.to_json()


def test_gpt2_files_with_a_byte_order_mark(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "gpt2"
    folder.mkdir()
    write_gpt2_files(folder, bpe())
    plain = BPETokenizer.from_gpt2_files(folder).to_json()
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / name).write_bytes(codecs.BOM_UTF8 + (folder / name).read_bytes())
    assert BPETokenizer.from_gpt2_files("~/gpt2").to_json() == plain
    (folder / "vocab.json").unlink()
    assert BPETokenizer.from_gpt2_files("~/gpt2").to_json() == plain


def test_gpt2_files_with_added_tokens(tmp_path) -> None:
    write_gpt2_files(tmp_path, bpe())
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 321, "<é>": 322}', encoding="utf-8")
    tokenizer = BPETokenizer.from_gpt2_files(tmp_path)
    assert tokenizer.special_tokens == {"<|endoftext|>": 320, "<pad>": 321, "<é>": 322}
    assert tokenizer.decode([322, *tokenizer.encode("<pad>")]) == "<é><pad>"
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 400}', encoding="utf-8")
    with pytest.raises(ValueError, match="without a gap"):
        BPETokenizer.from_gpt2_files(tmp_path)


def test_gpt2_files_missing_or_foreign(tmp_path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        BPETokenizer.from_gpt2_files(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"vocab.json and merges.txt not found, nor tokenizer.json"):
        BPETokenizer.from_gpt2_files(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match=r": merges.txt not found, nor tokenizer.json"):
        BPETokenizer.from_gpt2_files(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(ValueError, match="not a GPT-2 tokenizer"):
        BPETokenizer.from_gpt2_files(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match=r"vocab.json.*not JSON"):
        BPETokenizer.from_gpt2_files(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 2}')
    with pytest.raises(ValueError, match="without a gap"):
        BPETokenizer.from_gpt2_files(tmp_path)


def test_the_library_is_imported_late() -> None:
    code = "import sys, fastgpt.tokenizer as t; t.CharTokenizer.train('ab'); assert 'tokenizers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_labels():
    tokenizer = CharTokenizer("\n \t$aé\x07")
    assert [label(tokenizer, i) for i in range(7)] == ["⏎", "␣", "⇥", "$", "a", "é", "<7>"]
    bpe = BPETokenizer.train("the cat and the dog " * 20, 280)
    labels = [label(bpe, i) for i in range(bpe.vocab_size)]
    assert "␣the" in labels and "<ff>" in labels
