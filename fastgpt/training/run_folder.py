"""A run's folder: config.toml, metrics.jsonl, loss.png and checkpoint/."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from ..files import FileError, atomic_path, readable
from . import TrainingError


class RunFolder:
    """config.toml, metrics.jsonl, loss.png and checkpoint/ of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.latest = path / "checkpoint" / "latest.safetensors"
        self.best = path / "checkpoint" / "best.safetensors"

    def create(self, settings: dict[str, Any]) -> None:
        """Start a new run. A folder that already holds one is refused: resuming it, or another folder, is the way."""
        if self.latest.exists() or (self.metrics_path.exists() and self.metrics_path.stat().st_size > 0):
            raise TrainingError(f"{self.path}: already holds a run; add --resume to go on, or give another --out")
        try:
            self.latest.parent.mkdir(parents=True, exist_ok=True)
            self.metrics_path.touch()
        except OSError as error:
            raise TrainingError(
                f"{self.path}: the output folder cannot be written: {error.strerror or error}"
            ) from error
        self.write_settings(settings)

    def write_settings(self, settings: dict[str, Any]) -> None:
        import tomli_w

        with atomic_path(self.path / "config.toml") as temporary:
            text = tomli_w.dumps({k: v for k, v in settings.items() if v is not None})
            temporary.write_text(readable(text), encoding="utf-8")

    def read_settings(self) -> dict[str, Any]:
        """The settings in config.toml, which leaves out those that are None."""
        text = (self.path / "config.toml").read_text(encoding="utf-8-sig")  # some editors begin with a byte order mark
        return tomllib.loads(text)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row to metrics.jsonl. The file is opened for each, so that a full disk is met here and nowhere else."""
        try:
            with open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise self.failure(f"{self.metrics_path}: cannot be written: {error.strerror or error}") from error

    def failure(self, problem: str, remedy: str = "") -> TrainingError:
        """The error that ends a run: the problem, the last good checkpoint, and what to try."""
        last = self.latest if self.latest.exists() else "none"
        return TrainingError(f"{problem}; last good checkpoint: {last}{remedy and '. '}{remedy}")

    def rewind(self, step: int) -> None:
        """Drop the metrics of steps after `step`: the resumed run writes them again."""
        if not self.metrics_path.exists():
            return
        kept = [row for row in read_metrics(self.metrics_path) if row["step"] <= step]
        with atomic_path(self.metrics_path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. A last line cut off by a crash is left out; any other bad line is an error."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise TrainingError(f"{path}: line {number} is not JSON") from None
    return rows


def plot_loss(metrics_path: Path, out: Path) -> str | None:
    """Draw the loss curve. Returns why not, where matplotlib is not installed or the picture cannot be written."""
    try:
        import matplotlib
    except ImportError:
        return "no loss.png: matplotlib is not installed (pip install 'fastgpt-kernels[plot]')"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(metrics_path)
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for split, style in (("train", {"lw": 0.8, "alpha": 0.6}), ("val", {"lw": 1.8, "marker": "o", "ms": 3})):
        points = [(row["step"], row["loss"]) for row in rows if row["split"] == split]
        if points:
            axes.plot(*zip(*points, strict=True), label=split, **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(readable(out.parent.name), parse_math=False)  # a dollar sign in a folder's name is no formula
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        with atomic_path(out) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    except FileError as error:
        return f"no loss.png: {error}"
    finally:
        plt.close(figure)
    return None
