"""Text of any size to a prepared folder: read in pieces, tokenized in several processes, written to shards.

    prepare(["corpus.txt"], "char", Path("prepared"))
    prepare(["fineweb/"], "bpe", Path("prepared"), vocab_size=32_000, processes=8)

No more than a few pieces of the text are in memory. The tokens are those of the text as a whole, however it is cut.

One file of text is one stream, of which the last tenth is for validation. Several files, and the rows of JSON lines and
of Parquet, are documents: each ends with the tokenizer's end of text, and the last tenth of them is for validation.
A single document is divided as a stream is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import SOURCES
from ..files import expand_path
from ..tokenizer import BPETokenizer, CharTokenizer, Tokenizer, bpe_size
from .documents import ENDINGS, read_documents
from .encoding import Batch, batches_of, encoded
from .prepared import INDEX, TOKENIZER, Prepared, is_prepared, open_prepared, read_index
from .shard_writer import PROGRESS, SHARD_TOKENS, ShardWriter, alone_in, read_unfinished
from .sources import DataError, find_files, load_text
from .text_pieces import read_pieces


@dataclass(frozen=True)
class Text:
    """A text to prepare, which errors call `shown`: files, or one of SOURCES by its `name`.

    Without documents it is one stream, and files are joined by a line's end, as `load_text` joins them. `field` has the
    text in JSON lines and Parquet.
    """

    shown: str
    files: list[Path]
    name: str | None = None
    has_documents: bool = False
    field: str = "text"
    stamps: list[list[Any]] = dataclasses.field(init=False)  # by which a process knows that the text is the same

    def __post_init__(self) -> None:
        object.__setattr__(self, "stamps", self._stamps_now())

    @classmethod
    def find(cls, sources: Sequence[str | os.PathLike[str]], field: str) -> Text:
        """The text of `sources`, which are files and folders, or one of SOURCES. Raises DataError."""
        shown = ", ".join(repr(os.fspath(source)) for source in sources)
        names = [source for source in sources if source in SOURCES]
        if names and len(sources) > 1:
            raise DataError(f"{shown}: {names[0]} is a text that is given alone, without files or another text")
        if names:
            return cls(shown, [], str(names[0]))
        files = [file for source in sources for file in _files(source)]
        if twice := _first_of_two([file.resolve() for file in files]):
            raise DataError(
                f"{shown}: {str(twice)!r} is in it twice, and would be trained and validated on: remove one"
            )
        return cls(shown, files, None, len(files) > 1 or _is_documents(files[0]), field)

    @property
    def n_bytes(self) -> int | None:
        """Of the files, where they are nothing but text."""
        is_text = self.files and not any(map(_is_documents, self.files))
        return sum(file.stat().st_size for file in self.files) if is_text else None

    def documents(self, progress: Callable[[int], object]) -> Iterator[Iterable[str]]:
        """The documents, each in pieces, or the stream alone. `progress` is called with numbers of bytes."""
        if self.name is not None:
            yield [load_text(self.name)]
        elif not self.has_documents:
            yield read_pieces(self.files, progress)
        else:
            for file in self.files:
                yield from self._documents_in(file, progress)

    def _documents_in(self, file: Path, progress: Callable[[int], object]) -> Iterator[Iterable[str]]:
        if not _is_documents(file):
            yield read_pieces([file], progress)
            return
        for document in read_documents(file, self.field):
            yield [document]
            progress(len(document))

    def _stamps_now(self) -> list[list[Any]]:
        status = [(str(file.resolve()), file.stat()) for file in self.files]
        return [[path, found.st_size, found.st_mtime_ns] for path, found in status] or [[self.name, 0, 0]]

    def check_unchanged(self) -> None:
        """Raise DataError that names a file which has changed since this was made."""
        for before, now in zip(self.stamps, self._stamps_now(), strict=True):
            if before != now:
                raise DataError(f"{now[0]!r} was changed while it was read: start again when nothing writes it")


def _is_documents(file: Path) -> bool:
    return file.suffix.lower() in ENDINGS


def _first_of_two(files: Sequence[Path]) -> Path | None:
    return next((file for file, count in Counter(files).items() if count > 1), None)


def _files(source: str | os.PathLike[str]) -> list[Path]:
    """A file, whatever its name is, or the files of a folder whose names say that they have text."""
    endings = (".txt", *ENDINGS)
    files = find_files(source, "*")
    if expand_path(source).is_dir():
        files = [file for file in files if file.suffix.lower() in endings]
    if not files:
        raise DataError(f"{os.fspath(source)!r} holds no files named *{', *'.join(endings)}: put some there")
    return files


def prepare(
    sources: Sequence[str | os.PathLike[str]],
    tokenizer: str | Tokenizer,
    out: Path,
    *,
    vocab_size: int | None = None,
    field: str = "text",
    processes: int = 1,
    shard_tokens: int = SHARD_TOKENS,
) -> Prepared:
    """Write the tokens of `sources` to the folder `out`, and print how long it took.

    `tokenizer` is "char", "bpe" (then `vocab_size` is needed) or a tokenizer; the first two are trained on the text.
    `field` has the text in JSON lines and Parquet. With more than one of `processes`, a script that calls this needs
    the guard `if __name__ == "__main__"`, because each of them imports it.

    After a process that was killed, or found the disk full, the same call goes on behind the shards that are whole.
    Where the folder is prepared already, its shards are compared with their sums. Raises DataError for data that cannot
    be used, and FileError where the folder cannot be written, or another process writes it.
    """
    text = Text.find(sources, field)
    about = {
        "text": text.stamps,
        "field": field,
        "tokenizer": _wanted(tokenizer, vocab_size),
        "shard_tokens": shard_tokens,
    }
    _check_out(out, text)
    if not is_prepared(out):
        with alone_in(out):
            if not is_prepared(out):  # by another process, meanwhile
                return _prepare(text, tokenizer, vocab_size, out, about, processes)
    if read_index(out).get("about") != about:
        raise DataError(f"{str(out)!r} holds other data, or tokens of another tokenizer: choose another folder")
    return open_prepared(out, verify=True)


def _check_out(out: Path, text: Text) -> None:
    """Raise DataError where the folder has a file that would be overwritten, or that its tokens would stand for."""
    inside = next((file for file in text.files if out.resolve() in file.resolve().parents), None)
    if inside:
        raise DataError(f"{str(out)!r} holds the text itself, {inside.name}: choose another folder for the tokens")
    other = next((name for name in (TOKENIZER, INDEX) if (out / name).exists()), None)
    if other and not (out / PROGRESS).exists() and not is_prepared(out):
        raise DataError(
            f"{str(out)!r} holds a file {other}, which would be overwritten: remove it, or choose another folder"
        )


def _prepare(
    text: Text,
    tokenizer: str | Tokenizer,
    vocab_size: int | None,
    out: Path,
    about: dict[str, Any],
    processes: int,
) -> Prepared:
    unfinished = read_unfinished(out)
    if unfinished and unfinished.progress.shards and unfinished.about != about:
        raise DataError(
            f"{str(out)!r} holds the beginning of other data, or tokens of another tokenizer: remove the folder, or "
            f"choose another"
        )
    if unfinished and unfinished.about == about:
        made: Tokenizer = unfinished.tokenizer
    else:
        made = trained(text, tokenizer, vocab_size) if isinstance(tokenizer, str) else tokenizer
    start = time.perf_counter()
    n = write_tokens(text, made, out, about, processes, about["shard_tokens"])
    seconds = time.perf_counter() - start
    print(f"tokenized {n:,} characters in {seconds:.1f} s, {n / seconds / 1e6:.1f} million a second", flush=True)
    return open_prepared(out)


def _wanted(tokenizer: str | Tokenizer, vocab_size: int | None) -> str:
    """What a tokenizer is known by that may have to be trained yet."""
    if not isinstance(tokenizer, str):
        return tokenizer.fingerprint()
    return f"bpe {bpe_size(vocab_size)} {BPETokenizer.training_version}" if tokenizer == "bpe" else tokenizer


def write_tokens(
    text: Text,
    tokenizer: Tokenizer,
    folder: Path,
    about: dict[str, Any] | None = None,
    processes: int = 1,
    shard_tokens: int = SHARD_TOKENS,
) -> int:
    """Write the tokens of the text to `folder`, all of them or the rest; returns how many characters that took.

    `about` says what is prepared: what an earlier process left there is gone on with only where it was the same.
    """
    if text.has_documents and tokenizer.end_of_text is None:
        raise DataError("tokenizer: it has no end of text, which joins documents: give another, or one file of text")
    if isinstance(tokenizer, CharTokenizer) and tokenizer.vocab_size == 1 + text.has_documents:
        raise DataError(
            f"{text.shown} has one distinct character, {tokenizer.chars[-1]!r}: give a text with something to predict"
        )
    with _bar("tokenizing", text) as documents, ShardWriter(folder, tokenizer, about or {}, shard_tokens) as writer:
        before = writer.progress.n_characters
        batches = itertools.islice(batches_of(documents, text.has_documents), writer.progress.n_batches, None)
        _append_all(batches, writer, processes, text)
        return writer.progress.n_characters - before


def _append_all(batches: Iterator[Batch], writer: ShardWriter, processes: int, text: Text) -> None:
    end = writer.tokenizer.end_of_text
    try:
        with contextlib.closing(encoded(batches, writer.tokenizer, processes)) as found:
            for tokens, ends, n_characters in found:
                if text.has_documents and np.count_nonzero(tokens == end) > len(ends):
                    raise ValueError("a document has the character '\\x03', which ends documents: remove it")
                writer.append(tokens, ends, n_characters)
    except DataError:  # of the text's reader, which names the place
        raise
    except ValueError as error:
        place = f"in the text from character {writer.progress.n_characters:,} on"
        raise DataError(f"{text.shown}: {place}: {error}") from None
    if not writer.progress.n_characters:
        raise _empty(text.shown)
    text.check_unchanged()
    writer.finish()


def _empty(shown: str) -> DataError:
    return DataError(f"{shown} is empty: give a file with text in it")


def trained(text: Text, name: str, vocab_size: int | None) -> CharTokenizer | BPETokenizer:
    """The tokenizer called `name`, trained on the text; with an end of text where it has documents."""
    with _bar("training the tokenizer", text) as documents:
        pieces = itertools.chain.from_iterable(documents)
        first = next(filter(None, pieces), None)
        if first is None:
            raise _empty(text.shown)
        pieces = itertools.chain([first], pieces)
        if name == "char":
            return CharTokenizer.train(pieces, text.has_documents)
        bpe = BPETokenizer.train(pieces, bpe_size(vocab_size))
    return bpe.with_end() if text.has_documents else bpe


@contextlib.contextmanager
def _bar(what: str, text: Text) -> Iterator[Iterator[Iterable[str]]]:
    """The documents of the text, under a bar of the bytes that were read."""
    from tqdm import tqdm

    with tqdm(desc=what, total=text.n_bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        yield text.documents(bar.update)
