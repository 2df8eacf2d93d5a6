"""Loggers beside metrics.jsonl: the same numbers, once for each step, whatever happens to the run or to the logger."""

from __future__ import annotations

import dataclasses
import os
import struct
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from command_line import SMALL
from fastgpt import commands, settings
from fastgpt.checkpoint import Checkpoint
from fastgpt.cli import main
from fastgpt.config import LOGGERS
from fastgpt.settings import TrainSettings, UsageError, loggers_of
from fastgpt.training import TrainingError, loggers, progress
from fastgpt.training.loggers import KINDS, Loggers, numbers_of, opened
from fastgpt.training.processes import Processes
from fastgpt.training.run_folder import RunFolder, read_metrics
from small_runs import TRAIN, trainer

Numbers = dict[tuple[str, int], float]


def in_metrics(folder: Path) -> Numbers:
    rows = read_metrics(folder / "metrics.jsonl")
    return {(name, row["step"]): value for row in rows for name, value in numbers_of(row).items()}


def in_tensorboard(folder: Path) -> Numbers:
    """What TensorBoard shows; a step that has two values fails."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found: Numbers = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert (name, event.step) not in found, "a step is there twice"
            found[name, event.step] = event.value
    return found


def as_float32(numbers: Numbers) -> Numbers:
    return {place: float(np.float32(value)) for place, value in numbers.items()}


# --- TensorBoard ---


def test_tensorboard_has_the_numbers_of_metrics_in_float32_also_after_a_run_was_killed(corpus, tmp_path):
    pytest.importorskip("tensorboard")
    recorded = {"lr": 0.5, "layout": "blocks", "bias": True, "target_loss": None}
    killed = trainer(corpus, tmp_path)
    row = killed.folder.append

    def end_at_ten(written):  # steps 6, 8 and 10 have been logged, and are logged again
        row(written)
        if written["step"] == 10:
            raise KeyboardInterrupt

    killed.folder.append = end_at_ten  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt), opened("tensorboard", killed.folder, recorded, 0) as killed.loggers:
        killed.run()
    assert max(step for _, step in in_tensorboard(tmp_path)) == 8

    resumed = trainer(corpus, tmp_path, new=False)
    resumed.restore(Checkpoint.load(resumed.folder.latest))
    resumed.folder.rewind(step := resumed.state["step"])
    with opened("tensorboard", resumed.folder, recorded, step) as resumed.loggers:
        resumed.run()
    found = in_tensorboard(tmp_path)
    assert found == as_float32(in_metrics(tmp_path))
    assert {step for name, step in found if name == "val/loss"} == {0, 4, 8, 12}
    assert {name for name, _ in found} == {
        f"{split}/{name}"
        for split in ("train", "val")
        for name in ("loss", "elapsed_s", "tokens", "tokens_per_s", "lr")
    }


def test_tensorboard_records_the_settings(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams import metadata

    folder = RunFolder(tmp_path / "run")
    folder.create({})
    with opened("tensorboard", folder, {"lr": 0.5, "layout": "blocks", "target_loss": None}, 0):
        pass
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    found = metadata.parse_session_start_info_plugin_data(content).hparams
    assert found["lr"].number_value == 0.5 and found["layout"].string_value == "blocks" and len(found) == 2


def test_a_run_logs_from_its_beginning_when_it_is_resumed_with_a_logger_and_goes_on_with_it(
    text_file, tmp_path, capsys
):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    assert main(["train", "--data", str(text_file), "--out", str(out), *SMALL]) == 0
    assert not (out / "tensorboard").exists()
    for steps, more, logs in (("9", ["--log", "tensorboard"], True), ("12", [], True), ("15", ["--log=none"], False)):
        capsys.readouterr()
        assert main(["train", "--out", str(out), "--resume", "--max-steps", steps, *more]) == 0
        assert ("shows its curves" in capsys.readouterr().out) == logs
        assert (in_tensorboard(out) == as_float32(in_metrics(out))) == logs


# --- Weights & Biases ---


@pytest.fixture
def wandb(monkeypatch):
    """W&B as on a machine where nobody has logged in, in the empty home folder of the tests."""
    module = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    yield module
    module.teardown()


def in_wandb(file: Path) -> Numbers:
    """The history in a run's file, which is a log of records as LevelDB writes it; a step that is there twice fails."""
    import json

    from wandb.proto import wandb_internal_pb2

    data, place, found, record = file.read_bytes(), 7, {}, b""
    while place < len(data):
        if 32768 - place % 32768 < 7:  # no header fits into the end of a block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            message, record = wandb_internal_pb2.Record.FromString(record), b""
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in message.history.item}
            for name in [name for name in items if not name.startswith("_")]:
                assert (name, items["_step"]) not in found, "a step is there twice"
                found[name, items["_step"]] = items[name]
    return found


def rows(first: int, last: int) -> list[dict]:
    """Rows at every second step, as of training and of an evaluation at the same step."""
    steps = range(first, last + 1, 2)
    return [
        {"step": step, "split": split, "loss": step + 1 / 3, "tokens": 2**40 + step}
        for step in steps
        for split in ("train", "val")
    ]


def write(folder: RunFolder, written: list[dict], open_at: int) -> None:
    with opened("wandb", folder, {"lr": 0.5, "seed": None}, open_at) as open_loggers:
        for row in written:
            folder.append(row)
            assert open_loggers.row(row) == []
    sys.modules["wandb"].teardown()  # as the end of a process does, with which the file is complete


