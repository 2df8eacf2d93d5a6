"""The report of the rows: its tables, its ratios and its roofline."""

from __future__ import annotations

import base64
import re
from itertools import pairwise
from pathlib import Path

import pytest

from benchmark_rows import cells_of, row, run_line, write
from fastgpt.benchmarks.publish import pictures, report, rows
from figures import faults

NEEDED = ("op", "shape", "dtype", "implementation", "direction", "device", "median_ms")


def some_results(tmp_path: Path) -> rows.Results:
    work = {"bytes": 4e6, "flops": 1e6, "roofline_fraction": 0.5}
    more = {"peak_bytes": 12_300_000, "parity_error_ratio": 0.9312, "extra": {"gb_per_s": 7.5049, "steps": None}}
    rates = {"read": 80e9, "write": 70e9, "copy": 90e9, "add": 60e9}
    moved = [[way, size, rate] for way, rate in sorted(rates.items()) for size in (2**18, 12_345_678)]
    lines = [
        run_line(date="2026-01-02", ceilings=run_line()["ceilings"] | {"moved": moved}),
        row(ratio=1.6, best_peer="torch.compile", verdict="faster", backend="native", **work, **more),
        row("torch", 20.0, 2.0, **work),
        row("torch.compile", 16.0, 1.6, **work),
        row(shape="B1|T1", ratio=1.01, best_peer="torch", verdict="noise", backend="native"),
        row("torch", 10.1, 1.01, shape="B1|T1"),
        row(op="import", direction="import", median_ms=1234.5, p20_ms=None, p80_ms=None, rounds=1),
    ]
    return rows.read([write(tmp_path / "rows.jsonl", *lines)])


def test_the_markdown_says_what_the_rows_say(tmp_path):
    text = report.markdown(some_results(tmp_path))
    assert text == report.markdown(some_results(tmp_path))
    assert "\n## A CPU, AVX2, 2 threads\n" in text
    assert "\ntorch 2.13.0, triton 3.9.0.\n" in text and "\nfloat32, forward, backend native.\n" in text
    lines = [" | ".join(cells) for cells in cells_of(text)]
    for line in (
        "embedding | forward | 2 | 1 | 1 | 0 | 1.01x | 1.27x | 1.60x",
        "B4 T64 | 10 (9.7 – 10.3) | 7.5 | 50 % | 12.3 | 0.93 | faster than torch.compile | 2.00x (1.94 – 2.06) | "
        "1.60x (1.55 – 1.65)",
        "B1\\|T1 | 10 (9.7 – 10.3) | – | – | – | – | noise against torch | 1.01x (0.98 – 1.04) | –",
        "B4 T64 | 1,230",  # an op without peers, measured once
        "embedding | float32 | 15.0 GB/s | 160 GFLOP/s | 0.25 MiB: 80 / 70 / 90 / 60 | 2026-01-02",
        "liger-kernel | embedding | its kernels run on CUDA devices only",
    ):
        assert line in lines
    assert "![" in text and "![" not in report.markdown(some_results(tmp_path), pictures=None)


def test_a_graph_has_no_peak_of_memory(tmp_path):
    eager, graph = row(peak_bytes=12_300_000), row(shape="B4 T64, CUDA graph", peak_bytes=512)
    text = report.markdown(rows.read([write(tmp_path / "rows.jsonl", run_line(), eager, graph)]))
    lines = cells_of(text)
    header = next(cells for cells in lines if "peak MB" in cells)
    peaks = {cells[0]: cells[header.index("peak MB")] for cells in lines if len(cells) == len(header)}
    assert peaks["B4 T64"] == "12.3" and peaks["B4 T64, CUDA graph"] == "–"


