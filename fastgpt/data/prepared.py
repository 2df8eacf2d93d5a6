"""A prepared folder: the tokens of a text of any size in shards, with their tokenizer and an index.

    prepare(["corpus.txt"], "char", folder)     # see prepare.py
    prepared = open_prepared(folder)            # memory maps; nothing of the tokens is read

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

from ..files import atomic_path
from ..tokenizer import Tokenizer, tokenizer_from_json
from .shards import ShardedTokens
from .sources import DataError
from .stamps import sha256_of

INDEX, TOKENIZER = "index.json", "tokenizer.json"
VERSION = 1
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_REMEDY = "prepare the data again"


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
    return (folder / INDEX).is_file()


def dtype_name(tokenizer: Tokenizer) -> str:
    """That of the tokens in the shards."""
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def open_prepared(folder: Path, verify: bool = False) -> Prepared:
    """The tokens in `folder`, as memory maps. DataError names what is missing or damaged, and what to do.

    The sizes of the shards are checked. To `verify` them is to read them all, and to compare them with their sha256.
    """
    index = read_index(folder)
    path = folder / INDEX
    try:
        tokenizer = read_tokenizer(folder, index["tokenizer"])
        dtype, middle = DTYPES[index["dtype"]], index["train_tokens"]
        shards = [
            open_shard(folder / shard["file"], dtype, shard["tokens"], shard["sha256"] if verify else None)
            for shard in index["shards"]
        ]
        tokens = ShardedTokens(shards)
        facts = [index["dtype"], middle, *([shard["tokens"], shard["sha256"]] for shard in index["shards"])]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return Prepared(tokenizer, tokens[:middle], tokens[middle:], digest)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{error.filename!r} cannot be read: {error.strerror}; {_REMEDY}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{str(path)!r} is no index of prepared data ({error!r}): {_REMEDY}") from None


def read_index(folder: Path) -> dict[str, Any]:
    """What index.json has. DataError where it cannot be read, or is of another version of the format."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["version"]
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}; {_REMEDY}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{str(path)!r} is no index of prepared data ({error!r}): {_REMEDY}") from None
    if version != VERSION:
        raise DataError(f"{str(path)!r}: its version is {version!r}, not {VERSION}: {_REMEDY}")
    return index


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


def open_shard(path: Path, dtype: np.dtype, n_tokens: int, sha256: str | None = None) -> np.ndarray:
    """The tokens of a shard, memory-mapped; read and compared with their `sha256` where one is given."""
    size = path.stat().st_size
    if size != n_tokens * dtype.itemsize:
        raise DataError(
            f"{str(path)!r}: has {size:,} bytes, and the index tells of {n_tokens:,} tokens of {dtype.itemsize} bytes: "
            f"it is not whole; {_REMEDY}"
        )
    if sha256 is not None and sha256_of(path)["sha256"] != sha256:
        raise DataError(f"{str(path)!r}: its content has changed (its sha256 is not that of {INDEX}): {_REMEDY}")
    return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)


def write_whole(path: Path, text: str) -> None:
    """Write a file as a whole. Raises FileError."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
