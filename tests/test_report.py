"""Reports: one file that needs nothing beside it, and the same tables as Markdown."""

import base64
import re

import pytest

from fastgpt.report import Report, cell, markdown_table, pyplot


def _figure():
    figure, axes = pyplot().subplots()
    axes.plot([0, 1], [1, 0])
    return figure


def test_page_needs_nothing_beside_it(tmp_path):
    page = Report("A <title>", "and what it is about")
    page.heading("Losses & more")
    page.paragraph("2 < 3")
    page.code("x = 1\n\ty")
    page.table(["stage", "loss"], [["bigram", 2.4567891], ["gpt", None]])
    page.figure(_figure(), "curve", 'a "curve"')
    text = page.write(tmp_path / "new").read_text(encoding="utf-8")

    assert "<h1>A &lt;title&gt;</h1>" in text and "Losses &amp; more" in text and "2 &lt; 3" in text
    assert "<pre>x = 1\n\ty</pre>" in text
    assert '<td class="number">2.457</td>' in text and '<td class="number">–</td>' in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    (embedded,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    picture = (tmp_path / "new" / "curve.png").read_bytes()
    assert base64.b64decode(embedded) == picture and picture.startswith(b"\x89PNG")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["curve.png", "report.html"]


def test_two_pictures_of_one_name_are_refused():
    page = Report("t")
    page.figure(_figure(), "same")
    with pytest.raises(ValueError, match="same"):
        page.figure(_figure(), "same")


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError):
        Report("t").table(["a", "b"], [[1, 2, 3]])


def test_markdown_table():
    table = markdown_table(["name", "ms"], [["a|b", 1.23456], ["c", 12345.6]])
    assert table.splitlines() == ["| name | ms |", "| --- | ---: |", "| a\\|b | 1.235 |", "| c | 12,346 |"]


def test_cells():
    values = (None, 3, 12000, True, 0.00012346, 1.0, "x")
    assert [cell(value) for value in values] == ["–", "3", "12,000", "True", "0.0001235", "1", "x"]
