"""Data that is opened as memory maps of its tokens, so that the start of a run neither reads nor hashes them.

It is a prepared folder; a folder with tokens of nanoGPT or llm.c; or a text that is too large to be read at each start.
Of a large text the first start writes the tokens to the cache, as a prepared folder. Later ones find it by the hashes
of the text's files, which are kept with the files' sizes and times (see `stamps.py`), and by the tokenizer.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from ..config import SOURCES, ConfigError
from ..files import FileError, cache_dir, expand_path
from ..tokenizer import BPETokenizer, CharTokenizer, Tokenizer, bpe_size
from .cache import cached_tokenizer, sha256
from .prepare import Text, trained, write_tokens
from .prepared import INDEX, TOKENIZER, Prepared, is_prepared, open_prepared
from .shard_writer import read_unfinished
from .shards import ShardedTokens
from .sources import DataError, find_files
from .stamps import known, sha256_of
from .token_files import is_token_folder, open_token_files

_LARGE_BYTES = 8_000_000  # a text of fewer bytes is read at each start, which takes less than half a second


def is_stored(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is a folder of tokens: a prepared one, nanoGPT's or llm.c's. DataError where it is not whole."""
    if not os.fspath(source) or source in SOURCES:
        return False
    path = expand_path(source)
    if is_prepared(path) or is_token_folder(path):
        return True
    if read_unfinished(path) is not None:
        raise DataError(
            f"{os.fspath(source)!r} holds the beginning of prepared data: the same `fastgpt data prepare` as before "
            f"goes on, to the end"
        )
    return False


def check_is_text(source: str | os.PathLike[str], layout: str) -> None:
    """Raise DataError where `source` is tokens already, and the layout reads text."""
    if is_stored(source):
        raise DataError(
            f"{os.fspath(source)!r} holds tokens, and layout {layout} reads text line by line: give the text, or take "
            f"--layout blocks"
        )


def open_stored(
    source: str | os.PathLike[str], tokenizer: str | Tokenizer, vocab_size: int | None = None
) -> Prepared | None:
    """The tokens of `source`; None where it is a text that is not large, which is read whole.

    Raises DataError where the tokens are not those of `tokenizer`, or not whole.
    """
    if is_stored(source):
        path = expand_path(source)
        return _prepared_folder(path, tokenizer) if is_prepared(path) else _token_folder(path, tokenizer)
    if not os.fspath(source) or source in SOURCES:
        return None
    files = find_files(source, "*.txt")
    try:
        if sum(file.stat().st_size for file in files) < _LARGE_BYTES:
            return None
        text = Text(repr(os.fspath(source)), files)
        hashes = [known(file, sha256_of)["sha256"] for file in files]
        with _alone_with(hashes):
            return _large_text(text, hashes, tokenizer, vocab_size)
    except OSError as error:
        raise DataError(f"{error.filename!r} cannot be read: {error.strerror}; check its permissions") from None


def _token_folder(path: Path, tokenizer: str | Tokenizer) -> Prepared:
    found = open_token_files(path, tokenizer)
    assert not isinstance(tokenizer, str)  # it is refused: tokens do not train a tokenizer
    return Prepared(tokenizer, ShardedTokens(found.train), ShardedTokens(found.val), found.sha256)


def _prepared_folder(path: Path, tokenizer: str | Tokenizer) -> Prepared:
    """The tokens in a prepared folder. It knows its tokenizer: "char", the default where none is given, takes any."""
    prepared = open_prepared(path)
    own = prepared.tokenizer
    is_same = tokenizer in ("char", own.kind) if isinstance(tokenizer, str) else _same(tokenizer, own)
    if not is_same:
        remedy = "leave --tokenizer out" if isinstance(tokenizer, str) else "give data that were prepared with this one"
        wanted = tokenizer if isinstance(tokenizer, str) else f"{tokenizer.kind} of {tokenizer.vocab_size}"
        raise DataError(
            f"{str(path)!r} was prepared with another tokenizer, a {own.kind} of {own.vocab_size} tokens, than the "
            f"{wanted} that is asked for: {remedy}, or prepare the text again with the tokenizer that is wanted"
        )
    return prepared


def _same(one: Tokenizer, other: Tokenizer) -> bool:
    return one.fingerprint() == other.fingerprint()


# --- large texts ------------------------------------------------------------------------------------------------------


def _large_text(text: Text, hashes: list[str], tokenizer: str | Tokenizer, vocab_size: int | None) -> Prepared:
    made = _trained(tokenizer, text, hashes, vocab_size) if isinstance(tokenizer, str) else tokenizer

    def make(folder: Path) -> None:
        write_tokens(text, made, folder, {"text": text.stamps})

    try:
        return _from_cache(cache_dir() / f"prepared-{sha256(' '.join([made.fingerprint(), *hashes]))}", make)
    except (ConfigError, FileError) as error:  # no home folder is known, or it cannot be written
        warnings.warn(
            f"{error}: the text is tokenized again next time; set FASTGPT_CACHE to a writable folder", stacklevel=2
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # its maps outlive it
        try:
            make(Path(folder))
        except FileError as error:
            raise FileError(
                f"{folder}: the tokens cannot be written there either: {error.__cause__ or error}; set FASTGPT_CACHE "
                f"to a folder with room for them"
            ) from error
        return open_prepared(Path(folder))


def _trained(name: str, text: Text, hashes: list[str], vocab_size: int | None) -> Tokenizer:
    """The tokenizer called `name`, trained on the text, or as the cache has it of files with these hashes."""
    wanted = ("char",) if name == "char" else ("bpe", str(bpe_size(vocab_size)), str(BPETokenizer.training_version))
    return cached_tokenizer(
        f"{name}-{sha256(' '.join([*wanted[1:], *hashes]))}.json",
        CharTokenizer if name == "char" else BPETokenizer,
        lambda: trained(text, name, vocab_size),
    )


def _from_cache(folder: Path, make: Callable[[Path], None]) -> Prepared:
    """The prepared folder in the cache; where there is none, or it is damaged, `make` writes it."""
    with contextlib.suppress(DataError):
        return open_prepared(folder)
    print(f"data: writing the tokens to {folder}, once", file=sys.stderr, flush=True)
    try:
        for name in (TOKENIZER, INDEX):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"{folder}: cannot be written: {error.strerror}") from None
    make(folder)
    return open_prepared(folder)


@contextlib.contextmanager
def _alone_with(hashes: list[str]) -> Iterator[None]:
    """Of the processes that start on one text, only one at a time is inside: the others then find what it has written.

    A process that ends, however it ends, lets the next one in. Without locks several may write; the result is the same.
    """
    with contextlib.ExitStack() as inside:
        with contextlib.suppress(ConfigError, OSError):  # no cache that can be written, or no locks there
            path = cache_dir() / f"text-{sha256(' '.join(hashes))}.lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            file = inside.enter_context(open(path, "wb"))
            if os.name == "posix":
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
        yield
