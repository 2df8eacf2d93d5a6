"""Folders of tokens that other programs have written, as memory maps: nanoGPT's and llm.c's.

- nanoGPT (data/*/prepare.py) writes train.bin and val.bin, each nothing but uint16.
- llm.c (dev/data/data_common.py) writes shards, NAME_train_000001.bin and NAME_val_000000.bin: a header of 256 int32,
  which has a magic number, a version and the number of tokens, and then the tokens, uint16 for GPT-2 or uint32 for
  Llama 3.

Neither says which tokenizer made the tokens, so one has to be given.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import allow_open_files
from ..tokenizer import Tokenizer
from .shards import pieces
from .sources import DataError
from .stamps import known

_SPLITS = ("train", "val")
_HEADER = 256  # int32
_DTYPES: dict[tuple[int, int], np.dtype] = {
    (20240520, 1): np.dtype("<u2"),
    (20240801, 7): np.dtype("<u4"),
}  # by llm.c's magic number and version


@dataclass(frozen=True)
class TokenFiles:
    """The shards of each split, in the order of their names, and a hash of all of them."""

    train: list[np.ndarray]
    val: list[np.ndarray]
    sha256: str


def is_token_folder(folder: Path) -> bool:
    """Whether a folder has tokens of nanoGPT or of llm.c, of either split."""
    return any(_files(folder, split) for split in _SPLITS)


def open_token_files(folder: Path, tokenizer: str | Tokenizer) -> TokenFiles:
    """The tokens in `folder`, which `tokenizer` has made.

    Each file is read once, for its largest token and its hash, and again only when it has changed. DataError names a
    file that cannot be used, and a token that the tokenizer does not have.
    """
    shown = repr(str(folder))
    if (folder / "meta.pkl").exists():
        raise DataError(
            f"{str(folder / 'meta.pkl')!r}: is a pickle, which may run any program when it is read, so it is not: "
            f"tokenize the text itself, --data FILE; or where these are GPT-2's tokens, remove meta.pkl and give "
            f"--tokenizer FOLDER"
        )
    if isinstance(tokenizer, str):
        raise DataError(
            f"{shown} holds tokens, not text, so the tokenizer {tokenizer!r} cannot be trained on it: give the one "
            f"that made them, as --tokenizer FOLDER with GPT-2's vocab.json and merges.txt"
        )
    splits: dict[str, list[np.ndarray]] = {}
    digest = hashlib.sha256()
    own, theirs = ([file for split in _SPLITS for file in find(folder, split)] for find in (_nanogpt, _llm_c))
    if own and theirs:
        raise DataError(
            f"{shown} has files of nanoGPT, {own[0].name}, and of llm.c, {theirs[0].name}: put each kind into a folder "
            f"of its own"
        )
    for split in _SPLITS:
        files = _files(folder, split)
        if not files:
            raise DataError(f"{shown} has no file of the {split} split, {split}.bin or NAME_{split}_000001.bin: add it")
        _check_all_there(files)
        allow_open_files(len(files) + len(splits.get("train", ())))
        splits[split] = [_open(file) for file in files]
        digest.update(f" {split}".encode())
        for file in files:
            found = known(file, _content)
            digest.update(found["sha256"].encode())
            if found["largest"] >= tokenizer.vocab_size:
                raise DataError(
                    f"{str(file)!r}: has the token {found['largest']}, and the tokenizer has {tokenizer.vocab_size}: "
                    f"give the tokenizer that made these tokens, --tokenizer FOLDER"
                )
    if len({shard.dtype for shards in splits.values() for shard in shards}) > 1:
        raise DataError(f"{shown} has files of GPT-2's tokens and of Llama 3's: put each kind into a folder of its own")
    return TokenFiles(splits["train"], splits["val"], digest.hexdigest())


def _files(folder: Path, split: str) -> list[Path]:
    return _nanogpt(folder, split) or _llm_c(folder, split)


def _nanogpt(folder: Path, split: str) -> list[Path]:
    own = folder / f"{split}.bin"
    return [own] if own.is_file() else []


def _llm_c(folder: Path, split: str) -> list[Path]:
    """llm.c's files of the split, which have numbers where there are several."""
    return sorted({*folder.glob(f"*_{split}.bin"), *folder.glob(f"*_{split}_*.bin")})


def _check_all_there(files: list[Path]) -> None:
    """Raise DataError where a number is missing between those of two files whose names are the same otherwise."""
    for before, after in itertools.pairwise(files):
        (name, number), (same_name, next_number) = (file.stem.rpartition("_")[::2] for file in (before, after))
        if name == same_name and number.isdecimal() and next_number.isdecimal():
            missing = str(int(number) + 1).zfill(len(number))
            if int(next_number) > int(missing):
                raise DataError(
                    f"{str(before.with_name(f'{name}_{missing}.bin'))!r} is missing, and {after.name} is there: fetch "
                    f"it, or remove those behind it"
                )


def _open(path: Path) -> np.ndarray:
    """The tokens of one file, memory-mapped."""
    shown = repr(str(path))
    try:
        size = path.stat().st_size
        if path.stem in ("train", "val"):
            if size == 0 or size % 2:
                raise DataError(f"{shown}: has {size:,} bytes, and tokens of nanoGPT are uint16: write the file again")
            return np.memmap(path, np.dtype("<u2"), mode="r")
        header = np.fromfile(path, np.dtype("<i4"), count=_HEADER)
        dtype = _DTYPES.get((int(header[0]), int(header[1]))) if len(header) == _HEADER else None
        if dtype is None:
            kinds = " or ".join(f"{magic}, version {version}" for magic, version in _DTYPES)
            raise DataError(
                f"{shown}: does not begin as llm.c's files of tokens do (magic number {kinds}): write it by llm.c's "
                f"dev/data scripts, or remove it"
            )
        n_tokens = int(header[2])
        if n_tokens < 1 or size != header.nbytes + n_tokens * dtype.itemsize:
            raise DataError(
                f"{shown}: has {size:,} bytes, and its header tells of {n_tokens:,} tokens of {dtype.itemsize} bytes: "
                f"it is not whole; fetch or write it again"
            )
        return np.memmap(path, dtype, mode="r", offset=header.nbytes, shape=(n_tokens,))
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror}; check its permissions") from None


def _content(path: Path) -> dict[str, Any]:
    """The largest token of a file and the hash of all of them."""
    digest, largest = hashlib.sha256(), 0
    for piece in pieces(_open(path)):
        digest.update(piece.data)
        largest = max(largest, int(piece.max()))
    return {"sha256": digest.hexdigest(), "largest": largest}
