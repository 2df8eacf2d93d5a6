"""Text of any size: UTF-8 files read in pieces, so that no more than a piece is in memory."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .sources import DataError, check_has_few_nuls, not_utf8

_BYTES_AT_ONCE = 1 << 20


def read_pieces(files: Iterable[Path], progress: Callable[[int], object] = lambda n_bytes: None) -> Iterator[str]:
    """The text of UTF-8 files in pieces of about a million characters, which together are what `load_text` gives.

    `progress` is called with the number of bytes of each piece. Raises DataError that names the file which is not
    UTF-8, and the byte.
    """
    between = ""
    for file in files:
        yield between
        try:
            yield from _read_file(file, progress)
        except OSError as error:
            raise DataError(f"{str(file)!r} cannot be read: {error.strerror}; check its permissions") from None
        between = "\n"


def _read_file(path: Path, progress: Callable[[int], object]) -> Iterator[str]:
    shown, at, n_nuls, start = repr(str(path)), 0, 0, b""
    held_back = ""  # "\r", until it is known whether "\n" follows
    rest = b""  # the beginning of a character
    with open(path, "rb") as file:
        is_last = False
        while not is_last:
            read = file.read(_BYTES_AT_ONCE)
            is_last, raw, start = not read, rest + read, start or read[:4]
            n_nuls += read.count(0)
            progress(len(read))
            try:
                text, used = codecs.utf_8_decode(raw, "strict", is_last)
            except UnicodeDecodeError as error:
                raise not_utf8(shown, raw[error.start], at + error.start, start) from None
            if at == 0:
                text = text.removeprefix("\ufeff")
            at, rest = at + used, raw[used:]
            text = held_back + text
            held_back = "\r" if text.endswith("\r") and not is_last else ""
            text = text.removesuffix(held_back).replace("\r\n", "\n").replace("\r", "\n")
            if text:
                yield text
    check_has_few_nuls(shown, n_nuls, at, start)
