"""What is kept on disk between runs: tokens, trained tokenizers and downloads, each file whole or not at all."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..config import ConfigError
from ..files import FileError, atomic_path, cache_dir
from ..tokenizer import BPETokenizer, Tokenizer, bpe_size, tokenizer_from_json
from .shards import token_dtype

_DIGEST_BYTES = hashlib.sha256().digest_size
Kept = TypeVar("Kept")
Trained = TypeVar("Trained", bound=Tokenizer)


def cached(
    name: str,
    *,
    read: Callable[[Path], Kept | None],
    make: Callable[[], Kept],
    parts: Callable[[Kept], list[Any]],
    consequence: str,
) -> Kept:
    """The content of the cache's file `name`, by `read`. Where `read` gives None, `make` is called for the content.

    The new content is written as its `parts`. Where it cannot be written, a warning names the `consequence`.
    """
    try:
        path = cache_dir() / name
    except ConfigError as error:  # no home folder is known
        _warn_uncached(str(error), consequence)
        return make()
    kept = read(path)
    if kept is not None:
        return kept
    fresh = make()
    to_write = parts(fresh)
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            file.writelines(to_write)
    except FileError as error:
        _warn_uncached(f"the cache cannot be written ({error})", consequence)
        return fresh
    kept = read(path)  # the tokens are then mapped from the file, and their memory is given back
    return fresh if kept is None else kept


def _warn_uncached(reason: str, consequence: str) -> None:
    warnings.warn(f"{reason}: {consequence}; set FASTGPT_CACHE to a writable folder", stacklevel=2)


def cached_tokens(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of `text`, memory-mapped where they are in the cache."""
    dtype = token_dtype(tokenizer)

    def encode() -> np.ndarray:
        tokens = tokenizer.encode_array(text).astype(dtype)
        tokens.flags.writeable = False
        return tokens

    return cached(
        f"tokens-{sha256(f'{sha256(text)} {tokenizer.fingerprint()}')}.npy",
        read=lambda path: _open_tokens(path, dtype),
        make=encode,
        parts=_token_parts,
        consequence="the tokens stay in memory",
    )


def _token_parts(tokens: np.ndarray) -> list[Any]:
    """A .npy file with its own sha256 behind it: numpy ignores a tail, and one file is atomic where two are not."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(tokens))
    data = tokens.data.cast("B") if tokens.size else b""
    digest = hashlib.sha256(header.getvalue())
    digest.update(data)
    return [header.getvalue(), data, digest.digest()]


def _open_tokens(path: Path, dtype: np.dtype) -> np.ndarray | None:
    """The cached tokens, memory-mapped and checked; None where there are none or the file is damaged."""
    try:
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        digest = hashlib.sha256(raw[:-_DIGEST_BYTES].data).digest()
        if digest != raw[-_DIGEST_BYTES:].tobytes():
            return None
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return tokens if tokens.dtype == dtype and tokens.ndim == 1 else None


def cached_bpe(text: str, vocab_size: int | None) -> BPETokenizer:
    """The tokenizer that `text` trains: training takes far longer than encoding, and gives the same each time."""
    size = bpe_size(vocab_size)
    name = f"bpe-{sha256(f'{sha256(text)} {size} {BPETokenizer.training_version}')}.json"
    return cached_tokenizer(name, BPETokenizer, lambda: BPETokenizer.train(text, size))


def cached_tokenizer(name: str, kind: type[Trained], train: Callable[[], Trained]) -> Trained:
    """The tokenizer of class `kind` in the cache's file `name`; where there is none, the one that `train` gives."""
    return cached(
        name,
        read=lambda path: _open_tokenizer(path, kind),
        make=train,
        parts=lambda tokenizer: [with_sum(tokenizer.to_json())],
        consequence="the tokenizer is trained again next time",
    )


def _open_tokenizer(path: Path, kind: type[Trained]) -> Trained | None:
    """The kept tokenizer; None where there is none or it is damaged."""
    try:
        tokenizer = tokenizer_from_json(read_with_sum(path))
    except (OSError, ValueError):
        return None
    return tokenizer if isinstance(tokenizer, kind) else None


def with_sum(text: str) -> bytes:
    """What a file has of a text that `read_with_sum` reads: the sum is that of the text."""
    return f"{sha256(text)}\n{text}".encode()


def read_with_sum(path: Path) -> str:
    """The text that `with_sum` made. Raises ValueError where it is damaged, and OSError where it cannot be read."""
    found, _, text = path.read_text(encoding="utf-8").partition("\n")
    if sha256(text) != found:
        raise ValueError("the text has another sum than the file")
    return text


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
