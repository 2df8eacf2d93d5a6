"""What the processes of tests/training/test_processes.py do."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fastgpt.training import TrainingError
from fastgpt.training.processes import Processes


def agree(rank: int, n: int) -> tuple[float, bool, bool, int]:
    """A sum, whether something holds in one and in none, and the largest number."""
    processes, own = Processes(rank, n), torch.tensor(rank + 1.0)
    total = float(processes.sum(own))
    assert own == rank + 1.0, "the argument keeps its value"
    return total, processes.any(rank == 1), processes.any(False), processes.largest(rank)


def differ(rank: int, n: int) -> str:
    try:
        Processes(rank, n).check_same({"seed": 1, "batch_size": 8 + rank})
    except TrainingError as error:
        return str(error)
    return ""


def take_turns(rank: int, n: int, path: str) -> bool:
    """The first process takes longer than the usual group waits; returns whether the file was there after its turn."""
    dist.distributed_c10d._set_pg_timeout(timedelta(milliseconds=1))
    with Processes(rank, n, rank).in_turn():
        was_there = Path(path).exists()
        if rank == 0:
            time.sleep(0.2)
            Path(path).touch()
    return was_there


def fail_in_the_second(rank: int, n: int) -> None:
    if rank == 1:
        raise ValueError("the second fails")
    Processes(rank, n).any(False)
