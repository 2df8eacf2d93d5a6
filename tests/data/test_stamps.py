"""What is known of a file: kept while the file is the same, and found anew when it changes."""

from __future__ import annotations

import hashlib
import os
import time

import pytest

from fastgpt.data import stamps
from fastgpt.data.stamps import known, note, sha256_of

LONG_AGO = 10**18  # ns


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.txt"
    write(path, b"abc")
    return path


def write(path, content: bytes, mtime_ns: int = LONG_AGO) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(mtime_ns, mtime_ns))


calls: list = []


def counted(path) -> dict:
    calls.append(path)
    return sha256_of(path)


def found(path) -> str:
    return known(path, counted)["sha256"]


@pytest.fixture(autouse=True)
def fresh():
    calls.clear()


def test_a_file_is_read_once(file) -> None:
    assert [found(file) for _ in range(3)] == [hashlib.sha256(b"abc").hexdigest()] * 3
    assert calls == [file]


def test_another_time_size_or_inode_is_another_file(file, tmp_path) -> None:
    found(file)
    write(file, b"abd", LONG_AGO + 1)
    assert found(file) == hashlib.sha256(b"abd").hexdigest()
    write(file, b"abde", LONG_AGO + 1)
    assert found(file) == hashlib.sha256(b"abde").hexdigest()
    write(tmp_path / "other", b"xxxx", LONG_AGO + 1)
    os.replace(tmp_path / "other", file)
    assert found(file) == hashlib.sha256(b"xxxx").hexdigest()
    assert len(calls) == 4


def test_a_change_within_the_tick_of_a_coarse_clock_is_noticed(file, monkeypatch) -> None:
    now = LONG_AGO + 10**9
    monkeypatch.setattr("fastgpt.data.stamps.time.time_ns", lambda: now)
    for content in (b"abc", b"abd"):
        write(file, content, LONG_AGO)
        assert found(file) == hashlib.sha256(content).hexdigest()


def test_what_is_kept_is_of_one_file_and_one_question(file, tmp_path) -> None:
    def length(path) -> dict:
        return {"length": path.stat().st_size}

    found(file)
    assert known(file, length) == {"length": 3}
    write(tmp_path / "copy", b"xyz")
    assert found(tmp_path / "copy") != found(file)


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"\xff", hashlib.sha256(b"{}").hexdigest().encode() + b"\n{}", None]
)
def test_a_damaged_stamp_is_written_again(file, cache, damage) -> None:
    """One that has another hash of the file, too: a file that is whole would be taken for a changed one."""
    good = found(file)
    (stamp,) = cache.glob("stamp-*")
    stamp.write_bytes(stamp.read_bytes().replace(good.encode(), good[::-1].encode()) if damage is None else damage)
    assert [found(file), found(file)] == [good, good] and len(calls) == 2


def test_a_file_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(OSError, match="none"):
        known(tmp_path / "none", sha256_of)


def test_the_hash_is_that_of_all_bytes(file, monkeypatch) -> None:
    monkeypatch.setattr(stamps, "_READ_AT_ONCE", 2)
    assert sha256_of(file) == {"sha256": hashlib.sha256(b"abc").hexdigest()}


def test_what_the_writer_notes_is_not_found_anew(file, tmp_path) -> None:
    write(file, b"new", time.time_ns())
    note(file, counted, {"sha256": "noted"})
    assert found(file) == "noted" and not calls
    write(file, b"newer", time.time_ns())
    assert found(file) == hashlib.sha256(b"newer").hexdigest()
