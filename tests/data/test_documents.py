"""Documents: JSON lines and Parquet, one after the other, and what is wrong with a file is said with its place."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from fastgpt.data.documents import read_documents
from fastgpt.data.sources import DataError

DOCUMENTS = ["one", "two\nlines", "", "zwölf\u2028"]


def write_json_lines(path, documents, field="text"):
    lines = [json.dumps({"id": i, field: text}, ensure_ascii=bool(i % 2)) for i, text in enumerate(documents)]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def write_parquet(path, documents, field="text", row_group_size=3):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"id": range(len(documents)), field: documents})
    parquet.write_table(table, path, row_group_size=row_group_size)
    return path


@pytest.fixture(params=[write_json_lines, write_parquet])
def written(request, tmp_path):
    """A function that writes documents to a file, and gives its path."""
    ending = ".jsonl" if request.param is write_json_lines else ".parquet"
    return lambda documents, **options: request.param(tmp_path / f"data{ending}", documents, **options)


def refused(path, field="text") -> str:
    with pytest.raises(DataError) as error:
        list(read_documents(path, field))
    assert "\n" not in str(error.value) and repr(str(path)) in str(error.value)
    return str(error.value)


def test_documents_come_in_order_with_the_line_ends_of_a_text(written) -> None:
    assert list(read_documents(written(DOCUMENTS))) == DOCUMENTS
    assert list(read_documents(written(["a\r\nb\rc"]))) == ["a\nb\nc"]
    assert list(read_documents(written(DOCUMENTS, field="content"), "content")) == DOCUMENTS
    assert "has no" in (message := refused(written(DOCUMENTS, field="content"))) and "'content'" in message


def test_more_documents_than_are_read_at_once(written) -> None:
    documents = [f"document {i}" for i in range(1000)]
    assert list(read_documents(written(documents))) == documents


@pytest.mark.parametrize("wrong", [None, 3])
def test_a_document_that_is_no_text_is_named_by_its_place(written, wrong) -> None:
    path = written(["one", "two", None] if wrong is None else [1, 2, 3])
    message = refused(path)
    place = 3 if wrong is None else 1
    assert f", line {place}: " in message or f", row {place}: " in message
    assert f"is {'None' if wrong is None else 1}; expected a text" in message


def test_json_lines_are_read_as_they_are_asked_for(tmp_path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "first"}\n{"text": "sec')
    documents = read_documents(tmp_path / "data.jsonl")
    assert next(documents) == "first"
    with pytest.raises(DataError, match="line 2: is not JSON"):
        next(documents)


@pytest.mark.parametrize(
    ("line", "words"),
    [(b"[1]", "no object"), (b'{"txt": "a"}', "but 'txt'"), (b'{"text": "\\ud800"}', "surrogate"),
     (b'{"text": "\xff"}', "not UTF-8"), (b"[" * 100_000, "not JSON")],
)  # fmt: skip
def test_lines_that_cannot_be_used(tmp_path, line, words) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"\n" + line + b"\n")
    assert words in (message := refused(tmp_path / "data.jsonl")) and "line 2" in message


def test_a_damaged_parquet_file(tmp_path) -> None:
    raw = write_parquet(tmp_path / "data.parquet", ["one"] * 1000).read_bytes()
    for damaged in (b"", raw[:-5], raw[len(raw) // 2 :], b"PAR1" + b"x" * 100):
        (tmp_path / "data.parquet").write_bytes(damaged)
        assert "fetch it again" in refused(tmp_path / "data.parquet")


def test_without_pyarrow_the_command_that_installs_it_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused(tmp_path / "data.parquet").endswith("not installed: pip install pyarrow")


def test_a_pyarrow_that_does_not_start(tmp_path, monkeypatch) -> None:
    (tmp_path / "pyarrow.py").write_text("raise ImportError('libarrow.so is missing')\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert "does not start here (libarrow.so is missing): install it again" in refused(tmp_path / "data.parquet")


def test_a_row_that_is_not_utf8(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    offsets, letters = np.array([0, 2, 5], "<i4").tobytes(), b"okab\xff"
    column = pyarrow.StringArray.from_buffers(2, pyarrow.py_buffer(offsets), pyarrow.py_buffer(letters))
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "data.parquet")
    message = refused(tmp_path / "data.parquet")
    assert "one of the rows 1 to 256: field 'text' is not UTF-8 (byte 0xff): correct or remove it" in message


def test_other_files(tmp_path) -> None:
    assert "ends in .jsonl or .parquet" in refused(tmp_path / "data.csv")
    for name in ("data.jsonl", "none/data.jsonl"):
        assert "cannot be read: No such file" in refused(tmp_path / name)
