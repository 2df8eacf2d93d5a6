"""A report that is one file: headings, text, tables, code and pictures in an HTML page that needs nothing beside it.

    page = Report("Depth", "what keeps a deep network trainable")
    page.paragraph("Loss after 200 steps, by depth.")
    page.table(["layers", "loss"], [[2, 2.41], [8, 2.37]])
    page.figure(figure, "loss", "Loss by depth")
    page.write(Path("runs/depth"))          # runs/depth/report.html, and loss.png beside it

Pictures are drawn in the style of `fastgpt.plots`. The page can be read on a phone, where a wide table scrolls in a box
of its own, and in the dark, where a picture keeps its white ground.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import atomic_path
from .plots import png

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: break-word; }
h1 { margin-bottom: 0; line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #8884; }
.subtitle { margin-top: 0; opacity: .75; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #8884; text-align: left; white-space: nowrap; }
td.long { white-space: normal; min-width: 16rem; }
td.number, th.number { text-align: right; }
code, pre { font-family: ui-monospace, monospace; font-size: .875em; background: #8882; border-radius: 4px; }
code { padding: .1em .3em; }
pre { padding: .75rem 1rem; overflow-x: auto; line-height: 1.4; }
pre.sample { white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; } figcaption { opacity: .75; }
figure img { display: block; box-sizing: border-box; width: 100%; max-width: 44rem; height: auto; padding: .5rem;
  background: white; border: 1px solid #8884; border-radius: 6px; }
.note { border-left: .3rem solid #c80; padding-left: .75rem; }
@media (max-width: 30rem) { th, td { padding: .25rem .4rem; font-size: .875rem; } pre { padding: .5rem; } }
@media (prefers-color-scheme: dark) { figure img { filter: brightness(.88); } }
"""

NOTHING = "–"  # a cell without a value
WRITTEN_NUMBER = re.compile(r"[-+]?[\d,]+(\.\d+)?(e[-+]?\d+)?")


def counted(n: int, noun: str) -> str:
    """ "1 layer", "4 layers"."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def cell(value: Any) -> str:
    """A table's cell: floats with four significant digits, None as a dash."""
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The same table for a Markdown document, its cells padded so that it also reads well as plain text.

    "|" in a cell is escaped.
    """
    body = [[cell(value).replace("|", "\\|") for value in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(headers, *body, strict=True)]
    right = [_is_numeric(rows, i) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (width - 1) + ":" if r else "-" * width for width, r in zip(widths, right, strict=True)]
    return "\n".join([line(headers), line(rule), *map(line, body)])


def _is_numeric(rows: Sequence[Sequence[Any]], column: int) -> bool:
    """Whether the column holds nothing but numbers, written ones such as "+0.120" and dashes included."""
    values = [row[column] for row in rows if row[column] not in (None, NOTHING)]
    return bool(values) and all(
        isinstance(value, (int, float)) or WRITTEN_NUMBER.fullmatch(str(value)) for value in values
    )


def _with_code(text: str) -> str:
    """The text for HTML, and what is between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


LONG = 40  # letters; a table's cell that has more is wrapped


class Report:
    """A page that is put together from top to bottom and written once. In paragraphs, `a` between backticks is code."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.parts = [f"<h1>{html.escape(title)}</h1>"]
        self.pictures: dict[str, bytes] = {}
        if subtitle:
            self.parts.append(f'<p class="subtitle">{_with_code(subtitle)}</p>')

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        self.parts.append(f"<p>{_with_code(text)}</p>")

    def note(self, text: str) -> None:
        """A paragraph that must not be overlooked."""
        self.parts.append(f'<p class="note">{_with_code(text)}</p>')

    def code(self, text: str) -> None:
        """Code, whose line breaks and blanks stay: a long line is scrolled."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def sample(self, text: str) -> None:
        """Text that a model wrote, whose line breaks and blanks stay: a long line is wrapped."""
        self.parts.append(f'<pre class="sample">{html.escape(text)}</pre>')

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Columns of nothing but numbers are aligned to the right. Cells as `cell` writes them."""
        kinds = [' class="number"' if _is_numeric(rows, i) else "" for i in range(len(headers))]
        head = "".join(
            f'<th scope="col"{kind}>{html.escape(text)}</th>' for kind, text in zip(kinds, headers, strict=True)
        )
        body = "".join(
            "<tr>" + "".join(_cell(kind, cell(value)) for kind, value in zip(kinds, row, strict=True)) + "</tr>\n"
            for row in rows
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
        self.parts.append(f'<div class="scroll" tabindex="0">{table}</div>')

    def figure(self, figure: Any, name: str, caption: str = "") -> None:
        """A matplotlib figure, which `write` leaves as `name`.png, too. The caption is also its alternative text."""
        if name in self.pictures:
            raise ValueError(f"name: this report has a picture called {name!r} already")
        self.pictures[name] = png(figure)
        source = base64.b64encode(self.pictures[name]).decode()
        shown = html.escape(caption or name, quote=True)
        self.parts.append(
            f'<figure><img alt="{shown}" src="data:image/png;base64,{source}"><figcaption>{shown}</figcaption></figure>'
        )

    def write(self, folder: Path) -> Path:
        """Write `folder`/report.html and each picture beside it, whole or not at all; returns the page's path."""
        page = folder / "report.html"
        for name, picture in self.pictures.items():
            with atomic_path(folder / f"{name}.png") as temporary:
                temporary.write_bytes(picture)
        with atomic_path(page) as temporary:
            temporary.write_text(
                '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
                '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
                '<meta name="color-scheme" content="light dark">\n'
                f"<title>{html.escape(self.title)}</title>\n"
                f"<style>{STYLE}</style>\n" + "\n".join(self.parts) + "\n</html>\n",
                encoding="utf-8",
            )
        return page


def _cell(kind: str, text: str) -> str:
    long = ' class="long"' if len(text) > LONG else kind
    return f"<td{long}>{html.escape(text)}</td>"
