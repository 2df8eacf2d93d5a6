"""A report that is one file: headings, text, tables, code and pictures in an HTML page that needs nothing beside it.

    page = Report("Depth", "what keeps a deep network trainable")
    page.paragraph("Loss after 200 steps, by depth.")
    page.table(["layers", "loss"], [[2, 2.41], [8, 2.37]])
    page.figure(figure, "loss", "Loss by depth")
    page.write(Path("runs/depth"))          # runs/depth/report.html, and loss.png beside it

Pictures are drawn by matplotlib, which `pyplot()` imports where one is wanted.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import atomic_path

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #8884; }
.subtitle { margin-top: 0; opacity: .7; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
td { font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #8884; text-align: left; }
td.number, th.number { text-align: right; }
pre { background: #8881; padding: .75rem 1rem; overflow-x: auto; font-size: 14px; line-height: 1.4; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; background: white; } figcaption { opacity: .7; }
"""


class ReportError(RuntimeError):
    """A report that cannot be made; the message says what is missing and how to get it."""


def pyplot() -> Any:
    """matplotlib.pyplot on a canvas that needs no screen. Raises ReportError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ReportError("matplotlib is not installed: pip install 'fastgpt-kernels[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def cell(value: Any) -> str:
    """A table's cell: floats with four significant digits, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The same table for a Markdown document; "|" in a cell is escaped."""
    lines = [[*headers], ["---:" if _is_numeric(rows, i) else "---" for i in range(len(headers))]]
    lines += [[cell(value).replace("|", "\\|") for value in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _is_numeric(rows: Sequence[Sequence[Any]], column: int) -> bool:
    values = [row[column] for row in rows if row[column] is not None]
    return bool(values) and all(isinstance(value, (int, float)) for value in values)


class Report:
    """A page that is put together from top to bottom and written once."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.parts = [f"<h1>{html.escape(title)}</h1>"]
        self.pictures: dict[str, bytes] = {}
        if subtitle:
            self.parts.append(f'<p class="subtitle">{html.escape(subtitle)}</p>')

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        """Text whose line breaks and spaces stay: code, or a sample of a model."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Columns of nothing but numbers are aligned to the right. Cells as `cell` writes them."""
        kinds = [' class="number"' if _is_numeric(rows, i) else "" for i in range(len(headers))]
        head = "".join(f"<th{kind}>{html.escape(text)}</th>" for kind, text in zip(kinds, headers, strict=True))
        body = "".join(
            "<tr>" + "".join(f"<td{k}>{html.escape(cell(v))}</td>" for k, v in zip(kinds, row, strict=True)) + "</tr>\n"
            for row in rows
        )
        self.parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>")

    def figure(self, figure: Any, name: str, caption: str = "") -> None:
        """A matplotlib figure, closed afterwards; `write` also leaves it as `name`.png beside the page."""
        if name in self.pictures:
            raise ValueError(f"name: this report has a picture called {name!r} already")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight", facecolor="white")
        pyplot().close(figure)
        self.pictures[name] = buffer.getvalue()
        source = base64.b64encode(buffer.getvalue()).decode()
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
                f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(self.title)}</title>\n'
                f"<style>{STYLE}</style>\n" + "\n".join(self.parts) + "\n</html>\n",
                encoding="utf-8",
            )
        return page
