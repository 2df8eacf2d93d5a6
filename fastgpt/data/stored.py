"""Data that is tokens already: opened as memory maps, so that nothing of it is read or hashed at the start of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..config import SOURCES
from ..files import expand_path
from ..tokenizer import Tokenizer
from .shards import ShardedTokens
from .sources import DataError
from .token_files import is_token_folder, open_token_files


@dataclass(frozen=True)
class Stored:
    """The tokens of both splits, the tokenizer that made them, and a hash by which a resumed run knows them."""

    tokenizer: Tokenizer
    train: ShardedTokens
    val: ShardedTokens
    digest: str


def is_stored(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is a folder of tokens: one of nanoGPT's or of llm.c's."""
    return bool(os.fspath(source)) and source not in SOURCES and is_token_folder(expand_path(source))


def open_stored(source: str | os.PathLike[str], tokenizer: str | Tokenizer) -> Stored:
    """The tokens in the folder `source`. DataError where they are not those of `tokenizer`, or not whole."""
    found = open_token_files(expand_path(source), tokenizer)
    assert not isinstance(tokenizer, str)  # it is refused: tokens do not train a tokenizer
    return Stored(tokenizer, ShardedTokens(found.train), ShardedTokens(found.val), found.sha256)


def check_is_text(source: str | os.PathLike[str], layout: str) -> None:
    """Raise DataError where `source` is tokens already, and the layout reads text."""
    if is_stored(source):
        raise DataError(
            f"{os.fspath(source)!r} holds tokens, and layout {layout} reads text line by line: give the text, or take "
            f"--layout blocks"
        )
