"""How the studies put what they measured into words: rows are found, and numbers become parts of sentences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LEARNED = 0.05  # nats below the loss of knowing each token's frequency: then something of the context was learned

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
    """A whole sentence but for its end."""
    loss = results["data"]["frequency_loss"]
    return f"A model that knows only how often each character occurs has a loss of {loss:.3f} nats"


def provenance(results: dict[str, Any]) -> str:
    """Device, versions, commit and date of the measurement."""
    return (
        f"{results['device']}, {counted(results['threads'], 'thread')}; Python {results['python']}, torch "
        f"{results['torch']}, fastgpt {results['fastgpt']}, commit {results['commit'] or 'of an installed package'}, "
        f"{results['date']}"
    )
