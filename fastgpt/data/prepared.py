"""A prepared folder: the tokens of a text of any size in shards, and index.json, which says what they are.

    write_prepared(read_pieces(files), tokenizer, folder)
    prepared = open_prepared(folder)            # memory maps; nothing of the tokens is read

The index has the tokenizer, the dtype, each shard's number of tokens and sha256, and how many of all tokens are to be
trained on: the others, at the end, are the validation split. It is written last, so a folder without one is not whole.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import FileError, atomic_path
from ..tokenizer import Tokenizer, cut_safely, tokenizer_from_json
from .shards import ShardedTokens
from .sources import DataError

INDEX = "index.json"
_VERSION = 1
_DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_SHARD_TOKENS = 100_000_000


@dataclass(frozen=True)
class Prepared:
    """The tokens of both splits, the tokenizer that made them, and a hash by which a resumed run knows them."""

    tokenizer: Tokenizer
    train: ShardedTokens
    val: ShardedTokens
    digest: str

    @property
    def all(self) -> ShardedTokens:
        """Both splits, one after the other."""
        return ShardedTokens([*self.train.shards, *self.val.shards])


def write_prepared(pieces: Iterable[str], tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokens of a text, which is given in pieces, to `folder`; nine tenths of them are to be trained on.

    The memory that this takes does not grow with the text. Raises DataError for what the tokenizer cannot encode, and
    FileError where the folder cannot be written.
    """
    shards: list[dict[str, Any]] = []
    dtype = _DTYPES["uint16" if tokenizer.vocab_size <= 2**16 else "uint32"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, parts in itertools.groupby(_divided(_encoded(pieces, tokenizer)), key=lambda pair: pair[0]):
            path = folder / f"tokens-{number:05d}.bin"
            shards.append(_write_shard(path, (part.astype(dtype) for _, part in parts)))
    except OSError as error:
        raise FileError(
            f"{folder}: cannot be written: {error.strerror}; make room, or choose another folder"
        ) from error
    index = {
        "version": _VERSION,
        "tokenizer": json.loads(tokenizer.to_json()),
        "dtype": dtype.name,
        "train_tokens": sum(shard["tokens"] for shard in shards) * 9 // 10,
        "shards": shards,
    }
    with atomic_path(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_shard(path: Path, parts: Iterable[np.ndarray]) -> dict[str, Any]:
    """What the index has of a shard."""
    n, digest = 0, hashlib.sha256()
    path.unlink(missing_ok=True)  # another run may have mapped the old one, which it then keeps
    with open(path, "wb") as file:
        for part in parts:
            digest.update(part.data)
            file.write(part.data)
            n += len(part)
        file.flush()
        os.fsync(file.fileno())  # before the index says that the shard is there
    return {"file": path.name, "tokens": n, "sha256": digest.hexdigest()}


def _encoded(pieces: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    n_characters = 0
    for piece in cut_safely(pieces):
        try:
            yield tokenizer.encode_array(piece)
        except ValueError as error:
            raise DataError(f"in the text from character {n_characters:,} on: {error}") from None
        n_characters += len(piece)


def _divided(arrays: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """The arrays, cut where a shard is full; each with the number of its shard."""
    done = 0
    for array in arrays:
        while len(array):
            part = array[: _SHARD_TOKENS - done % _SHARD_TOKENS]
            yield done // _SHARD_TOKENS, part
            done, array = done + len(part), array[len(part) :]


def is_prepared(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def open_prepared(folder: Path) -> Prepared:
    """The tokens in `folder`, as memory maps. DataError names what is missing or damaged, and what to do."""
    path, remedy = folder / INDEX, "prepare the data again"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["version"] != _VERSION:
            raise DataError(f"{str(path)!r}: its version is {index['version']!r}, not {_VERSION}: {remedy}")
        tokenizer = tokenizer_from_json(json.dumps(index["tokenizer"]))
        dtype = _DTYPES[index["dtype"]]
        shards = [_open_shard(folder / shard["file"], dtype, shard["tokens"], remedy) for shard in index["shards"]]
        tokens, middle = ShardedTokens(shards), index["train_tokens"]
        facts = [index["dtype"], middle, *([shard["tokens"], shard["sha256"]] for shard in index["shards"])]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return Prepared(tokenizer, tokens[:middle], tokens[middle:], digest)
    except OSError as error:
        raise DataError(f"{error.filename!r} cannot be read: {error.strerror}; {remedy}") from None
    except DataError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{str(path)!r} is no index of prepared data ({error!r}): {remedy}") from None


def _open_shard(path: Path, dtype: np.dtype, n_tokens: int, remedy: str) -> np.ndarray:
    size = path.stat().st_size
    if size != n_tokens * dtype.itemsize:
        raise DataError(
            f"{str(path)!r}: has {size:,} bytes, and the index tells of {n_tokens:,} tokens of {dtype.itemsize} bytes: "
            f"it is not whole; {remedy}"
        )
    return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)
