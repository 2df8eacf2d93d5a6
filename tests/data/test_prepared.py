"""A prepared folder: the tokens of a text in shards, the index that describes them, and what can be wrong with both."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastgpt.data import prepared
from fastgpt.data.prepared import INDEX, is_prepared, open_prepared, write_prepared
from fastgpt.data.shards import ShardedTokens
from fastgpt.data.sources import DataError
from fastgpt.files import FileError
from fastgpt.tokenizer import BPETokenizer, CharTokenizer
from helpers import PANGRAM

TOKENIZERS = [CharTokenizer.train(PANGRAM), BPETokenizer.train(PANGRAM, 270)]


def pieces(text: str = PANGRAM, size: int = 100) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A prepared folder of several shards, none of whose ends is that of a piece."""
    monkeypatch.setattr(prepared, "_SHARD_TOKENS", 999)
    write_prepared(pieces(), TOKENIZERS[0], tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["char", "bpe"])
@pytest.mark.parametrize("size", [7, 100, 10**6])
@pytest.mark.parametrize("shard_tokens", [50, 999, 10**6])
def test_the_tokens_are_those_of_the_whole_text(tmp_path, monkeypatch, tokenizer, size, shard_tokens) -> None:
    monkeypatch.setattr(prepared, "_SHARD_TOKENS", shard_tokens)
    write_prepared(pieces(size=size), tokenizer, tmp_path)
    opened, tokens = open_prepared(tmp_path), tokenizer.encode_array(PANGRAM)
    assert np.array_equal(opened.all, tokens) and len(opened.train) == len(tokens) * 9 // 10
    assert np.array_equal(opened.val, tokens[len(opened.train) :]) and opened.train.dtype == np.uint16
    assert opened.tokenizer.to_json() == tokenizer.to_json()
    sizes = [len(shard) for shard in opened.all.shards]
    assert len(list(tmp_path.glob("tokens-*.bin"))) == -(-len(tokens) // shard_tokens) and max(sizes) <= shard_tokens
    assert all(isinstance(shard, np.memmap) for shard in opened.train.shards)


def test_a_run_keeps_its_maps_when_the_folder_is_written_again(folder) -> None:
    before = open_prepared(folder).all
    expected = np.asarray(before).copy()
    write_prepared(pieces(PANGRAM[:100]), TOKENIZERS[0], folder)
    assert np.array_equal(before, expected) and len(open_prepared(folder).all) == 100


def test_the_index_says_what_is_there(folder) -> None:
    index = json.loads((folder / INDEX).read_text())
    assert [shard["tokens"] for shard in index["shards"]] == [999, 999, 202]
    assert index["dtype"] == "uint16" and index["train_tokens"] == 1980
    assert is_prepared(folder) and not is_prepared(folder.parent)


def test_large_vocabularies_take_uint32(tmp_path) -> None:
    chars = "".join(map(chr, range(0x10000, 0x21000)))
    write_prepared([chars], CharTokenizer(chars), tmp_path)
    assert open_prepared(tmp_path).all.dtype == np.uint32
    assert np.array_equal(open_prepared(tmp_path).all, np.arange(len(chars)))


def test_equal_texts_have_equal_digests(tmp_path) -> None:
    digests = []
    for i, text in enumerate([PANGRAM, PANGRAM, PANGRAM[::-1], PANGRAM[:-1]]):
        write_prepared(pieces(text), TOKENIZERS[0], tmp_path / str(i))
        digests.append(open_prepared(tmp_path / str(i)).digest)
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_an_empty_text(tmp_path) -> None:
    write_prepared([], TOKENIZERS[0], tmp_path)
    with pytest.raises(DataError, match="no index of prepared data"):
        open_prepared(tmp_path)


def test_a_character_that_the_tokenizer_lacks(tmp_path) -> None:
    with pytest.raises(DataError, match=r"in the text from character 2,200 on: character 'é' at position 0"):
        write_prepared([PANGRAM, "é"], TOKENIZERS[0], tmp_path)
    assert not is_prepared(tmp_path), "what is not whole has no index"


def test_a_folder_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"file: cannot be written: .*; make room"):
        write_prepared(pieces(), TOKENIZERS[0], tmp_path / "file")


def test_a_shard_that_is_missing_or_not_whole(folder) -> None:
    shard = folder / "tokens-00001.bin"
    raw = shard.read_bytes()
    for damaged in (raw[:-1], raw + b"x", b""):
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match=r"tokens-00001\.bin': has .* bytes, .* 999 tokens of 2 bytes.* again"):
            open_prepared(folder)
    shard.unlink()
    with pytest.raises(DataError, match=r"tokens-00001\.bin' cannot be read: No such file.*prepare the data again"):
        open_prepared(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: {},
        lambda index: [],
        lambda index: {**index, "dtype": "int8"},
        lambda index: {**index, "tokenizer": {"kind": "word"}},
        lambda index: {**index, "shards": [{"file": "tokens-00000.bin"}]},
        lambda index: {**index, "shards": None},
        lambda index: {**index, "train_tokens": "many"},
    ],
)
def test_a_damaged_index(folder, change) -> None:
    (folder / INDEX).write_text(json.dumps(change(json.loads((folder / INDEX).read_text()))))
    with pytest.raises(DataError, match=r"index\.json' is no index of prepared data .* again"):
        open_prepared(folder)


def test_an_index_of_another_version_or_of_no_json(folder) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "version": 2}))
    with pytest.raises(DataError, match="its version is 2, not 1: prepare the data again"):
        open_prepared(folder)
    (folder / INDEX).write_text("{")
    with pytest.raises(DataError, match="no index"):
        open_prepared(folder)


def test_only_the_pieces_that_are_being_written_are_in_memory(tmp_path, monkeypatch) -> None:
    """The text is taken as it is written: the first shard is whole before the text ends."""
    monkeypatch.setattr(prepared, "_SHARD_TOKENS", 1000)
    seen = []

    def text():
        for piece in pieces():
            seen.append(len(list(tmp_path.glob("tokens-*.bin"))))
            yield piece

    write_prepared(text(), TOKENIZERS[0], tmp_path)
    assert seen[0] == 0 and seen[-1] >= 2
    assert isinstance(open_prepared(tmp_path).train, ShardedTokens)
