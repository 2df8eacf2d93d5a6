"""Tokens to shards: batches that end anywhere, a process that ends anywhere, and a folder that cannot be written."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest

from fastgpt.data import shard_writer
from fastgpt.data.prepared import INDEX, open_prepared
from fastgpt.data.shard_writer import PROGRESS, Progress, ShardWriter, alone_in, read_unfinished
from fastgpt.files import FileError
from fastgpt.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer("abcdefghij")
TOKENS = np.random.default_rng(1).integers(0, 10, 1000)
# Batches of 0, 1, ... 44 tokens; a document ends behind each that is not empty.
BATCHES = [TOKENS[n * (n - 1) // 2 : n * (n + 1) // 2] for n in range(45)]


def write(folder, until: int | None = None, shard_tokens: int = 60, about: object = None) -> int:
    """Write the batches up to `until`, and end the folder where there is none; returns how many came from before."""
    with ShardWriter(folder, TOKENIZER, {"about": about}, shard_tokens) as writer:
        before = writer.progress.n_batches
        for batch in BATCHES[before:until]:
            writer.append(batch, [len(batch)] if len(batch) else [], 2 * len(batch))
        if until is None:
            writer.finish()
    return before


@pytest.mark.parametrize("shard_tokens", [17, 60, 990, 10**6])
def test_batches_and_shards_end_anywhere(tmp_path, shard_tokens) -> None:
    folder = tmp_path / "out"
    write(folder, shard_tokens=shard_tokens)
    opened = open_prepared(folder, verify=True)
    assert np.array_equal(opened.all, TOKENS[:990]) and opened.all.dtype == np.uint16
    sizes = [shard["tokens"] for shard in json.loads((folder / INDEX).read_text())["shards"]]
    assert set(sizes[:-1]) <= {shard_tokens} and 0 < sizes[-1] <= shard_tokens
    assert len(opened.train) == 39 * 40 // 2, "of 44 documents 39 are trained on"
    files = sorted(path.name for path in folder.iterdir() if "tokens" not in path.name)
    assert files == [INDEX, "tokenizer.json"]


@pytest.mark.parametrize("until", [0, 5, 11, 12, 30, 44])
def test_a_process_that_ended_is_gone_on_from(tmp_path, until) -> None:
    write(tmp_path / "whole")
    write(tmp_path / "again", until)
    assert not (tmp_path / "again" / INDEX).exists()
    assert not list((tmp_path / "again").glob("*.part")), "room is given back"
    n_shards = len(list((tmp_path / "again").glob("*.bin")))
    before = write(tmp_path / "again")
    assert n_shards == sum(map(len, BATCHES[:until])) // 60 and (before > 0) == (n_shards > 0)
    assert (tmp_path / "again" / INDEX).read_bytes() == (tmp_path / "whole" / INDEX).read_bytes()


@pytest.mark.parametrize("change", ["about", "shard", "progress", "nested", "batches"])
def test_what_does_not_fit_is_not_gone_on_from(tmp_path, monkeypatch, change) -> None:
    write(tmp_path, 30)
    if change == "shard":
        (tmp_path / "tokens-00001.bin").write_bytes(b"")
    elif change == "progress":
        (tmp_path / PROGRESS).write_text("{")
    elif change == "nested":
        (tmp_path / PROGRESS).write_text("[" * 100_000)
    elif change == "batches":
        monkeypatch.setattr(shard_writer, "_PROGRESS_VERSION", [1, 1])
    assert write(tmp_path, about=1 if change == "about" else None) == 0
    assert np.array_equal(open_prepared(tmp_path, verify=True).all, TOKENS[:990])


@pytest.mark.parametrize("fails", ["open", "write", "fsync", "replace"])
def test_a_full_disk_is_told_and_what_was_written_is_gone_on_from(tmp_path, monkeypatch, fails) -> None:
    write(tmp_path, 30)
    n_shards = len(list(tmp_path.glob("*.bin")))

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def open_others(path, mode):
        return fail() if str(path).endswith(".part") else open(path, mode)

    with monkeypatch.context() as patch:
        if fails == "open":
            patch.setattr(shard_writer, "open", open_others, raising=False)
        elif fails == "write":
            patch.setattr(ShardWriter, "_write", fail)
        else:
            patch.setattr(shard_writer.os, fails, fail)
        with pytest.raises(
            FileError, match=rf"No space left on device; make room .*\({n_shards} shards are whole: the"
        ):
            write(tmp_path)
    assert not list(tmp_path.glob("*.part"))
    assert write(tmp_path) > 0
    assert np.array_equal(open_prepared(tmp_path, verify=True).all, TOKENS[:990])


def test_a_run_keeps_its_maps_when_the_folder_is_written_again(tmp_path) -> None:
    write(tmp_path)
    before = open_prepared(tmp_path).all
    write(tmp_path, about=1, shard_tokens=77)
    assert np.array_equal(before, TOKENS[:990])


def test_a_second_process_is_kept_out(tmp_path) -> None:
    pytest.importorskip("fcntl")
    with (
        alone_in(tmp_path / "out"),
        pytest.raises(FileError, match="another process writes it now; wait until it has ended"),
        alone_in(tmp_path / "out"),
    ):
        pass
    with alone_in(tmp_path / "out"):
        pass


def test_a_folder_that_is_a_file(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"file: cannot be written: .*; make room there, or choose another folder \(0"):
        write(tmp_path / "file")
    with pytest.raises(FileError, match=r"file: cannot be written: .*; choose another"), alone_in(tmp_path / "file"):
        pass
    assert read_unfinished(tmp_path) is None


def test_the_ends_of_many_documents_take_bounded_memory(monkeypatch) -> None:
    monkeypatch.setattr(shard_writer, "_MOST_ENDS", 100)
    progress = Progress()
    for end in range(10, 100_010, 10):
        progress.add_document(end)
    assert progress.n_documents == 10_000 and len(progress.ends) <= 100
    assert [Progress(n_documents=n, ends=[7, 50, 60][:n]).train_tokens(60) for n in (1, 2, 3)] == [54, 7, 50]
    trained_on = progress.train_tokens(100_000)
    assert trained_on % 10 == 0 and 88_000 <= trained_on <= 90_000


def test_folders_that_were_made_for_nothing_go_again(tmp_path) -> None:
    for n_files in (0, 1):
        with pytest.raises(ValueError, match="wrong"), alone_in(tmp_path / "a" / "b" / "c"):
            for number in range(n_files):
                (tmp_path / "a" / "b" / "c" / f"{number}.bin").touch()
            raise ValueError("wrong")
        assert len(list((tmp_path / "a").rglob("*.bin"))) == n_files == len(list(tmp_path.iterdir()))
