"""Checkpoints that several processes write and read: the same numbers on any number of them, whole or not at all."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

import sharded_processes as processes
from fastgpt.checkpoint import Checkpoint, newest
from fastgpt.training.run_folder import read_metrics
from fastgpt.training.runs import load_latest
from sharded_processes import WHOLE


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def test_two_processes_write_what_one_and_four_read(gloo, tmp_path):
    gloo(2, processes.save_some, str(tmp_path))
    assert names(tmp_path) == ["step-00000002", "step-00000004"], "the best and the latest stay"
    folder = tmp_path / "checkpoint"
    assert [newest(folder, name).name for name in ("best", "latest")] == ["step-00000002", "step-00000004"]
    saved = Checkpoint.load(folder / "step-00000004")
    assert torch.equal(saved.read("model")["w"], WHOLE + 4), "as it was when save returned, not as it became"
    assert saved.read("model")["b"] == 0 and torch.equal(saved.read("rng")["cpu"], torch.arange(9, dtype=torch.uint8))
    assert saved.read("exp_avg")["w"].dtype == torch.bfloat16
    assert gloo(4, processes.read_own_part, str(tmp_path)) == [(True, True, 0.0)] * 4


def test_a_full_disk_in_one_process_is_every_ones_error_and_older_checkpoints_stay(gloo, tmp_path):
    gloo(2, processes.save_some, str(tmp_path))
    errors = gloo(2, processes.fail_in_the_last, str(tmp_path))
    problem = f"{tmp_path / 'checkpoint' / 'step-00000005'}: cannot be written: No space left on device; "
    assert errors == [problem + "the checkpoints before it are untouched"] * 2
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_killed_during_the_write_leaves_the_checkpoint_before(gloo, tmp_path):
    gloo(2, processes.save_some, str(tmp_path))
    assert gloo(2, processes.die_while_writing, str(tmp_path), may_die=True) == ["not written"]
    assert names(tmp_path) == [".step-00000005.tmp", "step-00000002", "step-00000004"]
    latest = newest(tmp_path / "checkpoint", "latest")
    assert Checkpoint.load(latest).state == {"step": 4} and torch.equal(
        Checkpoint.load(latest).read("model")["w"], WHOLE + 4
    )
    gloo(2, processes.save_some, str(tmp_path))
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_several_processes_take_their_parts_of_a_file_of_one(gloo, tmp_path):
    file = tmp_path / "latest.safetensors"
    processes.checkpoint(1, {"model.w": WHOLE}).save(file)
    assert gloo(2, processes.read_own_part_of_a_file, str(file)) == [True, True]


def test_the_files_of_one_process_that_are_older_go(gloo, tmp_path):
    folder = tmp_path / "checkpoint"
    whole = processes.checkpoint(1, {"model.w": WHOLE})
    whole.save(folder / "latest.safetensors")
    dataclasses.replace(whole, state={"step": 1}).save(folder / "best.safetensors")
    gloo(2, processes.save_some, str(tmp_path))
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_a_run_goes_on_on_another_number_of_processes_and_in_another_way(gloo, text, whole, tmp_path):
    """Two processes with parts of each parameter stop at step 6; four, two or one with all of it end where one does."""
    gloo(2, processes.train, text, str(tmp_path / "two"), 6, True)
    for n, is_sharded in ((4, True), (4, False), (1, False)):
        shutil.copytree(tmp_path / "two", out := tmp_path / f"{n} {is_sharded}")
        assert gloo(n, processes.train, text, str(out), 12, is_sharded) == [6] * n
        assert_same_run(out, whole)


def test_a_run_of_one_process_goes_on_in_two_and_ends_in_one(gloo, text, whole, tmp_path):
    gloo(1, processes.train, text, str(tmp_path), 4)
    assert gloo(2, processes.train, text, str(tmp_path), 8, True) == [4, 4]
    assert names(tmp_path) == ["step-00000008"], "the files of one process are older, and it was never worse"
    assert gloo(1, processes.train, text, str(tmp_path), 12) == [8]
    assert names(tmp_path) == ["best.safetensors", "latest.safetensors"]
    assert_same_run(tmp_path, whole)


@pytest.fixture(scope="module")
def text(text_file) -> str:
    return str(text_file)


@pytest.fixture
def whole(gloo, text, tmp_path) -> Path:
    """A run of one process that nothing interrupts."""
    gloo(1, processes.train, text, str(tmp_path / "whole"), 12)
    return tmp_path / "whole"


def assert_same_run(out: Path, whole: Path) -> None:
    found, expected = load_latest(out), load_latest(whole)
    assert found.state["step"] == expected.state["step"] and found.tensors.keys() == expected.tensors.keys()
    for prefix in ("model", "exp_avg", "exp_avg_sq", "step"):
        torch.testing.assert_close(found.read(prefix), expected.read(prefix), rtol=0, atol=1e-5)
    losses = [
        {(row["step"], row["split"]): row["loss"] for row in read_metrics(run / "metrics.jsonl")}
        for run in (out, whole)
    ]
    assert len(losses[1]) > 6
    assert {row: losses[0][row] for row in losses[1]} == pytest.approx(losses[1], abs=1e-5)  # it has stopped more often
