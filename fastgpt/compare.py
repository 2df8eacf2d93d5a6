"""`fastgpt compare`: runs side by side, in a table and in one picture of their losses over steps, tokens and seconds.

A run is read as it is on the disk, so one that is still training, or was stopped, can be compared, too.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError, count_parameters, find_checkpoint
from .config import GPTConfig, TrainConfig
from .files import atomic_path, expand_path, readable
from .plots import PlotError, line_style, panels, png, styled
from .report import NOTHING, markdown_table
from .settings import UsageError
from .training import TrainingError
from .training.run_folder import RunFolder, curve, first_evaluation, read_metrics, smoothed

DEFAULT_PICTURE = "runs/compare.png"
MOST_RUNS = 28  # as many lines as the picture's style tells apart
MARKERS = 12  # of a line, at most
NAME = 60  # letters of a name in the picture

_AXES = {"step": "step", "tokens": "tokens", "elapsed_s": "seconds of training"}
# What config.toml leaves out has this value, or none.
_DEFAULTS = {item.name: item.default for kind in (GPTConfig, TrainConfig) for item in dataclasses.fields(kind)}
_OF_NO_INTEREST = ("out", "log")
# A loss is per token, and of the data's last tenth: with another one of these it is another quantity.
_OF_THE_LOSS = ("data", "tokenizer", "vocab_size", "layout")


@dataclass(frozen=True)
class Run:
    """What there is of a run. `notes` say what a reader should know of it."""

    name: str
    rows: list[dict[str, Any]]  # of metrics.jsonl
    settings: dict[str, Any]
    parameters: int | None
    notes: list[str] = field(default_factory=list)

    def best(self) -> dict[str, Any]:
        """The row of the lowest validation loss; an empty one where there was no evaluation."""
        rows = [row for row in self.rows if row["split"] == "val" and math.isfinite(row["loss"])]
        return min(rows, key=lambda row: row["loss"], default={})

    def tokens_per_s(self) -> float | None:
        """Tokens in a second of training, over the whole run."""
        last = self.rows[-1]
        seconds = last.get("elapsed_s", 0.0)
        return last["tokens"] / seconds if seconds > 0.0 and "tokens" in last else None


def compare(paths: Sequence[str], out: str | None = None) -> str:
    """Draw the picture, and return the tables and what else is to be said of the runs in the folders `paths`.

    The picture goes to `out`, a *.png file; without it to runs/compare.png, where matplotlib is installed.
    Raises UsageError for what is no run, and TrainingError where a file of a run is damaged.
    """
    if out is not None and Path(out).suffix.lower() != ".png":
        raise UsageError(f"--out: expected a file that ends in .png, got {out!r}")
    folders, notes = _folders(paths)
    runs = []
    for folder, name in zip(folders, distinct_names(folders), strict=True):
        run = read_run(folder, name)
        notes += [f"{name}: {note}" for note in run.notes]
        runs += [run] if run.rows else []
    if not runs:
        raise UsageError(f"--runs: no run has numbers yet; {'; '.join(notes)}")
    differing = differences(runs)
    if unlike := [name for name in _OF_THE_LOSS if name in differing]:
        names = f"{' and '.join(unlike)} differ{'s' * (len(unlike) == 1)}"
        notes.append(f"the losses are not of the same thing: {names}; fastgpt eval gives bits per byte")
    picture = _draw(runs, out)
    parts = [overview(runs), settings_table(runs, differing), "\n".join([*notes, picture])]
    return "\n\n".join(parts)


def _folders(paths: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The folders of the runs, each once, and a line for each that is given again."""
    folders: list[Path] = []
    notes = []
    for path in paths:
        folder = expand_path(path).resolve()
        _check_is_run(folder, path)
        if folder in folders:
            notes.append(f"{readable(path)}: is given more than once, and shown once")
        else:
            folders.append(folder)
    if len(folders) > MOST_RUNS:
        raise UsageError(f"--runs: a picture tells {MOST_RUNS} runs apart, and these are {len(folders)}; give fewer")
    return folders, notes


