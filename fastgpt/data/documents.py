"""Documents of data sets: JSON lines and Parquet files, read one document at a time, never a whole file.

    for document in read_documents("fineweb/000_00000.parquet"): ...

Each has its text in a field called "text", or in another that is named. Parquet is read by pyarrow, an optional
dependency, one batch of rows after the other.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .sources import DOCUMENTS, DataError

ENDINGS = tuple(DOCUMENTS)
_ROWS_AT_ONCE = 256
_BUFFER_BYTES = 1 << 20  # of a Parquet column that is read ahead: without a limit, a whole row group's


def read_documents(path: str | os.PathLike[str], field: str = "text") -> Iterator[str]:
    """The documents of one file whose name ends in one of ENDINGS, in its order; line ends become "\\n", as in a text.

    Raises DataError that names the file and the line or row of a document that cannot be used.
    """
    path = Path(path)
    read = {".jsonl": _json_lines, ".parquet": _parquet}.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{str(path)!r}: expected a file of documents, whose name ends in {' or '.join(ENDINGS)}")
    try:
        for place, value in read(path, field):
            if not isinstance(value, str):
                raise DataError(f"{place}: field {field!r} is {value!r:.40}; expected a text: correct or remove it")
            yield value.replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror or error}; check the file") from None


def _json_lines(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{str(path)!r}, line {number}"
            if line.strip():
                yield place, _value(line, field, place)


def _value(line: bytes, field: str, place: str) -> Any:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is not UTF-8 (byte {error.start}): convert the file, or remove the line") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: is not JSON ({error}); expected {{{json.dumps(field)}: ...}}") from None
    if not isinstance(values, dict) or field not in values:
        has = ", ".join(map(repr, values)) if isinstance(values, dict) else "no object"
        raise DataError(f"{place}: has no field {field!r}, but {has:.200}: name the field that has the text")
    value = values[field]
    try:
        value.encode() if isinstance(value, str) else None
    except UnicodeEncodeError:  # JSON can spell more than UTF-8
        raise DataError(
            f"{place}: field {field!r} has half of a surrogate pair, which is no character: remove it"
        ) from None
    return value


def _parquet(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise DataError(
            f"{str(path)!r}: Parquet files are read by pyarrow, which is not installed: pip install pyarrow"
        ) from None
    except ImportError as error:
        raise DataError(
            f"{str(path)!r}: Parquet files are read by pyarrow, which does not start here ({error}): install it again"
        ) from None
    row = 0
    try:
        with parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if field not in names:
                has = ", ".join(map(repr, names))
                raise DataError(f"{str(path)!r}: has no column {field!r}, but {has:.200}: name the column of the text")
            batches = file.iter_batches(_ROWS_AT_ONCE, columns=[field])
            values = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            for row, value in enumerate(values, 1):
                yield f"{str(path)!r}, row {row}", value
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(path)!r}, one of the rows {row + 1:,} to {row + _ROWS_AT_ONCE:,}: field {field!r} is not UTF-8 "
            f"(byte 0x{error.object[error.start]:02x}): correct or remove it"
        ) from None
    except pyarrow.ArrowException as error:
        raise DataError(f"{str(path)!r} is no whole Parquet file ({error}): fetch it again") from None
