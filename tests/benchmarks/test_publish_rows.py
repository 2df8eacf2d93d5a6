"""Rows of results: read, written, replaced, and named where they are malformed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmark_rows import row, run_line, write
from fastgpt.benchmarks.publish import rows

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", 'expected an object with "kind": "row" or "run"'),
        ('{"kind": "sheet"}', 'expected an object with "kind": "row" or "run"'),
        (json.dumps(row(op=None)), "op: expected text, got None"),
        (json.dumps(row() | {"median_ms": "fast"}), "median_ms: expected a number above 0, got 'fast'"),
        (json.dumps(row(median_ms=0)), "median_ms: expected a number above 0, got 0"),
        (json.dumps(row(rounds=True)), "rounds: expected a number or null, got True"),
        (json.dumps(row(ratio_p20=-1.0)), "ratio_p20: expected a number or null, got -1.0"),
        (json.dumps(row(torch=2)), "torch: expected text or null, got 2"),
        (json.dumps(row(extra=[])), r"extra: expected an object or null, got \[\]"),
        (json.dumps(row(extra={"tokens_per_s": float("inf")})), "Infinity is not a measurement"),
    ],
)
def test_a_malformed_line_is_named_with_its_file(line, message, tmp_path):
    path = write(tmp_path / "some.jsonl", row(), row("torch"))
    path.write_text(path.read_text(encoding="utf-8") + "\n" + line + "\n")  # blank lines count, and are no rows
    with pytest.raises(rows.ResultsError, match=rf"some\.jsonl, line 4: {message}"):
        rows.read([path])


def test_files_that_are_none(tmp_path):
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").mkdir()
    for path, message in (("bytes.jsonl", "not UTF-8"), ("none.jsonl", "no such file"), ("empty", "no results")):
        with pytest.raises(rows.ResultsError, match=f"{path}: .*{message}"):
            rows.read([tmp_path / path])


def test_a_folder_is_all_its_files_and_later_rows_replace_earlier_ones(tmp_path):
    write(tmp_path / "a.jsonl", row(median_ms=1.0), run_line())
    write(tmp_path / "b.jsonl", row(median_ms=2.0), row(median_ms=3.0, cuda="13.0"))
    (tmp_path / "notes.txt").write_text("no rows")
    found = rows.read([tmp_path])
    assert [r.median_ms for r in found.rows] == [2.0, 3.0] and len(found.runs) == 1
    assert found.machines() == ["A CPU, AVX2, 2 threads", "A CPU"], "on a GPU the host's threads do not matter"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.jsonl")), ids=lambda file: file.stem)
def test_a_row_that_is_read_and_written_again_is_the_same_line(file, tmp_path):
    """The committed rows, and keys that a newer version may have added."""
    lines = file.read_text(encoding="utf-8").splitlines()
    newer = json.dumps(json.loads(lines[-1]) | {"watts": 300.5})
    for line in [*lines, newer]:
        assert rows.from_json(line).to_json() == line
    again = tmp_path / "again.jsonl"
    again.write_text("\n".join(lines), encoding="utf-8")
    first = rows.read([again]).rows[0]
    rows.write(again, [first], rows.Run(device="A CPU", ops=["a new one"]))
    written = again.read_text(encoding="utf-8").splitlines()
    assert len(written) == len(lines) + 1 and set(lines) < set(written) and written[-1] == first.to_json()


def test_a_row_replaces_the_one_it_repeats(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"

    def add(n: int, *made: tuple[str, str, float]) -> None:
        work = {"dtype": "f", "implementation": "x", "direction": "forward", "device": "A CPU", "threads": n}
        new = [rows.Row(op=op, shape=shape, median_ms=ms, **work) for op, shape, ms in made]
        rows.write(path, new, rows.Run(device="A CPU", threads=n, ops=[op for op, _, _ in made]))

    add(1, ("a", "1", 1.0), ("a", "2", 2.0))
    add(2, ("b", "1", 3.0))
    add(3, ("a", "1", 4.0))
    found = rows.read([path])
    assert [(r.op, r.shape, r.median_ms) for r in found.rows] == [("a", "2", 2.0), ("b", "1", 3.0), ("a", "1", 4.0)]
    assert [r.threads for r in found.runs] == [2, 3]


def test_the_hosts_share_is_in_the_rows_that_know_it():
    known = json.dumps(row(eager_ms=0.2, graph_ms=0.05, cuda="13.0"))
    assert rows.from_json(known).host_share == pytest.approx(0.75)
    written = json.loads(rows.from_json(known).to_json())
    assert (written["eager_ms"], written["graph_ms"]) == (0.2, 0.05)
    older = rows.from_json(json.dumps(row()))
    assert older.host_share is None and "eager_ms" not in json.loads(older.to_json())
    assert rows.from_json(json.dumps(row(eager_ms=1.0, graph_ms=1.2))).host_share == 0.0
