"""Writes the tokens of a text of any size to shards, from where an earlier process that ended has left off.

A shard is a file of so many tokens, and nothing else. It is written under another name, and renamed when it is whole.
progress.json then tells of it, and of the place in the text behind it: that is what is kept when the process is killed
or the disk is full. index.json, which makes the folder a prepared one (see `prepared.py`), is written last.

The text comes in batches, which have to be the same each time. On going on, those that are in whole shards are passed
over, which costs reading them but not tokenizing them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..files import FileError
from ..tokenizer import Tokenizer
from .encoding import BATCH_CHARACTERS
from .prepared import INDEX, TOKENIZER, VERSION, open_shard, read_tokenizer, shard_name, write_whole
from .shards import token_dtype
from .stamps import note, sha256_of

PROGRESS = "progress.json"
SHARD_TOKENS = 100_000_000
_PROGRESS_VERSION = [VERSION, BATCH_CHARACTERS]  # another one has other batches
_MOST_ENDS = 1 << 16


@dataclass
class Progress:
    """How far the text is in whole shards: `n_batches` of it, and the first `n_ahead` tokens of the next one.

    `ends` are the numbers of tokens up to the end of each `every`-th document: of all while they are few, so that the
    memory does not grow with their number.
    """

    shards: list[dict[str, Any]] = field(default_factory=list)
    n_batches: int = 0
    n_ahead: int = 0
    n_characters: int = 0
    n_documents: int = 0
    ends: list[int] = field(default_factory=list)
    every: int = 1

    @property
    def n_tokens(self) -> int:
        """Of the `n_batches`."""
        return sum(shard["tokens"] for shard in self.shards) - self.n_ahead

    def add_document(self, end: int) -> None:
        self.n_documents += 1
        if self.n_documents % self.every == 0:
            self.ends.append(end)
        if len(self.ends) > _MOST_ENDS:
            self.ends, self.every = self.ends[1::2], 2 * self.every

    def train_tokens(self, n_tokens: int) -> int:
        """How many of all tokens are to be trained on: nine tenths, of the documents where there are several."""
        if self.n_documents < 2:
            return n_tokens * 9 // 10
        n = self.n_documents * 9 // 10 // self.every
        return self.ends[n - 1] if n else 0


@dataclass(frozen=True)
class Unfinished:
    """What a process that ended has left: what it prepared, by which tokenizer, and how far it came."""

    about: dict[str, Any]
    tokenizer: Tokenizer
    progress: Progress


def read_unfinished(folder: Path) -> Unfinished | None:
    """None where there is nothing to go on from: no progress.json, or it or a shard is damaged."""
    try:
        kept = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        tokenizer = read_tokenizer(folder, kept["tokenizer"])
        progress = Progress(**kept["progress"])
        if kept["version"] != _PROGRESS_VERSION:
            return None
        for shard in progress.shards:
            open_shard(folder / shard["file"], token_dtype(tokenizer), shard["tokens"])
        return Unfinished(kept["about"], tokenizer, progress)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


class ShardWriter:
    """Appends batches of tokens to the shards in `folder`, and goes on where they are those of the same `about`.

    >>> with ShardWriter(folder, tokenizer, about) as writer:
    ...     for tokens, ends, n_characters in batches[writer.progress.n_batches :]:
    ...         writer.append(tokens, ends, n_characters)
    ...     writer.finish()
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, about: dict[str, Any], shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self.folder, self.tokenizer, self.about, self.shard_tokens = folder, tokenizer, about, shard_tokens
        self.dtype = token_dtype(tokenizer)
        self._file: BinaryIO | None = None
        self._n, self._digest = 0, hashlib.sha256()  # of the shard that is being written
        self.progress = Progress()
        with self._failures():
            folder.mkdir(parents=True, exist_ok=True)
        found = read_unfinished(folder)
        if found is not None and (found.about, found.tokenizer.to_json()) == (about, tokenizer.to_json()):
            self.progress = found.progress
        else:
            with self._failures():
                self._save_progress()  # first: a tokenizer.json without it is not of prepared data
                write_whole(folder / TOKENIZER, tokenizer.to_json())
        self._at = self.progress.n_tokens

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Drop a shard that is not whole, which gives its room on the disk back."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what is in the buffer may find no room
                self._file.close()
            self._part.unlink(missing_ok=True)
            self._file = None

    def append(self, tokens: np.ndarray, ends: list[int], n_characters: int) -> None:
        """Append the tokens of the next batch; documents end behind these numbers of them.

        Raises FileError where it cannot be written; the shards that are whole are kept.
        """
        progress = self.progress
        rest = tokens[progress.n_ahead :].astype(self.dtype, copy=False)
        with self._failures():
            while len(rest):
                part, rest = np.split(rest, [self.shard_tokens - self._n])
                self._write(part)
                if self._n == self.shard_tokens:
                    progress.n_ahead = len(tokens) - len(rest)
                    self._finish_shard()
                    self._save_progress()
        for end in ends:
            progress.add_document(self._at + end)
        self._at += len(tokens)
        progress.n_batches, progress.n_ahead = progress.n_batches + 1, 0
        progress.n_characters += n_characters

    def finish(self) -> None:
        """Write the last shard and the index."""
        progress = self.progress
        with self._failures():
            if self._n:
                self._finish_shard()
            index = {
                "version": VERSION,
                "tokenizer": self.tokenizer.fingerprint(),
                "dtype": self.dtype.name,
                "train_tokens": progress.train_tokens(sum(shard["tokens"] for shard in progress.shards)),
                "documents": progress.n_documents,
                "characters": progress.n_characters,
                "about": self.about,
                "shards": progress.shards,
            }
            write_whole(self.folder / INDEX, json.dumps(index, indent=2))
            (self.folder / PROGRESS).unlink(missing_ok=True)

    @property
    def _part(self) -> Path:
        return self.folder / f"{shard_name(len(self.progress.shards))}.part"

    def _write(self, tokens: np.ndarray) -> None:
        if self._file is None:
            self._file = open(self._part, "wb")  # noqa: SIM115  -- open for many batches
            self._n, self._digest = 0, hashlib.sha256()
        self._digest.update(tokens.data)
        self._file.write(tokens.data)
        self._n += len(tokens)

    def _finish_shard(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())  # before progress.json or the index says that the shard is there
        self._file.close()
        path = self._part.with_suffix("")
        os.replace(self._part, path)
        sha256 = self._digest.hexdigest()
        note(path, sha256_of, {"sha256": sha256})
        self.progress.shards.append({"file": path.name, "tokens": self._n, "sha256": sha256})
        self._file, self._n = None, 0

    def _save_progress(self) -> None:
        kept = {
            "version": _PROGRESS_VERSION,
            "about": self.about,
            "tokenizer": self.tokenizer.fingerprint(),
            "progress": dataclasses.asdict(self.progress),
        }
        write_whole(self.folder / PROGRESS, json.dumps(kept))

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except (OSError, FileError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            n = len(self.progress.shards)
            raise FileError(
                f"{self.folder}: cannot be written: {getattr(cause, 'strerror', None) or cause}; make room there, or "
                f"choose another folder ({n} shard{'s are' if n != 1 else ' is'} whole: the same command goes on)"
            ) from error


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make the folder, and be the only process in it until the end, or until this process ends.

    On a disk without locks there may be others. Raises FileError where another process is inside. Folders that were
    made here go again where an error leaves nothing in them.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "wb")  # noqa: SIM115  -- it is closed below
    except OSError as error:
        raise FileError(f"{folder}: cannot be written: {error.strerror}; choose another folder") from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileError(f"{folder}: another process writes it now; wait until it has ended") from None
        except (ImportError, OSError):
            pass
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                if made and os.listdir(folder) == [".lock"]:
                    (folder / ".lock").unlink()
                    for path in made:
                        path.rmdir()
            raise
