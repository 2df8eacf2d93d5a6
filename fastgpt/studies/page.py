"""What a study shows: its page, and the words and pictures that the pages of several studies share.

A page is an HTML report and the same as Markdown, made from the study's results alone. It has the question, what was
done, a picture, and three sentences that say what was seen; below them are all numbers.

    python -m fastgpt.studies.page docs

writes docs/studies.md and its pictures from docs/studies/*.json, the results that are committed.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..plots import styled
from ..report import Report, counted, markdown_table
from ..settings import flag
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


def together(parts: Iterable[Any]) -> str:
    """ "2", "2 and 6", "2, 6 and 16"."""
    *first, last = map(str, parts)
    return f"{', '.join(first)} and {last}" if first else last


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
        self.name, self.question, self.draws = name, question(name), pictures
        super().__init__(name.capitalize().replace("-", " "), self.question)
        self.blocks: list[tuple[str, str]] = []  # what a part is, and its Markdown
        if results["settings"]["quick"]:
            self.note(_preview(results))
        load(name).show(results, self)
        self.paragraph(_measured_on(results))

    def paragraph(self, text: str) -> None:
        super().paragraph(text)
        self.blocks.append(("words", text))

    def note(self, text: str) -> None:
        super().note(text)
        self.blocks.append(("words", text))

    def findings(self, *sentences: str) -> None:
        """What was seen: a few sentences, each of which follows from the numbers."""
        self.paragraph(" ".join(sentences))

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        super().table(headers, rows)
        self.blocks.append(("table", markdown_table(headers, rows)))

    def picture(self, name: str, caption: str, draw: Callable[[], Any], nothing: str = "") -> None:
        """The figure that `draw` gives, where pictures are wanted; where there is `nothing` to draw, why not."""
        if nothing:
            self.paragraph(f'No picture of "{caption}": {nothing}.')
            return
        if self.draws:
            self.figure(styled(draw)(), name, caption)
        self.blocks.append(("picture", f"![{caption}](images/study-{self.name}-{name}.png)"))

    @contextlib.contextmanager
    def numbers(self) -> Iterator[None]:
        """What comes below the sentences: tables and what explains them, folded away in a Markdown document."""
        self.heading("All numbers")
        self.blocks.append(("mark", "<details>\n<summary>All numbers</summary>"))
        yield
        self.blocks.append(("mark", "</details>"))

    def markdown(self) -> list[str]:
        """The parts for a Markdown document, its lines of at most 120 characters."""
        return [filled(text, 120) if kind == "words" else text for kind, text in self.blocks]

    def text(self, columns: int | None = None) -> str:
        """What a terminal of so many columns shows: words, and the tables that it is wide enough for."""
        width = columns or 120
        parts = [self.title, filled(self.question, width)]
        for kind, text in self.blocks:
            if kind == "words":
                parts.append(filled(text, width))
            elif kind == "table":
                wide = text.index("\n")
                is_too_wide = columns is not None and wide > columns
                told = filled(f"(The report has a table here, which is {wide} letters wide.)", width)
                parts.append(told if is_too_wide else text)
        return "\n\n".join(parts)


def terminal_width() -> int | None:
    """How many columns the terminal has; None where what is printed goes to a file or a program."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def filled(text: str, width: int) -> str:
    """The text in lines of at most 120 letters, and of no more than `width`; words stay whole."""
    return textwrap.fill(text, min(width, 120), break_long_words=False, break_on_hyphens=False)


def duration(seconds: float) -> str:
    """ "less than a second", "28 seconds", "6 min 28 s"."""
    if seconds < 0.5:
        return "less than a second"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else counted(rest, "second")


NO_SIZES = ("data", "quick", "seed", "prompt")  # settings that make a study neither larger nor smaller


def preview(command: str, settings: dict[str, Any], defaults: Any) -> str:
    """The note on top of a page that was measured with --quick: what was made smaller, and what to run instead."""
    sizes = [name for name in settings if name not in NO_SIZES and getattr(defaults, name) is not None]
    changed = [
        f"{name.replace('_', ' ')} {settings[name]} (in full: {getattr(defaults, name)})"
        for name in sizes
        if settings[name] != getattr(defaults, name)
    ]
    return (
        f"Preview: measured with --quick, and so at a smaller size: {'; '.join(changed)}. What is said below holds for "
        f"this size; `{command}` without --quick measures in full."
    )


def _preview(results: dict[str, Any]) -> str:
    return preview(f"fastgpt study {results['study']}", results["settings"], STUDIES[results["study"]]())


def _measured_on(results: dict[str, Any]) -> str:
    return (
        f"Measured on {provenance(results)}; the study took {duration(results['seconds'])}, with seed "
        f"{results['settings']['seed']}."
    )


# ---- docs/studies.md ----

_PREFACE = """# Studies

Each of these is one command, `fastgpt study NAME`: it measures, writes a report (`report.html`, pictures,
`results.json`) and prints what is below. With `--quick` it makes a preview in about half a minute on two cores. The
sentences are made from the numbers, and this page from the results in [docs/studies](studies), by
`python -m fastgpt.studies.page docs`; a test compares them. Losses are in nats per token, on text that was not trained
on; training is that of `fastgpt train`, in float32. The text, tinyshakespeare.txt, is what `--data tinyshakespeare`
downloads.
"""


def _command(results: dict[str, Any]) -> str:
    """The command that was given: the settings that differ from the study's defaults; a download by its name."""
    downloads = {"tinyshakespeare.txt": "tinyshakespeare"}
    defaults = STUDIES[results["study"]]()
    words = ["fastgpt", "study", results["study"]]
    for name, value in results["settings"].items():
        if value != getattr(defaults, name):
            value = downloads.get(value, value) if isinstance(value, str) else value
            words += (
                [flag(name)] if value is True else [flag(name), json.dumps(value) if " " in str(value) else str(value)]
            )
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
        parts += [f"## {page.title}", question(name), f"```sh\n{_command(results)}\n```", *page.markdown()]
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
