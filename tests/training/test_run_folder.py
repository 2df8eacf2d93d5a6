"""A run's folder: its settings, its metrics, its loss curve, and that another run does not overwrite it."""

from __future__ import annotations

import dataclasses
import io
import json
from itertools import pairwise

import pytest

from fastgpt.training import TrainingError
from fastgpt.training.run_folder import loss_figure, plot_loss, read_metrics
from figures import faults
from small_runs import TRAIN, trainer


def test_a_folder_with_a_run_is_not_overwritten(corpus, tmp_path):
    run = trainer(corpus, tmp_path)
    run.run()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(TrainingError, match="already holds a run; add --resume"):
        trainer(corpus, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_metrics_reader(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(path) == [{"step": 1}]
    for line in (b"nonsense", b"5", b"{}", b"\xff"):
        path.write_bytes(b'{"step": 1}\n%s\n{"step": 2}\n' % line)
        with pytest.raises(TrainingError, match="line 2 is not a JSON object with a step"):
            read_metrics(path)


def test_a_full_disk_while_a_row_is_written_names_the_file(corpus, tmp_path, monkeypatch):
    """The error comes where the buffer is flushed, and again where the file is closed, as on a real disk."""
    run = trainer(corpus, tmp_path)
    written, append = [], run.folder.append

    class Full(io.TextIOBase):
        def write(self, text):
            return len(text)

        def close(self):
            raise OSError(28, "No space left on device")

    def rows_then_full(row):
        if len(written) == 5:
            monkeypatch.setattr("fastgpt.training.run_folder.open", lambda *args, **kwargs: Full(), raising=False)
        append(row)
        written.append(row)

    monkeypatch.setattr(run.folder, "append", rows_then_full)
    message = r"metrics\.jsonl: cannot be written: No space left on device; last good checkpoint: .*latest\.safetensors"
    with pytest.raises(TrainingError, match=message):
        run.run()
    monkeypatch.undo()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5


def test_a_loss_curve_that_cannot_be_written_does_not_fail_the_run(corpus, tmp_path):
    run = trainer(corpus, tmp_path, dataclasses.replace(TRAIN, max_steps=2))
    (tmp_path / "loss.png").mkdir()
    assert run.run()["step"] == 2
    assert "loss.png: cannot be written" in plot_loss(run.folder.metrics_path, tmp_path / "loss.png")


def test_a_folder_whose_name_looks_like_a_formula(corpus, tmp_path):
    run = trainer(corpus, tmp_path / r"lr$\nonsense{$", dataclasses.replace(TRAIN, max_steps=1))
    run.run()
    assert (run.folder.path / "loss.png").read_bytes().startswith(b"\x89PNG")


def _row(step, split, loss):
    return {"step": step, "split": split, "loss": loss, "lr": 0.01 - step / 10_000}


def test_the_loss_curve_begins_at_the_first_evaluation():
    train = [_row(step, "train", 2.0 + 2.0 / step + step % 20 / 100) for step in range(10, 1000, 10)]
    val = [_row(step, "val", 4.4 - min(step, 1) * 2 - step / 1000) for step in range(0, 1000, 100)]
    figure = loss_figure("a $run$", sorted(train + val, key=lambda row: row["step"]))
    assert faults(figure) == []
    losses, rates = figure.axes
    raw, smooth, validation = losses.lines
    for line in (raw, smooth, validation, *rates.lines):
        assert min(line.get_xdata()) == 100
    assert losses.get_ylim()[1] < 3.0, "the initial loss, 4.4, does not squeeze the others"
    assert list(validation.get_ydata()) == [row["loss"] for row in val[1:]]
    assert len(smooth.get_xdata()) == len(raw.get_xdata()) and sum(smooth.get_ydata()) == pytest.approx(
        sum(raw.get_ydata()), rel=0.01
    )
    jumps = [abs(b - a) for a, b in pairwise(raw.get_ydata())]
    assert max(abs(b - a) for a, b in pairwise(smooth.get_ydata()[5:-5])) < max(jumps) / 3
    assert losses.get_title(loc="left") == "a $run$: validation loss 1.500 after 900 steps"
    assert losses.get_ylabel() and rates.get_ylabel() and rates.get_xlabel()
    assert list(rates.lines[0].get_ydata()) == [row["lr"] for row in train[9:]] and rates.get_ylim()[0] == 0


def test_the_smoothed_loss_does_not_end_in_one_steps_noise():
    rows = [_row(step, "train", 4.0 - step / 1000) for step in range(10, 3010, 10)]
    rows[-1]["loss"] += 0.1
    smooth = loss_figure("run", rows).axes[0].lines[1].get_ydata()
    assert all(after < before for before, after in pairwise(smooth)), "it falls, as all losses but the last do"
    assert smooth[-1] == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [_row(0, "val", 4.0)],
        [_row(1, "train", 4.0), _row(2, "train", 3.0)],
        [_row(0, "val", 4.0), _row(1, "train", 3.0), _row(1, "val", 3.5)],
        [{"step": 5, "split": "train", "loss": 2.0}],
    ],
)
def test_a_loss_curve_of_few_rows(rows):
    assert faults(loss_figure("run", rows)) == []


def test_settings_are_stored_as_toml(corpus, tmp_path):
    import tomllib

    trainer(corpus, tmp_path)
    stored = tomllib.loads((tmp_path / "config.toml").read_text())
    assert stored["lr"] == TRAIN.lr and "target_loss" not in stored
    assert json.loads(json.dumps(stored)) == {k: v for k, v in dataclasses.asdict(TRAIN).items() if v is not None}
