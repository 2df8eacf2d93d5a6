"""A run's folder: its settings, its metrics, its loss curve, and that another run does not overwrite it."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest

from fastgpt.training import TrainingError
from fastgpt.training.run_folder import plot_loss, read_metrics
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
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(TrainingError, match="line 2 is not JSON"):
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


def test_settings_are_stored_as_toml(corpus, tmp_path):
    import tomllib

    trainer(corpus, tmp_path)
    stored = tomllib.loads((tmp_path / "config.toml").read_text())
    assert stored["lr"] == TRAIN.lr and "target_loss" not in stored
    assert json.loads(json.dumps(stored)) == {k: v for k, v in dataclasses.asdict(TRAIN).items() if v is not None}