def _check_is_run(folder: Path, path: str) -> None:
    if not folder.is_dir():
        what = "is a file; give the folder of the run" if folder.exists() else "no such folder"
        raise UsageError(f"--runs: {path}: {what}")
    if (folder / "stages").is_dir():
        raise UsageError(f"--runs: {path}: holds the stages of fastgpt learn; give folders of {path}/stages")
    if not any((folder / name).exists() for name in ("metrics.jsonl", "config.toml")):
        raise UsageError(f"--runs: {path}: is not a run: it has no metrics.jsonl, as fastgpt train --out writes it")


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as tell it from the others."""

    def end(folder: Path, n_parts: int) -> str:
        return str(Path(*folder.parts[-n_parts:]))

    names = []
    for folder in folders:
        n = 1
        while n < len(folder.parts) and any(o != folder and end(o, n) == end(folder, n) for o in folders):
            n += 1
        names.append(readable(end(folder, n)))
    return names


def read_run(path: Path, name: str) -> Run:
    """What there is of the run in the folder `path`. A last row that was cut off is left out, which a note says."""
    folder, notes = RunFolder(path), []
    rows: list[dict[str, Any]] = []
    if folder.metrics_path.exists():
        written = folder.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines()
        rows = read_metrics(folder.metrics_path)
        if len(rows) < len(written):
            notes.append("the last line of metrics.jsonl is cut off, as of a run that is killed, and left out")
    if lacking := next((row for row in rows if not {"split", "loss"} <= row.keys()), None):
        raise TrainingError(f"{folder.metrics_path}: the row of step {lacking['step']} has no split or no loss")
    settings = _settings_of(folder, notes)
    if not rows:
        notes.append("has no numbers yet, and is left out")
    elif rows[-1]["step"] < settings.get("max_steps", 0) and not _has_reached_target(rows, settings):
        at = f"step {rows[-1]['step']:,} of {settings['max_steps']:,}"
        notes.append(f"is at {at}: it is still training, or was stopped")
    return Run(name, rows, settings, _parameters_of(path), notes)


def _settings_of(folder: RunFolder, notes: list[str]) -> dict[str, Any]:
    try:
        return folder.read_settings()
    except FileNotFoundError:
        notes.append("has no config.toml, so its settings are not known")
        return {}
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TrainingError(f"{folder.path / 'config.toml'}: not a TOML file: {error}") from error


def _has_reached_target(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> bool:
    target = settings.get("target_loss", -math.inf)
    return any(row["split"] == "val" and row["loss"] <= target for row in rows)


def _parameters_of(path: Path) -> int | None:
    try:
        return count_parameters(find_checkpoint(path))
    except CheckpointError:  # there is none yet, or it is replaced at this moment
        return None


# ---- tables ----


def overview(runs: Sequence[Run]) -> str:
    """One row a run: its lowest validation loss, what it had taken until then, its speed and its size."""
    headers = ["run", "best val loss", "at step", "tokens", "seconds", "tokens/s", "parameters"]
    rows: list[list[Any]] = []
    for run in runs:
        best = run.best()
        loss = f"{best['loss']:.4f}" if best else NOTHING
        seconds = f"{best['elapsed_s']:,.1f}" if "elapsed_s" in best else NOTHING
        speed = None if (rate := run.tokens_per_s()) is None else round(rate)
        rows.append([run.name, loss, best.get("step"), best.get("tokens"), seconds, speed, run.parameters])
    return markdown_table(headers, rows)


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in all of the runs whose settings are known, and their values in each."""
    known = [run.settings for run in runs if run.settings]
    names = dict.fromkeys(name for settings in known for name in settings if name not in _OF_NO_INTEREST)
    found = {name: [settings.get(name, _DEFAULTS.get(name)) for settings in known] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def settings_table(runs: Sequence[Run], differing: dict[str, list[Any]]) -> str:
    known = [run for run in runs if run.settings]
    if len(runs) == 1:
        return "One run was compared with no other: name two or more to see the settings in which they differ."
    if len(known) < 2:
        return "There are no two runs whose settings are known."
    if not differing:
        return "Their settings are the same."
    rows = [[name, *map(_shown, values)] for name, values in differing.items()]
    return "Settings that differ:\n" + markdown_table(["setting", *(run.name for run in known)], rows)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return NOTHING if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# ---- the picture ----


def _draw(runs: Sequence[Run], out: str | None) -> str:
    """Write the picture. Returns where it is; without `out`, why there is none where matplotlib is not installed."""
    path = expand_path(out or DEFAULT_PICTURE)
    try:
        picture = png(curves(runs))
    except PlotError as error:
        if out is not None:
            raise
        return f"no picture: {error}"
    with atomic_path(path) as temporary:
        temporary.write_bytes(picture)
    return f"picture: {path}"


@styled
def curves(runs: Sequence[Run]) -> Any:
    """Three panels: the losses over steps, tokens and seconds. Each run begins at its first evaluation after step 0.

    A validation loss is a thick line with markers, and the training loss of the same run is thin, in its colour and
    dashes.
    """
    figure, grid = panels(6.6 + 0.19 * len(runs), rows=len(_AXES), sharey=True)
    for axes, (key, label) in zip(grid[:, 0], _AXES.items(), strict=True):
        for number, run in enumerate(runs):
            first, style = first_evaluation(run.rows), line_style(number)
            rows = [row for row in run.rows if row["step"] >= first]
            places, losses = curve(rows, "loss", "train", over=key)
            thin = {"color": style["color"], "linestyle": style["linestyle"], "linewidth": 0.8, "alpha": 0.7}
            axes.plot(places, smoothed(losses), **thin)
            places, losses = curve(rows, "loss", "val", over=key)
            every = max(1, math.ceil(len(places) / MARKERS))
            axes.plot(places, losses, label=shortened(run.name), markevery=every, **style)
        axes.set(xlabel=label, ylabel="loss (nats per token)")
        _write_large_numbers_short(axes.xaxis)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    title = "thick: validation; thin: training, smoothed"
    legend = figure.legend(handles, labels, loc="outside upper left", title=title, alignment="left")
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar sign in a folder's name begins no formula
    return figure


def _write_large_numbers_short(axis: Any) -> None:
    """1.2M in place of 1200000, which would not fit beside the next."""
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(sep=""))


def shortened(name: str) -> str:
    """The name without its middle where it is too long for the picture."""
    half = (NAME - 1) // 2
    return name if len(name) <= NAME else f"{name[:half]}…{name[-half:]}"