def test_wandb_without_a_login_is_offline_and_goes_on_in_the_same_run(wandb, tmp_path, capsys):
    folder = RunFolder(tmp_path / "first")
    folder.create({})
    write(folder, rows(0, 10), open_at=0)
    assert "log: wandb is offline; wandb sync" in capsys.readouterr().out
    (first,) = (folder.path / "wandb").glob("offline-run-*/*.wandb")
    assert in_wandb(first) == in_metrics(folder.path)
    resumed = RunFolder(folder.path)
    resumed.rewind(4)  # the last checkpoint of a run that was killed at step 10
    write(resumed, rows(6, 14), open_at=4)
    (second,) = set((folder.path / "wandb").glob("offline-run-*/*.wandb")) - {first}
    assert second.name == first.name, "it has the run's id"
    both = in_wandb(first) | in_wandb(second)
    assert both == in_metrics(folder.path) and len(both) == len(in_wandb(first)) + len(in_wandb(second))


def test_wandb_is_asked_for_a_login_by_nobody(wandb, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "first")
    folder.create({})
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(UsageError, match="--log wandb: WANDB_MODE=online needs a login: run wandb login"):
        opened("wandb", folder, {}, 0)


def test_wandb_can_be_disabled(wandb, tmp_path, monkeypatch, capsys):
    folder = RunFolder(tmp_path / "first")
    folder.create({})
    monkeypatch.setenv("WANDB_MODE", "disabled")
    write(folder, rows(0, 2), open_at=0)
    assert capsys.readouterr().out == "log: wandb is disabled\n"
    assert [path.name for path in (folder.path / "wandb").iterdir()] == ["run-id.txt"]


# --- loggers that cannot be, or fail ---


def test_names():
    assert tuple(KINDS) == LOGGERS
    assert loggers_of("none") == []
    for log, said in {
        "tensorbord": "unknown logger 'tensorbord'; expected tensorboard or wandb, both with a comma between them, or",
        "": "unknown logger ''",
        "none,wandb": "unknown logger 'none'",
    }.items():
        with pytest.raises(UsageError, match=f"--log: {said}"):
            loggers_of(log)


def test_a_package_that_is_missing_is_named_with_its_extra_before_anything_is_read(tmp_path, monkeypatch, capsys):
    nowhere = ["train", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    for spec in (None, ModuleSpec("wandb", None)):  # the second is a folder of that name in the working directory
        monkeypatch.setattr(settings, "find_spec", lambda name, spec=spec: spec)
        assert main([*nowhere, "--log", "wandb"]) == 2
        said = "--log: wandb is not installed: pip install 'fastgpt-kernels[wandb]'"
        assert capsys.readouterr().err == f"fastgpt train: {said}\n"
    assert not (tmp_path / "out").exists()


def test_both_can_be_named_in_a_file_of_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings, "find_spec", lambda name: SimpleNamespace(origin="here"))
    assert loggers_of(" tensorboard, wandb,tensorboard") == ["tensorboard", "wandb"]
    (tmp_path / "run.toml").write_text('log = "tensorbord"\n', encoding="utf-8")
    assert main(["train", "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out")]) == 2
    assert "--log: unknown logger 'tensorbord'" in capsys.readouterr().err


class Failing:
    """A logger that fails at its third row, or when it is closed."""

    is_new, about = False, "shown nowhere"

    def __init__(self, *_) -> None:
        self.rows: list[dict] = []

    def row(self, row: dict) -> None:
        self.rows.append(row)
        if len(self.rows) == 3:
            raise OSError("the disk is full\nand more")

    def close(self, failed: bool) -> None:
        raise ValueError


def test_a_logger_that_fails_is_said_once_and_loses_nothing_of_the_run(corpus, tmp_path, capsys):
    run = trainer(corpus, tmp_path, dataclasses.replace(TRAIN, max_steps=8))
    failing = Failing()
    run.loggers = Loggers({"wandb": failing})
    assert run.run()["step"] == 8
    said = capsys.readouterr().out
    assert said.count("--log wandb: has failed and is left out: the disk is full; metrics.jsonl has every row\n") == 1
    assert len(failing.rows) == 3 and len(read_metrics(run.folder.metrics_path)) == 7


def test_a_logger_that_fails_at_the_end_is_said(capsys):
    with Loggers({"wandb": Failing()}):
        pass
    assert (
        capsys.readouterr().out == "--log wandb: has failed and is left out: ValueError; metrics.jsonl has every row\n"
    )


def test_a_logger_that_cannot_be_started_ends_the_command_before_training(tmp_path):
    pytest.importorskip("tensorboard")
    folder = RunFolder(tmp_path)
    folder.create({})
    (tmp_path / "tensorboard").touch()
    with pytest.raises(TrainingError, match=r"--log tensorboard: cannot be started: .*; --log none trains without it"):
        opened("tensorboard", folder, {}, 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_logs(rank, tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "loggers_of", lambda log: [log])
    monkeypatch.setitem(KINDS, "failing", Failing)
    monkeypatch.setattr(progress, "first_lines", lambda *_: [])
    folder = RunFolder(tmp_path)
    folder.create({})
    process = SimpleNamespace(
        processes=Processes(rank, 2),
        folder=folder,
        state={"step": 0},
        device=SimpleNamespace(type="cpu"),
        cfg=dataclasses.replace(TRAIN, optimizer="adamw"),
        finished=lambda: None,
    )
    process.run = lambda: {"step": len(process.loggers.row({})) + 1, "best_val": 1.0, "elapsed_s": 1.0}
    made: list[Failing] = []
    monkeypatch.setattr(Failing, "__init__", lambda self, *_: made.append(self) or setattr(self, "rows", []))
    commands._run_to_the_end(process, TrainSettings(out="run", log="failing", profile=True), "run")
    assert len(made) == (rank == 0) and hasattr(process, "profile") == (rank == 0)


def test_importing_the_loggers_needs_no_package_of_them():
    assert not {"torch", "wandb", "tensorboard"} & set(vars(loggers)) and "fastgpt.training.loggers" in sys.modules
