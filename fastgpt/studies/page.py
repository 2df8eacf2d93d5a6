"""What a study shows: its page, and the words and pictures that the pages of several studies share.

A page is an HTML report and the same as Markdown, made from the study's results alone.

    python -m fastgpt.studies.page docs

writes docs/studies.md and its pictures from docs/studies/*.json, the results that are committed.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..plots import styled
from ..report import Report, markdown_table
from . import load
from .settings import STUDIES, question

# ---- rows and words ----

# A model has learned something from the context if its loss is so many nats below the loss of token frequencies alone.
LEARNED = 0.05

Row = dict[str, Any]


def find_row(rows: Iterable[Row], **values: Any) -> Row:
    """The first row with these values, such as find_row(rows, depth=2, norm="pre")."""
    return next(row for row in rows if all(row[name] == value for name, value in values.items()))


def loss_text(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"


def listed(parts: Iterable[str], nothing: str = "none") -> str:
    return ", ".join(parts) or nothing


def counted(n: int, noun: str) -> str:
    """ "1 row", "8 rows"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def learned_bound(results: dict[str, Any]) -> float:
    """The loss below which a model has learned more than how often each token occurs."""
    return results["data"]["frequency_loss"] - LEARNED


def frequencies_text(results: dict[str, Any]) -> str:
    """A sentence without its full stop: the loss to compare a model's loss with."""
    loss = results["data"]["frequency_loss"]
    return f"A model that knows only how often each character occurs has a loss of {loss:.3f} nats"


def provenance(results: dict[str, Any]) -> str:
    """Device, versions, commit and date of the measurement."""
    return (
        f"{results['device']}, {counted(results['threads'], 'thread')}; Python {results['python']}, torch "
        f"{results['torch']}, fastgpt {results['fastgpt']}, commit {results['commit'] or 'of an installed package'}, "
        f"{results['date']}"
    )


# ---- pictures ----


def or_nan(values: Iterable[float | None]) -> list[float]:
    """The values of a curve: NaN, which leaves a gap, where a loss was not finite and results.json holds None."""
    return [math.nan if value is None else value for value in values]


# ---- the page ----


class Page(Report):
    """A report that is also kept as Markdown. Pictures are drawn unless `pictures` says not to."""

    def __init__(self, results: dict[str, Any], pictures: bool = True) -> None:
        name = results["study"]
        super().__init__(name.capitalize().replace("-", " "), question(name))
        self.name, self.draws = name, pictures
        self.markdown: list[str] = []
        load(name).show(results, self)
        self.paragraph(_measured_on(results))

    def paragraph(self, text: str) -> None:
        super().paragraph(text)
        self.markdown.append(textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False))

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        super().table(headers, rows)
        self.markdown.append(markdown_table(headers, rows))

    def picture(self, name: str, caption: str, draw: Callable[[], Any]) -> None:
        """The figure that `draw` gives, where pictures are wanted."""
        if self.draws:
            self.figure(styled(draw)(), name, caption)
        self.markdown.append(f"![{caption}](images/study-{self.name}-{name}.png)")

    def text(self) -> str:
        """What a terminal shows: words and tables."""
        return "\n\n".join([self.title, *(part for part in self.markdown if not part.startswith("!["))])


def _measured_on(results: dict[str, Any]) -> str:
    return (
        f"Measured on {provenance(results)}; the study took {results['seconds']:.0f} seconds, with seed "
        f"{results['settings']['seed']}."
    )


# ---- docs/studies.md ----

_PREFACE = """# Studies

Each of these is one command, `fastgpt study NAME`, on the models and kernels of this package: it measures, writes a
report (`report.html`, pictures, `results.json`) and prints what is below. The words are made from the numbers, and this
page from the results in [docs/studies](studies), by `python -m fastgpt.studies.page docs`; a test compares them. Losses
are in nats per token, on text that was not trained on; training is that of `fastgpt train`, in float32. The text,
tinyshakespeare.txt, is what `--data tinyshakespeare` downloads.
"""


def _command(results: dict[str, Any]) -> str:
    """The command that was given: the settings that differ from the study's defaults; a download by its name."""
    downloads = {"tinyshakespeare.txt": "tinyshakespeare"}
    defaults = STUDIES[results["study"]]()
    words = ["fastgpt", "study", results["study"]]
    for name, value in results["settings"].items():
        if value != getattr(defaults, name):
            option = f"--{name.replace('_', '-')}"
            value = downloads.get(value, value) if isinstance(value, str) else value
            words += [option] if value is True else [option, json.dumps(value) if " " in str(value) else str(value)]
    return " ".join(words)


def studies_page(docs: Path, pictures: bool = True) -> tuple[str, dict[str, bytes]]:
    """The text of docs/studies.md and its pictures by file name, from docs/studies/*.json."""
    parts, images = [_PREFACE.rstrip()], {}
    for name in STUDIES:
        file = docs / "studies" / f"{name}.json"
        if not file.exists():
            continue
        results = json.loads(file.read_text(encoding="utf-8"))
        page = Page(results, pictures)
        parts += [f"## {page.title}", question(name), f"```sh\n{_command(results)}\n```", *page.markdown]
        images.update({f"study-{name}-{picture}.png": data for picture, data in page.pictures.items()})
    return "\n\n".join(parts) + "\n", images


def main() -> None:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "studies").is_dir():
        sys.exit("usage: python -m fastgpt.studies.page DOCS     (a folder with studies/NAME.json in it)")
    docs = Path(sys.argv[1])
    text, images = studies_page(docs)
    (docs / "images").mkdir(exist_ok=True)
    for old in (docs / "images").glob("study-*.png"):
        old.unlink()
    for name, data in images.items():
        (docs / "images" / name).write_bytes(data)
    (docs / "studies.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
