"""A run's folder: config.toml, metrics.jsonl, loss.png and checkpoint/."""

from __future__ import annotations

import json
import shutil
import statistics
import tomllib
from pathlib import Path
from typing import Any

from ..checkpoint import newest
from ..files import FileError, atomic_path, make_output_folder, readable
from ..plots import BLUE, INK, VERMILION, PlotError, panels, png, styled
from ..sharded import step_directories
from . import TrainingError

HOW_TO_GO_ON = "add --resume to go on, or give another --out"  # where a folder already holds a run


class RunFolder:
    """config.toml, metrics.jsonl, loss.png and checkpoint/ of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoint"
        self.latest = self.checkpoints / "latest.safetensors"  # of a run of one process, as `best`
        self.best = self.checkpoints / "best.safetensors"
        self.logged_until: int | None = None  # the step of the last row there was before `rewind`

    def create(self, settings: dict[str, Any]) -> None:
        """Start a new run. A folder that already holds one is refused: resuming it, or another folder, is the way."""
        if self.has_begun():
            raise TrainingError(f"{self.path}: already holds a run; {HOW_TO_GO_ON}")
        make_output_folder(self.path)
        self.checkpoints.mkdir(exist_ok=True)
        self.metrics_path.touch()
        self.write_settings(settings)

    def has_begun(self) -> bool:
        has_rows = self.metrics_path.exists() and self.metrics_path.stat().st_size > 0
        return (
            has_rows or self.last_checkpoint() is not None or (self.path / "stages").is_dir()
        )  # those of fastgpt learn

    def last_checkpoint(self) -> Path | None:
        """The file or directory from which the run is resumed."""
        return newest(self.checkpoints, "latest")

    def hidden(self, checkpoint: Path) -> Path:
        """The name of a directory that is being written or removed."""
        return checkpoint.with_name(f".{checkpoint.name}.tmp")

    def remove_leftovers(self) -> None:
        """Remove the directories that a killed run was writing or removing."""
        for path in self.checkpoints.glob(".step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)

    def remove_superseded(self) -> None:
        """Remove all checkpoints but the latest and the best, those of the other form too."""
        kept = newest(self.checkpoints, "latest"), newest(self.checkpoints, "best")
        for directory in step_directories(self.checkpoints):
            if directory not in kept:  # renamed first: what has a checkpoint's name is whole
                shutil.rmtree(directory.rename(self.hidden(directory)), ignore_errors=True)
        for file in (self.latest, self.best):
            if file not in kept:
                file.unlink(missing_ok=True)

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
        return TrainingError(
            f"{problem}; last good checkpoint: {self.last_checkpoint() or 'none'}{remedy and '. '}{remedy}"
        )

    def rewind(self, step: int) -> None:
        """Drop the metrics that the run writes again when it goes on from `step`: from 0, those of step 0 as well."""
        if not self.metrics_path.exists():
            return
        rows = read_metrics(self.metrics_path)
        self.logged_until = max((row["step"] for row in rows), default=None)
        kept = [row for row in rows if row["step"] <= step and step > 0]
        with atomic_path(self.metrics_path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. A last line cut off by a crash is left out; any other bad line is an error."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
        elif number < len(lines):
            raise TrainingError(f"{path}: line {number} is not a JSON object with a step")
    return rows


# ---- the loss curve ----


def plot_loss(metrics_path: Path, out: Path) -> str | None:
    """Draw the loss curve. Returns why not, where matplotlib is not installed or the picture cannot be written."""
    try:
        picture = png(loss_figure(readable(out.parent.name), read_metrics(metrics_path)))
        with atomic_path(out) as temporary:
            temporary.write_bytes(picture)
    except (PlotError, FileError) as error:
        return f"no loss.png: {error}"
    return None


@styled
def loss_figure(name: str, rows: list[dict[str, Any]]) -> Any:
    """The losses of the run called `name`, and below them its learning rate.

    It begins at the first evaluation after step 0: the losses before it are several times as high, and would leave
    little of the picture to the rest.
    """
    figure, [[losses], [rates]] = panels(4.2, rows=2, sharex=True, height_ratios=(4, 1))
    first = first_evaluation(rows)
    shown = [row for row in rows if row["step"] >= first]
    train, val = (curve(shown, "loss", split) for split in ("train", "val"))
    losses.plot(*train, color=VERMILION, linewidth=0.7, alpha=0.4)
    losses.plot(train[0], smoothed(train[1]), color=VERMILION, label="training, smoothed")
    losses.plot(*val, color=BLUE, marker="o", markersize=4, label="validation")
    rates.plot(*curve(shown, "lr", "train"), color=INK)
    at_the_end = f": validation loss {val[1][-1]:.3f} after {val[0][-1]:,} steps" if val[0] else ""
    losses.set_title(f"{name}{at_the_end}", parse_math=False)  # a dollar sign in a folder's name is no formula
    losses.set_ylabel("loss (nats per token)")
    losses.legend(loc="upper right")
    rates.set(xlabel=f"step, from the first evaluation ({first:,}) on", ylabel="learning\nrate", ylim=(0, None))
    figure.align_ylabels()
    return figure


def first_evaluation(rows: list[dict[str, Any]]) -> int:
    """The step of the first evaluation after step 0; 0 where there is none."""
    return min((row["step"] for row in rows if row["split"] == "val" and row["step"] > 0), default=0)


def curve(rows: list[dict[str, Any]], key: str, split: str, over: str = "step") -> tuple[list[Any], list[float]]:
    """What the rows of `split` have as `over`, and as `key`; a row that lacks one of them is left out."""
    found = [row for row in rows if row["split"] == split and key in row and over in row]
    return [row[over] for row in found], [row[key] for row in found]


def smoothed(values: list[float]) -> list[float]:
    """The mean around each value, of a fifteenth of them all. The ends, where values are missing on one side, lie on
    the straight line through the last such part: a mean of fewer values would follow their noise."""
    half = len(values) // 30
    if half == 0:
        return values
    width = 2 * half + 1
    means = [statistics.fmean(values[i : i + width]) for i in range(len(values) - width + 1)]
    return _straightened(values[:width])[:half] + means + _straightened(values[-width:])[-half:]


def _straightened(values: list[float]) -> list[float]:
    """The straight line through the values, by least squares, at the place of each."""
    places = range(len(values))
    slope, intercept = statistics.linear_regression(places, values)
    return [intercept + slope * place for place in places]
