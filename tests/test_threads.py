"""How many threads a command takes and how they wait: the same answers on every machine, whatever runs beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib

import pytest
import torch

from command_line import SMALL
from fastgpt import threads
from fastgpt.cli import main
from fastgpt.settings import TrainSettings, with_sources
from fastgpt.training.loop import Trainer


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Make this machine one of other cores, load and quota: `machine(cores, busy, quota)`."""
    for name in (*threads.WAITING, threads.NUMBER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_PROC", tmp_path)
    monkeypatch.setattr(threads, "_CGROUP", tmp_path)

    def become(cores: int, busy: int = 0, quota: str = "max 100000") -> None:
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
        (tmp_path / "loadavg").write_text(f"0.00 0.01 0.05 {1 + busy}/123 4567\n")
        (tmp_path / "cpu.max").write_text(f"{quota}\n")

    return become


@pytest.mark.parametrize(
    ("cores", "busy", "quota", "expected"),
    [
        (2, 0, "max 100000", {}),
        (2, 1, "max 100000", {"OMP_WAIT_POLICY": "PASSIVE"}),
        (8, 6, "200000 100000", {}),
        (8, 7, "200000 100000", {"OMP_WAIT_POLICY": "PASSIVE"}),
    ],
)
def test_threads_sleep_at_once_where_other_programs_need_their_cores(machine, cores, busy, quota, expected):
    machine(cores, busy, quota)
    environment: dict[str, str] = {}
    threads.choose_waiting(environment)
    assert environment == expected


@pytest.mark.parametrize("name", threads.WAITING)
def test_how_threads_wait_stays_as_the_user_says(machine, name):
    machine(2, 2)
    environment = {name: "as the user says"}
    threads.choose_waiting(environment)
    assert environment == {name: "as the user says"}


def test_the_command_line_chooses_before_torch_is_there():
    code = "import sys; from fastgpt import __main__, threads; sys.argv = ['fastgpt', '--version']"
    code += "; threads.choose_waiting = lambda: print('torch' in sys.modules); __main__.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "False"


@pytest.mark.parametrize(
    ("cores", "quota", "expected"),
    [(8, "max 100000", 8), (8, "150000 100000", 2), (1, "800000 100000", 1), (8, "nonsense", 8), (4, "1000 100000", 1)],
)
def test_a_quota_counts(machine, cores, quota, expected):
    machine(cores, quota=quota)
    assert threads.available_cores() == expected


def test_a_quota_of_the_first_version_of_control_groups_counts(machine, tmp_path):
    machine(8)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, expected in (("300000\n", 3), ("-1\n", 8)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        assert threads.available_cores() == expected


def test_threads_are_as_many_as_asked_and_then_as_before(machine, monkeypatch):
    machine(8)
    before = torch.get_num_threads()
    with threads.use_threads(before + 1):
        assert torch.get_num_threads() == before + 1 and os.environ[threads.NUMBER] == str(before + 1)
    with threads.use_threads(None):
        assert torch.get_num_threads() == before and threads.NUMBER not in os.environ
    machine(8, quota="300000 100000")
    with threads.use_threads(None):
        assert torch.get_num_threads() == 3
    monkeypatch.setenv(threads.NUMBER, "5")
    with threads.use_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before and os.environ[threads.NUMBER] == "5"


def test_what_slows_the_threads_is_said(machine):
    machine(4)
    assert threads.describe_load(4) == "nothing that slows 4 threads on 4 cores"
    machine(4, busy=3)
    assert "other programs keep 3 of 4 cores busy" in threads.describe_load(2)
    assert threads.describe_load(2).endswith("--threads 1") and threads.describe_load(1).startswith("nothing")
    machine(4, quota="100000 100000")
    assert threads.describe_load(4).endswith("give --threads 1")
    machine(4, busy=99)
    assert "4 of 4 cores" in threads.describe_load(4) and threads.describe_load(4).endswith("--threads 1")


def test_a_run_records_its_threads_and_is_resumed_with_them(text_file, tmp_path, capsys, monkeypatch):
    seen: list[int] = []
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: (seen.append(torch.get_num_threads()), run(self))[1])
    out = tmp_path / "run"
    before = torch.get_num_threads()
    assert main(["train", "--data", str(text_file), "--out", str(out), "--threads", "3", *SMALL]) == 0
    assert tomllib.loads((out / "config.toml").read_text())["threads"] == 3
    assert main(["train", "--out", str(out), "--resume", "--max-steps", "101"]) == 0
    assert main(["train", "--out", str(out), "--resume", "--max-steps", "102", "--threads", "1"]) == 0
    assert "threads: 3 -> 1" in capsys.readouterr().out
    assert seen == [3, 3, 1] and torch.get_num_threads() == before


def test_one_of_several_processes_does_not_take_the_threads_of_one_alone(tmp_path, monkeypatch):
    (tmp_path / "config.toml").write_text("threads = 3\nmax_steps = 7\n")
    given = {"out": str(tmp_path), "resume": True}
    for environment, expected in (({"WORLD_SIZE": "2"}, 3), ({"RANK": "1"}, None), ({"WORLD_SIZE": "1"}, 3)):
        for name, value in environment.items():  # clusters set WORLD_SIZE for any program
            monkeypatch.setenv(name, value)
        resumed = with_sources(TrainSettings, given)
        assert (resumed.threads, resumed.max_steps) == (expected, 7)
        assert with_sources(TrainSettings, given | {"threads": 2}).threads == 2


@pytest.mark.parametrize("command", ["train", "sample", "eval", "learn", "study depth", "bench"])
def test_every_command_that_computes_takes_a_number_of_threads(command, capsys):
    assert main([*command.split(), "--threads", "0"]) == 2
    assert "--threads: expected an integer in [1, 1024], got 0" in capsys.readouterr().err
