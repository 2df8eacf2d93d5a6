"""A run under --profile: the trace, the table of ops, and that the run is the same with it."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from pathlib import Path

import pytest
import torch

from command_line import SMALL
from fastgpt import use_backend
from fastgpt.checkpoint import Checkpoint
from fastgpt.cli import main
from fastgpt.training.loop import Interrupted
from fastgpt.training.profile import LARGEST, PROFILED, WARM_UP, StepProfile
from fastgpt.training.run_folder import read_metrics
from small_runs import TRAIN, assert_same_checkpoint, signal_at, trainer

CPU = torch.device("cpu")


def events_of(path: Path) -> list[dict]:
    with gzip.open(path / "trace.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def steps_of(events: list[dict]) -> list[dict]:
    return sorted((e for e in events if re.fullmatch(r"step \d+", e.get("name", ""))), key=lambda event: event["ts"])


def test_a_trace_has_the_steps_and_our_ops_in_them_and_the_run_is_the_same(corpus, tmp_path, capsys):
    cfg = dataclasses.replace(TRAIN, max_steps=20, eval_interval=10)
    with use_backend("native"):
        trainer(corpus, tmp_path / "plain", cfg).run()
        capsys.readouterr()
        run = trainer(corpus, tmp_path / "profiled", cfg)
        run.profile = StepProfile(run.folder.path, CPU, 0, cfg.max_steps)
        run.run()
    said = capsys.readouterr()
    events = events_of(run.folder.path)
    steps = steps_of(events)
    assert [step["name"] for step in steps] == [f"step {n}" for n in range(WARM_UP + 1, WARM_UP + PROFILED + 1)]
    ours = [event for event in events if event.get("name") == "fastgpt::layer_norm_native"]
    for step in steps:  # two norms in a block, and one before the head; some of them are fused with what comes before
        inside = [event for event in ours if step["ts"] <= event["ts"] < step["ts"] + step["dur"]]
        assert len(inside) == len(ours) / PROFILED > 0
    path = re.escape(str(run.folder.path / "trace.json.gz"))
    lines = said.out.splitlines()
    heading = next(i for i, line in enumerate(lines) if line.startswith("profile: "))
    assert re.fullmatch(
        rf"profile: {path} is a trace of the steps 11 to 15; ui\.perfetto\.dev opens it", lines[heading]
    )
    assert lines[heading + 1].split() == ["ms", "a", "step", "share", "calls", "op,", "on", "the", "CPU"]
    rows = [line.split(maxsplit=3) for line in lines[heading + 2 : heading + 2 + LARGEST]]
    times = [float(row[0]) for row in rows]
    assert times == sorted(times, reverse=True) and sum(float(row[1].rstrip("%")) for row in rows) <= 100.5
    assert all(int(row[2]) >= 1 and "step 1" not in row[3] for row in rows) and said.err == ""

    assert_same_checkpoint(tmp_path / "plain/checkpoint/latest.safetensors", run.folder.latest)
    losses = [[(r["step"], r["loss"]) for r in read_metrics(tmp_path / name / "metrics.jsonl")] for name in
              ("plain", "profiled")]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("step", "max_steps", "expected"), [(0, 400, (11, 15)), (100, 400, (111, 115)), (0, 8, (4, 8)), (7, 9, (8, 9))]
)
def test_the_steps_that_are_recorded_come_after_a_warm_up_where_there_is_time_for_one(step, max_steps, expected):
    profile = StepProfile(Path(), CPU, step, max_steps)
    assert (profile.first, profile.last) == expected


def test_a_run_that_is_stopped_amid_its_profile_leaves_what_it_has_recorded(corpus, tmp_path, monkeypatch, capsys):
    run = trainer(corpus, tmp_path)
    run.profile = StepProfile(tmp_path, CPU, 0, TRAIN.max_steps)  # the steps 8 to 12
    signal_at(9, run, monkeypatch)
    with pytest.raises(Interrupted):
        run.run()
    assert "a trace of the steps 8 to 9;" in capsys.readouterr().out
    assert [step["name"] for step in steps_of(events_of(tmp_path))] == ["step 8", "step 9"]
    resumed = trainer(corpus, tmp_path, new=False)
    resumed.restore(Checkpoint.load(resumed.folder.latest))
    resumed.profile = StepProfile(tmp_path, CPU, 9, TRAIN.max_steps)
    resumed.run()
    assert [step["name"] for step in steps_of(events_of(tmp_path))] == ["step 10", "step 11", "step 12"]


def test_an_error_amid_the_first_recorded_step_is_the_one_that_is_seen(corpus, tmp_path, monkeypatch):
    run = trainer(corpus, tmp_path)
    run.profile = StepProfile(tmp_path, CPU, 0, TRAIN.max_steps)
    step = run._step

    def fails(batches):
        if run.state["step"] == 7:
            raise ValueError("a test")
        return step(batches)

    monkeypatch.setattr(run, "_step", fails)
    with pytest.raises(ValueError, match="a test"):
        run.run()
    assert not (tmp_path / "trace.json.gz").exists()


def test_a_trace_that_cannot_be_written_ends_no_run(corpus, tmp_path, capsys):
    run = trainer(corpus, tmp_path)
    (tmp_path / "trace.json.gz").mkdir()
    run.profile = StepProfile(tmp_path, CPU, 0, TRAIN.max_steps)
    assert run.run()["step"] == TRAIN.max_steps
    assert "--profile: no trace: " in capsys.readouterr().out


def test_a_run_is_profiled_when_it_is_asked_for_and_not_when_it_goes_on(text_file, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--data", str(text_file), "--out", str(out), *SMALL, "--profile"]) == 0
    assert "a trace of the steps 2 to 6" in capsys.readouterr().out
    assert main(["train", "--out", str(out), "--resume", "--max-steps", "8"]) == 0
    assert "trace" not in capsys.readouterr().out
