"""A prepared folder: the tokens of a text of any size in shards, with their tokenizer and an index.

    prepare(["corpus.txt"], "char", folder)     # see prepare.py
    prepared = open_prepared(folder)            # memory maps; only tokens that are new here are read, once

index.json has the tokenizer's fingerprint, the dtype, each shard's number of tokens and sha256, and how many of all
tokens are to be trained on: the others, at the end, are the validation split. It is written last, so that a folder
without one is not whole. tokenizer.json has the tokenizer. A shard is a file of tokens, little-endian, nothing else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import allow_open_files, atomic_path
from ..tokenizer import Tokenizer, tokenizer_from_json
from .shards import ShardedTokens, token_dtype
from .sources import DataError
from .stamps import known, sha256_of

INDEX, TOKENIZER = "index.json", "tokenizer.json"
VERSION = 1
_REMEDY = "remove the folder and prepare the data again"


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


def is_prepared(folder: Path) -> bool:
    """Whether the folder is prepared data, perhaps damaged. Other programs write an index.json, too, but no such files
    beside it. Raises DataError where that cannot be known."""
    try:
        has_tokens = (folder / TOKENIZER).is_file() or any(folder.glob("tokens-*.bin"))
        return has_tokens and (folder / INDEX).is_file()
    except OSError as error:
        raise _unreadable(error) from None


def _unreadable(error: OSError) -> DataError:
    remedy = _REMEDY if isinstance(error, FileNotFoundError) else "check the path and its permissions"
    return DataError(f"{error.filename!r} cannot be read: {error.strerror}; {remedy}")


def shard_name(number: int) -> str:
    return f"tokens-{number:05d}.bin"


def open_prepared(folder: Path, verify: bool = False) -> Prepared:
    """The tokens in `folder`, as memory maps. DataError names what is missing or damaged, and what to do.

    A shard is compared with its sha256 when it is opened for the first time, and when it has changed since. To `verify`
    is to read all shards, whatever is known of them.
    """
    from tqdm import tqdm

    index = read_index(folder)
    path = folder / INDEX
    try:
        tokenizer = read_tokenizer(folder, index["tokenizer"])
        dtype, middle = token_dtype(tokenizer), index["train_tokens"]
        if index["dtype"] != dtype.name:
            raise ValueError(f"dtype is {index['dtype']!r}; expected {dtype.name}")
        for number, shard in enumerate(index["shards"]):
            if shard["file"] != shard_name(number):
                raise ValueError(f"shard {number} is {shard['file']!r}; expected {shard_name(number)}")
        allow_open_files(len(index["shards"]))
        shards = [open_shard(folder / shard["file"], dtype, shard["tokens"]) for shard in index["shards"]]
        for shard in tqdm(index["shards"], "comparing the tokens with their sums", disable=None, leave=False, delay=1):
            _compare(folder / shard["file"], shard["sha256"], verify)
        tokens = ShardedTokens(shards)
        if not 0 <= middle <= len(tokens):
            raise ValueError(f"train_tokens is {middle:,}, and there are {len(tokens):,} tokens")
        facts = [index["dtype"], middle, *([shard["tokens"], shard["sha256"]] for shard in index["shards"])]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return Prepared(tokenizer, tokens[:middle], tokens[middle:], digest)
    except DataError:
        raise
    except OSError as error:
        raise _unreadable(error) from None
    except (ValueError, KeyError, TypeError) as error:
        raise _no_index(path, error) from None


def read_index(folder: Path) -> dict[str, Any]:
    """What index.json has. DataError where it cannot be read, or is of another version of the format."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["version"]
    except OSError as error:
        raise _unreadable(error) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _no_index(path, error) from None
    if version != VERSION:
        raise DataError(f"{str(path)!r}: its version is {version!r}, not {VERSION}: {_REMEDY}")
    return index


def _no_index(path: Path, error: Exception) -> DataError:
    problem = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
    return DataError(f"{str(path)!r} is no index of prepared data ({problem}): {_REMEDY}")


def read_tokenizer(folder: Path, fingerprint: str) -> Tokenizer:
    """The tokenizer in tokenizer.json, which has to have this fingerprint."""
    path = folder / TOKENIZER
    try:
        tokenizer = tokenizer_from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{str(path)!r}: {error}; {_REMEDY}") from None
    if tokenizer.fingerprint() != fingerprint:
        raise DataError(f"{str(path)!r}: is not the tokenizer that {INDEX} tells of: put that one back, or {_REMEDY}")
    return tokenizer


def open_shard(path: Path, dtype: np.dtype, n_tokens: int) -> np.ndarray:
    """The tokens of a shard, memory-mapped."""
    size = path.stat().st_size
    if size != n_tokens * dtype.itemsize:
        raise DataError(
            f"{str(path)!r}: has {size:,} bytes, and the index tells of {n_tokens:,} tokens of {dtype.itemsize} bytes: "
            f"it is not whole; {_REMEDY}"
        )
    return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)


def _compare(path: Path, sha256: str, is_read: bool) -> None:
    """Raise DataError where the file has another content; it `is_read`, or only where it is not known."""
    found = sha256_of(path) if is_read else known(path, sha256_of)
    if found["sha256"] != sha256:
        raise DataError(f"{str(path)!r}: its content has changed (its sha256 is not that of {INDEX}): {_REMEDY}")


def write_whole(path: Path, text: str) -> None:
    """Write a file as a whole. Raises FileError."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
