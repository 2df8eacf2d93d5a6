"""A prepared folder: its index, its shards, and what can be wrong with both."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastgpt.data import prepared
from fastgpt.data.prepare import prepare
from fastgpt.data.prepared import INDEX, TOKENIZER, is_prepared, open_prepared
from fastgpt.data.sources import DataError
from fastgpt.data.stamps import sha256_of
from fastgpt.tokenizer import CharTokenizer
from helpers import PANGRAM


@pytest.fixture
def folder(tmp_path):
    """A prepared folder of three shards."""
    (tmp_path / "text.txt").write_text(PANGRAM, encoding="utf-8")
    prepare([tmp_path / "text.txt"], CharTokenizer.train(PANGRAM), tmp_path / "out", shard_tokens=999)
    return tmp_path / "out"


def test_the_index_says_what_is_there(folder, tmp_path) -> None:
    index = json.loads((folder / INDEX).read_text())
    assert [shard["tokens"] for shard in index["shards"]] == [999, 999, 202]
    assert index["dtype"] == "uint16" and index["train_tokens"] == 1980
    assert index["characters"] == 2200 and index["documents"] == 0
    assert index["tokenizer"] == CharTokenizer.train(PANGRAM).fingerprint()
    assert index["about"]["text"][0][0] == str(tmp_path / "text.txt")
    assert is_prepared(folder) and not is_prepared(folder.parent)


def test_the_shards_are_mapped(folder) -> None:
    opened = open_prepared(folder, verify=True)
    assert all(isinstance(shard, np.memmap) for shard in opened.all.shards)
    assert np.array_equal(opened.all, CharTokenizer.train(PANGRAM).encode_array(PANGRAM))


def test_a_shard_that_is_missing_or_not_whole(folder) -> None:
    shard = folder / "tokens-00001.bin"
    raw = shard.read_bytes()
    for damaged in (raw[:-1], raw + b"x", b""):
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match=r"tokens-00001\.bin': has .* bytes, .* 999 tokens of 2 bytes.* again"):
            open_prepared(folder)
    shard.unlink()
    with pytest.raises(
        DataError,
        match=r"tokens-00001\.bin' cannot be read: No such file.*remove the folder and prepare the data again",
    ):
        open_prepared(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: {},
        lambda index: [],
        lambda index: {**index, "dtype": "int8"},
        lambda index: {**index, "dtype": "uint32", "shards": [{**shard, "tokens": 1} for shard in index["shards"]]},
        lambda index: {**index, "shards": index["shards"][::-1]},
        lambda index: {**index, "shards": [*index["shards"], index["shards"][0]]},
        lambda index: {**index, "shards": [{**index["shards"][0], "file": "../outside.bin"}]},
        lambda index: {**index, "shards": [{"file": "tokens-00000.bin"}]},
        lambda index: {**index, "shards": None},
        lambda index: {**index, "train_tokens": "many"},
        lambda index: {**index, "train_tokens": 10**9},
    ],
)
def test_a_damaged_index(folder, change) -> None:
    (folder / INDEX).write_text(json.dumps(change(json.loads((folder / INDEX).read_text()))))
    with pytest.raises(DataError, match=r"index\.json' is no index of prepared data .* again"):
        open_prepared(folder)


@pytest.mark.parametrize("name", [INDEX, TOKENIZER, "tokens-00001.bin"])
def test_a_file_that_may_not_be_read_is_not_to_be_removed(folder, monkeypatch, name) -> None:
    def refuse(path, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def refusing(own):
        return lambda path, *a, **k: (refuse if Path(path).name == name else own)(path, *a, **k)

    for owner, function in ((Path, "read_text"), (prepared, "open_shard")):
        monkeypatch.setattr(owner, function, refusing(getattr(owner, function)))
    with pytest.raises(
        DataError, match=f"{name}' cannot be read: Permission denied; check the path and its permissions"
    ):
        open_prepared(folder)
    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(DataError, match=r"json' cannot be read: Permission denied; check the path"):
        is_prepared(folder)


def test_an_index_of_another_version_or_of_no_json(folder) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "version": 2}))
    with pytest.raises(DataError, match="its version is 2, not 1: remove the folder and prepare the data again"):
        open_prepared(folder)
    for text in ("{", "[" * 100_000):
        (folder / INDEX).write_text(text)
        with pytest.raises(DataError, match="no index"):
            open_prepared(folder)


def test_another_tokenizer_than_that_of_the_index(folder) -> None:
    path = folder / TOKENIZER
    for text, message in (
        (CharTokenizer("abc").to_json(), "not the tokenizer that index.json tells of"),
        ("{", "JSON"),
    ):
        path.write_text(text)
        with pytest.raises(
            DataError, match=rf"tokenizer\.json': .*{message}.*remove the folder and prepare the data again"
        ):
            open_prepared(folder)
    path.unlink()
    with pytest.raises(
        DataError, match=r"tokenizer\.json' cannot be read: No such file.*remove the folder and prepare the data again"
    ):
        open_prepared(folder)


def test_a_change_that_keeps_the_size_is_found_at_the_next_start(folder) -> None:
    shard = folder / "tokens-00001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[::-1])
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"tokens-00001\.bin': its content has changed .*: remove the folder and prep"
        ):
            open_prepared(folder)
    shard.write_bytes(whole)
    open_prepared(folder)


def test_tokens_are_read_only_when_they_are_new(folder, tmp_path, monkeypatch) -> None:
    read = []

    def counted(path):
        read.append(path.name)
        return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    counted.__module__, counted.__qualname__ = sha256_of.__module__, sha256_of.__qualname__
    monkeypatch.setattr(prepared, "sha256_of", counted)
    open_prepared(folder)
    assert read == []  # the writer has noted the sums
    open_prepared(folder, verify=True)
    assert len(read) == len(list(folder.glob("*.bin"))) >= 2
    copy = shutil.copytree(folder, tmp_path / "copy")
    for file in copy.glob("*.bin"):
        os.utime(file, ns=(10**18, 10**18))
    read.clear()
    for _ in range(2):
        open_prepared(copy)
    assert len(read) == len(list(folder.glob("*.bin")))


def test_the_digest_follows_from_the_index(folder, tmp_path) -> None:
    digests = [open_prepared(folder).digest]
    for number, text in enumerate([PANGRAM, PANGRAM[::-1], PANGRAM[:-1]]):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
        prepare([tmp_path / f"{number}.txt"], "char", tmp_path / str(number), shard_tokens=999)
        digests.append(open_prepared(tmp_path / str(number)).digest)
    assert digests[0] == digests[1] and len(set(digests)) == 3
