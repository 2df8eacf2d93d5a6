"""The processes that train together: their environment, what they agree on, and their errors."""

from __future__ import annotations

import socket

import pytest
import torch

import processes_together as together
from fastgpt.config import ConfigError
from fastgpt.training import TrainingError, processes
from fastgpt.training.processes import ALONE, Processes, joined, of_environment, shown

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def test_without_torchrun_a_process_is_alone():
    with joined("cpu", {"MASTER_ADDR": "localhost"}) as processes:
        assert processes == ALONE and processes.is_first
    tensor = torch.ones(2)
    assert ALONE.sum(tensor) is tensor and ALONE.any(True) and not ALONE.any(False)
    assert ALONE.rows(7) == slice(0, 7)


def test_the_environment_of_torchrun():
    assert of_environment(TORCHRUN) == Processes(1, 2, 1)


@pytest.mark.parametrize("name", TORCHRUN)
def test_a_part_of_the_environment_is_refused_by_name(name):
    rest = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(TrainingError, match=f"^{name}: is missing .*torchrun --nproc-per-node N -m fastgpt train"):
        of_environment(rest)


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "2"), ("RANK", "one"), ("WORLD_SIZE", "-2"), ("MASTER_PORT", "ssh")]
)
def test_a_wrong_environment_is_refused_by_name(name, value):
    with pytest.raises(TrainingError, match=f"^{name}: expected"):
        of_environment(TORCHRUN | {name: value})


def test_a_port_that_another_program_has_is_named():
    with socket.create_server(("localhost", 0)) as taken:
        port = str(taken.getsockname()[1])
        first = TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port}
        expected = f"^MASTER_ADDR, MASTER_PORT: the 2 processes do not meet at localhost:{port}: .*torchrun"
        with pytest.raises(TrainingError, match=expected), joined("cpu", first):
            pass


def test_a_device_whose_tensors_cannot_be_exchanged_is_refused_before_processes_join(monkeypatch):
    monkeypatch.setattr(processes, "resolve_device", torch.device)
    with pytest.raises(ConfigError, match=r"^device: .* not on mps: give --device cpu"), joined("mps", TORCHRUN):
        pass


def test_rows_of_a_batch_that_the_processes_share():
    assert [Processes(rank, 4).rows(8) for rank in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    with pytest.raises(TrainingError, match=r"^batch_size: 6 .* 4 processes: give a --batch-size that is a multiple"):
        Processes(0, 4).rows(6)


def test_what_processes_agree_on(gloo):
    assert gloo(3, together.agree) == [(6.0, True, False, 2)] * 3


def test_a_setting_that_differs_is_named_in_all(gloo):
    said = gloo(2, together.differ)
    assert said[0] == said[1]
    assert said[0].startswith("--batch-size: is 8 in process 0 and 9 in process 1: ")


def test_the_first_takes_its_turn_however_long_it_takes(gloo, tmp_path):
    assert gloo(2, together.take_turns, str(tmp_path / "written")) == [False, True]


def test_a_lost_connection_is_named_as_another_process_s_end_and_other_errors_stay():
    lost = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:13991"
    assert str(shown(RuntimeError(lost))) == "another process has ended, and so does this one"
    own = TrainingError("runs/gloo/metrics.jsonl: cannot be written: No space left on device")
    assert shown(own) is own


def test_an_error_in_one_process_is_raised_here(gloo):
    with pytest.raises(AssertionError, match="the second fails"):
        gloo(2, together.fail_in_the_second)
