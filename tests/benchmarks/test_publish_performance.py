"""The page of performance: a step by kind of work, cases before and now under their limits, and the levers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmark_rows import cells_of, row, run_line, write
from fastgpt.benchmarks.publish import levers, performance, pictures
from figures import faults

STEP = {"op": "train_step", "shape": "B2 T4", "direction": "step", "bytes": 1e6, "flops": 1e9, "date": "2026-01-02"}
TOKEN = {"op": "generate", "shape": "L1", "direction": "generate", "bytes": 1e9, "flops": 5e8, "date": "2026-01-02"}
KINDS = {"products": 6.123, "python": 0.04, "profiled step": 123.4}


@pytest.fixture
def results(tmp_path) -> Path:
    """Two cases of one machine, of which the step was measured again; and two levers."""
    of_products = {"roofline_fraction": 0.5, "ceiling": "products at 200 GFLOP/s", "extra": {"ms_by_kind": KINDS}}
    write(
        tmp_path / "before" / "cpu.jsonl", row(median_ms=20.0, commit="a" * 40, **STEP), row(commit="b" * 40, **TOKEN)
    )
    write(
        tmp_path / "cpu.jsonl",
        run_line(ops=["train_step", "generate"]),
        row(median_ms=10.0, ratio=2.5, best_peer="nanoGPT", commit="b" * 40, **of_products, **STEP),
        row("nanoGPT", 25.0, 2.5, commit="b" * 40, **STEP),
        row(commit="b" * 40, **TOKEN),
    )
    write(tmp_path / "other.jsonl", row(device="Another CPU"))
    example = re.search(r"( +\[\[lever\]\].*?)\n\n?$", levers.__doc__, re.DOTALL)[1]
    (tmp_path / "levers").mkdir()
    dropped = example.replace("true", "false").replace("0.95", "1.3").replace("0.9  ", '"less"')
    (tmp_path / "levers" / "layer_norm.toml").write_text(f"{dropped}\n{example}")
    return tmp_path


def test_the_page_says_what_the_rows_and_levers_say(results):
    text = performance.markdown(results)
    lines = [" | ".join(cells) for cells in cells_of(text)]
    for line in (
        "B2 T4 | fastgpt | 10 | 6.12 | 0.0 | 123",
        "train_step | B2 T4 | 20 (19.4 – 20.6) | 10 (9.7 – 10.3) | 2.00x | 50 % of products at 200 GFLOP/s "
        "| nanoGPT, 2.50x (2.42 – 2.58)",
    ):
        assert line in lines
    assert "Before: commit aaaaaaaaaa, date 2026-01-02. Now: commit bbbbbbbbbb, date 2026-01-02." in text
    assert "\n### Layer norm\n" in text and "Measured on AMD EPYC family 26 model 2, 2 cores." in text
    kept, dropped = (line for line in lines if line.startswith("the input's gradient"))
    assert "| 0.9 ms | 1.3 ms | 0.95 ms | 1.37x | kept | " in kept and kept.endswith("| 12 | `0123456`")
    assert "| less | 1.3 ms | 1.3 ms | 1.00x | dropped | " in dropped
    assert "L1" not in text and "Another CPU" not in text, "what was not measured again, and a machine without steps"


def test_a_gain_is_of_a_time_or_a_rate(results):
    file = results / "levers" / "layer_norm.toml"
    text = file.read_text()
    for unit, gain in (("ms", "1.37x"), ("GFLOP/s", "0.73x"), ("nats", "–")):
        file.write_text(text.replace('unit = "ms"', f'unit = "{unit}"'))
        assert f"| 0.95 {unit} | {gain} | kept |" in re.sub(" +", " ", performance.markdown(results))


def test_levers_of_several_devices_name_them(results):
    file = results / "levers" / "layer_norm.toml"
    file.write_text(file.read_text().replace("AMD", "Intel", 1))
    text = performance.markdown(results)
    assert "Measured on" not in text and "| Intel EPYC" in text and "| AMD EPYC" in text


def test_a_picture_has_the_limits_and_a_point_for_each(results):
    (picture,) = performance.pictures(results)
    assert picture.name == "performance-cpu-train-step-b2-t4"
    assert picture.caption == "train_step B2 T4: 20 ms before, 10 ms now"
    figure = pictures.case_roofline_figure(picture.roofline)
    assert faults(figure) == []
    (axes,) = figure.axes
    memory, products, before, now, peer = axes.lines
    assert memory.get_ydata()[0] / memory.get_xdata()[0] == pytest.approx(15e9) and memory.get_linestyle() == "--"
    assert list(products.get_ydata()) == pytest.approx([2e11, 2e11]), "half of the time that the step took"
    assert products.get_label() == "its limit: products at 200 GFLOP/s"
    points = [float(line.get_ydata()[0]) for line in (before, now, peer)]
    assert points == pytest.approx([5e10, 1e11, 4e10])
    assert before.get_markerfacecolor() == "white" != now.get_markerfacecolor()
    assert [text.get_text() for text in axes.texts] == ["FastGPT before, 20 ms", "FastGPT now, 10 ms", "nanoGPT, 25 ms"]


def test_work_that_is_limited_by_memory_lies_under_its_bandwidth(results):
    """A second is the least time to read a gigabyte at the bandwidth that the row was limited by."""
    limited = {"roofline_fraction": 0.5, "ceiling": "reading 1e+03 MB at 1 GB/s", "median_ms": 2000.0}
    with open(results / "cpu.jsonl", "a", encoding="utf-8") as file:
        file.write(write(results / "one.txt", row(commit="c" * 40, **limited, **TOKEN)).read_text())
    _, picture = performance.pictures(results)
    found = picture.roofline
    assert (found.bytes_per_s, found.flops_per_s, found.is_of_products) == (1e9, 160e9, False)
    memory, products, *_ = pictures.case_roofline_figure(found).axes[0].lines
    assert memory.get_linewidth() > products.get_linewidth()


def test_the_command_writes_the_page_and_removes_pictures_of_cases_that_are_gone(results, tmp_path, capsys):
    out = tmp_path / "docs"
    (out / "images").mkdir(parents=True)
    for name in ("performance-gone.png", "study.png"):
        (out / "images" / name).write_bytes(b"")
    command = ["--results", str(results), "--out", str(out)]
    assert performance.main(command) == 0
    assert (out / "performance.md").read_text(encoding="utf-8") == performance.markdown(results)
    assert {path.name for path in (out / "images").iterdir()} == {"performance-cpu-train-step-b2-t4.png", "study.png"}
    linked = re.findall(r"\]\((images/.*?)\)", performance.markdown(results))
    assert linked == ["images/performance-cpu-train-step-b2-t4.png"]
    (results / "levers" / "bad.toml").write_text("[[lever]]\nname = 'x'")
    assert performance.main(command) == 2 and "bad.toml, lever 1 (x): after: is missing" in capsys.readouterr().err
