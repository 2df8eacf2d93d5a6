"""Tokens of nanoGPT and llm.c: read as they were written, and refused where they cannot be right."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from fastgpt.data.sources import DataError
from fastgpt.data.token_files import is_token_folder, open_token_files
from fastgpt.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer("abcdefgh\n")  # 9 tokens
TRAIN, VAL = np.arange(70) % 9, np.arange(20) % 9


def write_llm_c(path, tokens, dtype="<u2", magic=20240520, version=1, n=None) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if n is None else n
    path.write_bytes(header.tobytes() + np.asarray(tokens).astype(dtype).tobytes())


@pytest.fixture
def nanogpt(tmp_path):
    folder = tmp_path / "nanogpt"
    folder.mkdir()
    (folder / "train.bin").write_bytes(TRAIN.astype("<u2").tobytes())
    (folder / "val.bin").write_bytes(VAL.astype("<u2").tobytes())
    return folder


@pytest.fixture
def llm_c(tmp_path):
    folder = tmp_path / "llm.c"
    folder.mkdir()
    write_llm_c(folder / "edu_train_000002.bin", TRAIN[40:])
    write_llm_c(folder / "edu_train_000001.bin", TRAIN[:40])
    write_llm_c(folder / "edu_val_000000.bin", VAL)
    return folder


def refused(folder, tokenizer=TOKENIZER) -> str:
    with pytest.raises(DataError) as error:
        open_token_files(folder, tokenizer)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


def test_both_are_mapped_in_the_order_of_their_names(nanogpt, llm_c) -> None:
    for folder, n_shards in ((nanogpt, 1), (llm_c, 2)):
        assert is_token_folder(folder)
        found = open_token_files(folder, TOKENIZER)
        assert len(found.train) == n_shards and all(isinstance(shard, np.memmap) for shard in found.train)
        assert np.array_equal(np.concatenate(found.train), TRAIN) and np.array_equal(found.val[0], VAL)
    (llm_c / "edu_val_000000.bin").rename(llm_c / "edu_val.bin")  # as llm.c calls the only file of a split
    assert np.array_equal(open_token_files(llm_c, TOKENIZER).val[0], VAL)


def test_llama_3(tmp_path) -> None:
    for split in ("train", "val"):
        write_llm_c(tmp_path / f"x_{split}_0.bin", TRAIN, "<u4", 20240801, 7)
    assert open_token_files(tmp_path, TOKENIZER).train[0].dtype == np.uint32
    write_llm_c(tmp_path / "x_train_1.bin", TRAIN)
    assert "a folder of its own" in refused(tmp_path)


def test_other_folders(tmp_path) -> None:
    (tmp_path / "text.txt").write_text("a")
    (tmp_path / "weights.bin").write_text("a")
    assert not is_token_folder(tmp_path)


def test_a_pickle_is_not_read(nanogpt) -> None:
    (nanogpt / "meta.pkl").write_bytes(b"")
    message = refused(nanogpt)
    assert "--data FILE" in message and "--tokenizer FOLDER" in message and "remove meta.pkl" in message


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_a_tokenizer_cannot_be_trained_on_tokens(nanogpt, tokenizer) -> None:
    assert f"{tokenizer!r} cannot be trained on it" in (message := refused(nanogpt, tokenizer)) and "FOLDER" in message


@pytest.mark.parametrize("kind", ["nanogpt", "llm_c"])
def test_both_splits_have_to_be_there(kind, request) -> None:
    folder = request.getfixturevalue(kind)
    next(folder.glob("*val*")).unlink()
    assert is_token_folder(folder)
    assert "no file of the val split" in refused(folder)


def test_a_number_that_is_missing_between_others(llm_c) -> None:
    (llm_c / "edu_train_000002.bin").rename(llm_c / "edu_train_000003.bin")
    assert "edu_train_000002.bin' is missing, and edu_train_000003.bin is there: fetch it" in refused(llm_c)
    (llm_c / "edu_train_000003.bin").rename(llm_c / "web_train_000003.bin")
    assert len(open_token_files(llm_c, TOKENIZER).train) == 2


@pytest.mark.parametrize("names", [("train.bin", "val.bin"), ("val.bin",)])
def test_files_of_both_programs(nanogpt, llm_c, names) -> None:
    for name in names:
        shutil.copy(nanogpt / name, llm_c)
    assert f"of nanoGPT, {names[0]}, and of llm.c, edu_train_000001.bin: put each" in refused(llm_c)


def test_files_that_are_not_whole(nanogpt, llm_c) -> None:
    for damage in (lambda raw: raw[:-1], lambda raw: b""):
        path = nanogpt / "val.bin"
        path.write_bytes(damage(path.read_bytes()))
        assert "uint16" in (message := refused(nanogpt)) and "val.bin" in message
    path = llm_c / "edu_train_000002.bin"
    whole = path.read_bytes()
    for damaged in (whole[:-2], whole + b"xx", whole[:1024]):
        path.write_bytes(damaged)
        assert "30 tokens of 2 bytes: it is not whole" in (message := refused(llm_c)) and path.name in message
    for damaged in (whole[:100], b"", b"\0" * len(whole)):
        path.write_bytes(damaged)
        assert "magic number 20240520, version 1 or 20240801, version 7" in refused(llm_c)
    write_llm_c(path, TRAIN, version=7)
    assert "magic number" in refused(llm_c)
    write_llm_c(path, TRAIN, n=-1)
    assert "-1 tokens" in refused(llm_c)


def test_a_token_that_the_tokenizer_lacks_is_named_with_its_file(nanogpt) -> None:
    message = refused(nanogpt, CharTokenizer("abcdefgh"))
    assert "train.bin': has the token 8, and the tokenizer has 8" in message and "--tokenizer FOLDER" in message


def test_files_are_read_for_their_largest_token_once_only(nanogpt, monkeypatch) -> None:
    for path in nanogpt.iterdir():
        os.utime(path, (1e9, 1e9))
    first = open_token_files(nanogpt, TOKENIZER)
    monkeypatch.setattr("fastgpt.data.token_files.pieces", lambda _: pytest.fail("read again"))
    assert open_token_files(nanogpt, TOKENIZER).sha256 == first.sha256
    (nanogpt / "val.bin").write_bytes(TRAIN.astype("<u2").tobytes())
    with pytest.raises(pytest.fail.Exception, match="read again"):
        open_token_files(nanogpt, TOKENIZER)


def test_the_hash_is_that_of_the_tokens_and_of_their_split(nanogpt) -> None:
    hashes = [open_token_files(nanogpt, TOKENIZER).sha256]
    train, val = (nanogpt / name for name in ("train.bin", "val.bin"))
    before = train.read_bytes(), val.read_bytes()
    train.write_bytes(before[1])
    hashes.append(open_token_files(nanogpt, TOKENIZER).sha256)
    val.write_bytes(before[0])
    hashes.append(open_token_files(nanogpt, TOKENIZER).sha256)
    assert len(set(hashes)) == 3
