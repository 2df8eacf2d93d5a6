"""Reports: one file that needs nothing beside it, and the same tables as Markdown."""

import base64
import re

import pytest

from fastgpt.plots import panels, styled
from fastgpt.report import STYLE, Report, cell, markdown_table


@styled
def _figure():
    figure, [[axes]] = panels(2.0)
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
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text, "for a phone"
    assert "color-scheme: light dark" in text and "prefers-color-scheme: dark" in text, "for the dark"
    assert '<td class="number">2.457</td>' in text and '<td class="number">–</td>' in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    (embedded,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    picture = (tmp_path / "new" / "curve.png").read_bytes()
    assert base64.b64decode(embedded) == picture and picture.startswith(b"\x89PNG")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["curve.png", "report.html"]


def test_what_stands_between_backticks_is_code():
    page = Report("t", "of `a < b`")
    page.paragraph("run `fastgpt study` & `x`; a lone ` stays")
    assert page.parts[1:] == [
        '<p class="subtitle">of <code>a &lt; b</code></p>',
        "<p>run <code>fastgpt study</code> &amp; <code>x</code>; a lone ` stays</p>",
    ]


def test_every_picture_has_a_text_that_stands_for_it():
    page = Report("t")
    page.figure(_figure(), "losses", 'Losses of "a" & b')
    page.figure(_figure(), "unnamed")
    images = re.findall(r"<img [^>]*>", "".join(page.parts))
    assert [re.search(r'alt="([^"]*)"', image)[1] for image in images] == ["Losses of &quot;a&quot; &amp; b", "unnamed"]


def test_what_is_wide_scrolls_or_wraps_in_a_box_of_its_own():
    """So that a phone shows the page at its own width: a table and code are scrolled, a model's text is wrapped."""
    page = Report("t")
    page.table(["a", "b"], [["short", "x" * 41]])
    page.sample("y" * 500)
    assert page.parts[1].startswith('<div class="scroll" tabindex="0"><table>') and page.parts[1].endswith(
        "</table></div>"
    )
    assert '<td>short</td><td class="long">' in page.parts[1]
    assert page.parts[2] == f'<pre class="sample">{"y" * 500}</pre>'
    for rule in (".scroll { overflow-x: auto;", "pre.sample { white-space: pre-wrap; overflow-wrap: anywhere; }"):
        assert rule in STYLE
    assert re.search(r"figure img \{[^}]*width: 100%;[^}]*background: white;", STYLE), "a picture is scaled, on white"


def test_two_pictures_of_one_name_are_refused():
    page = Report("t")
    page.figure(_figure(), "same")
    with pytest.raises(ValueError, match="same"):
        page.figure(_figure(), "same")


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError):
        Report("t").table(["a", "b"], [[1, 2, 3]])


def test_markdown_table():
    table = markdown_table(["name", "ms", "change"], [["a|b", 1.23456, "–"], ["c", 12345.6, "-0.5"]])
    assert table.splitlines() == [
        "| name |     ms | change |",
        "| ---- | -----: | -----: |",
        "| a\\|b |  1.235 |      – |",
        "| c    | 12,346 |   -0.5 |",
    ]


def test_cells():
    values = (None, 3, 12000, True, 0.00012346, 1.0, "x")
    assert [cell(value) for value in values] == ["–", "3", "12,000", "True", "0.0001235", "1", "x"]
