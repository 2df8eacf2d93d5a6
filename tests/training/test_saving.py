"""Where one process saves, and what becomes of the checkpoints of several that are in the same folder."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastgpt.checkpoint import Checkpoint, CheckpointError, newest
from fastgpt.training.loop import Interrupted
from fastgpt.training.runs import load_latest
from fastgpt.training.saving import saver
from sharded_checkpoints import write_sharded
from small_runs import TRAIN, assert_same_checkpoint, signal_at, trainer


def names(run) -> list[str]:
    return sorted(path.name for path in run.folder.checkpoints.iterdir())


@pytest.fixture
def run(corpus, tmp_path):
    """A run of three processes that has reached step 6, and was best at step 4, as one process finds it."""
    run = trainer(corpus, tmp_path, dataclasses.replace(TRAIN, max_steps=6))
    run.run()
    last = Checkpoint.load(run.folder.latest)
    earlier = dataclasses.replace(last, state=last.state | {"step": 4})
    write_sharded(last, run.folder.checkpoints / "step-00000006", 3)
    write_sharded(earlier, run.folder.checkpoints / "step-00000004", 3, is_best=True)
    run.folder.latest.unlink(), run.folder.best.unlink()
    return run


def test_one_process_goes_on_with_the_run_of_several_and_takes_its_place(run, corpus, tmp_path, monkeypatch):
    resumed = trainer(corpus, tmp_path, new=False)
    assert load_latest(tmp_path).path == run.folder.checkpoints / "step-00000006"
    resumed.restore(load_latest(tmp_path))
    torch.testing.assert_close(resumed.checkpoint().tensors, run.checkpoint().tensors, rtol=0, atol=0)
    monkeypatch.setattr(resumed, "state", resumed.state | {"step": 7})
    resumed._save()
    assert names(resumed) == ["latest.safetensors", "step-00000004"], "the best one of before stays"
    assert newest(resumed.folder.checkpoints, "best") == run.folder.checkpoints / "step-00000004"
    resumed._save(is_best=True)
    assert names(resumed) == ["best.safetensors", "latest.safetensors"]


def test_one_process_resumes_from_several_to_the_same_bits(corpus, tmp_path, monkeypatch):
    whole = trainer(corpus, tmp_path / "whole")
    whole.run()
    stopped = trainer(corpus, tmp_path / "parts")
    signal_at(5, stopped, monkeypatch)
    with pytest.raises(Interrupted):
        stopped.run()
    write_sharded(Checkpoint.load(stopped.folder.latest), tmp_path / "parts/checkpoint/step-00000005")
    stopped.folder.latest.unlink()
    resumed = trainer(corpus, tmp_path / "parts", new=False)
    resumed.restore(load_latest(tmp_path / "parts"))
    resumed.run()
    assert_same_checkpoint(whole.folder.latest, resumed.folder.latest)


def test_a_damaged_best_checkpoint_is_named_at_the_start_and_not_when_the_run_next_saves(run):
    settings = run.folder.checkpoints / "step-00000004" / "checkpoint.json"
    settings.unlink()
    with pytest.raises(CheckpointError, match=f"^{settings}: cannot be read: .*; copy the whole directory again"):
        load_latest(run.folder.path)


def test_what_a_killed_run_left_is_removed_at_the_next_start(run):
    hidden = run.folder.hidden(run.folder.checkpoints / "step-00000008")
    hidden.mkdir()
    (hidden / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half of it")
    assert load_latest(run.folder.path).state["step"] == 6
    saver(run.folder, is_first=False)
    assert hidden.exists(), "the first process removes it"
    saver(run.folder)
    assert names(run) == ["step-00000004", "step-00000006"]