def test_the_page_and_its_pictures(tmp_path):
    found = some_results(tmp_path)
    html = report.write(found, tmp_path / "out").read_text(encoding="utf-8")
    pictures = {path.name for path in (tmp_path / "out" / "results").glob("*.png")}
    assert pictures == {f"a-cpu-avx2-2-threads-{name}.png" for name in ("embedding", "roofline")}
    linked = re.findall(r"\]\((results/.*?)\)", (tmp_path / "out" / "results.md").read_text(encoding="utf-8"))
    assert {f"results/{name}" for name in pictures} == set(linked)
    assert not re.search(r'(src|href)="(?!data:)', html) and "<script" not in html
    for embedded in re.findall(r'src="data:image/png;base64,([^"]+)"', html):
        assert base64.b64decode(embedded).startswith(b"\x89PNG")
    assert "B1|T1" in html and "faster than torch.compile" in html


def test_the_points_are_the_ratios(tmp_path):
    figure = report.ratio_figure("embedding", some_results(tmp_path).of_op("embedding"))
    assert faults(figure) == []
    (axes,) = figure.axes
    equal, *lines = axes.lines
    assert list(equal.get_xdata()) == [1.0, 1.0]
    assert [line.get_xdata()[0] for line in lines[1::2]] == pytest.approx([2.0, 1.6, 1.01])
    spans = [list(line.get_xdata()) for line in lines[::2]]
    assert spans == [pytest.approx([r * 0.97, r * 1.03]) for r in (2.0, 1.6, 1.01)], "noise bounds"
    assert [line.get_markerfacecolor() == "white" for line in lines[1::2]] == [False, False, True], "noise is hollow"
    assert [text.get_text() for text in axes.texts if "noise" in text.get_text()] == ["1.01 (noise)"]


def test_ticks_are_apart_and_1_is_among_them():
    for low, high in ((0.8, 1.25), (0.01, 1000.0), (0.9, 30.0)):
        ticks = pictures._ticks(low, high)
        assert 1.0 in ticks and low <= ticks[0] and ticks[-1] <= high
        assert all(b / a >= (high / low) ** (1 / 9) - 1e-9 for a, b in pairwise(ticks))


def test_the_roofline_has_its_runs_ceilings_and_a_point_for_ours_and_the_best_peer(tmp_path):
    figure = report.roofline_figure(some_results(tmp_path))
    assert faults(figure) == []
    (axes,) = figure.axes
    roof, peer, ours = axes.lines
    assert max(roof.get_ydata()) == 160e9 and roof.get_ydata()[0] / roof.get_xdata()[0] == pytest.approx(15e9)
    assert list(ours.get_xdata()) == list(peer.get_xdata()) == [0.25]
    assert list(ours.get_ydata()) == pytest.approx([1e8]) and list(peer.get_ydata()) == pytest.approx([1e6 / 0.016])


def test_rows_with_nothing_but_a_time_make_a_report(tmp_path):
    bare = {key: row()[key] for key in ("kind", *NEEDED)}
    found = rows.read([write(tmp_path / "rows.jsonl", bare, run_line(ceilings=None, absent=None))])
    assert ["B4 T64", "10"] in cells_of(report.markdown(found))
    assert report.write(found, tmp_path / "out").exists()
    assert not list((tmp_path / "out").rglob("*.png"))


def test_no_rows_is_an_error(tmp_path):
    with pytest.raises(rows.ResultsError, match="no rows"):
        report.write(rows.read([write(tmp_path / "rows.jsonl", run_line())]), tmp_path / "out")


def test_the_hosts_share_has_its_columns_where_it_is_known(tmp_path):
    gpu = row(device="A GPU", cuda="13.0", eager_ms=0.2, graph_ms=0.05)
    text = report.markdown(rows.read([write(tmp_path / "rows.jsonl", gpu, row())]))
    with_host, without = text.split("\n## A CPU")
    columns = ("without hiding the host", "as a graph", "host's share")
    assert all(column in with_host and column not in without for column in columns)
    assert "0.2 | 0.05 | 75 %" in " | ".join(cells_of(with_host)[-1])
