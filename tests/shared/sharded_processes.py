"""What the processes of tests/training/test_sharded.py do."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastgpt import GPTConfig
from fastgpt.checkpoint import Checkpoint, CheckpointError, newest
from fastgpt.data.corpus import Corpus
from fastgpt.training import loop, runs
from fastgpt.training.processes import Processes
from fastgpt.training.run_folder import RunFolder
from small_runs import MODEL, TRAIN

WHOLE = torch.arange(30.0).reshape(5, 6)  # 5 rows: no number of processes but 5 has equally many each


def state(n: int, value: float = 0.0) -> dict[str, torch.Tensor]:
    """A sharded weight of 5 rows, one of a single row, which some processes have no part of, and what all have."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (n,))
    tensors = {"model.w": WHOLE + value, "model.b": torch.full((1,), value), "exp_avg.w": WHOLE.bfloat16()}
    sharded: dict[str, Any] = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in tensors.items()}
    return sharded | {"step.w": torch.tensor(value), "rng.cpu": torch.arange(9, dtype=torch.uint8)}


def checkpoint(step: int, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    return Checkpoint({}, {}, {"step": step}, "{}", tensors)


def saver(rank: int, folder: str):
    from fastgpt.training.saving import saver

    return saver(RunFolder(Path(folder)), is_first=rank == 0, is_alone=False)


def save_some(rank: int, n: int, folder: str) -> None:
    """Saves steps 1 to 4, of which 2 is the best, and changes the weights as soon as each save has returned."""
    directory, tensors = saver(rank, folder), state(n)
    for step in (1, 2, 3, 4):
        tensors["model.w"].to_local().copy_(state(n, step)["model.w"].to_local())
        directory.save(checkpoint(step, tensors), is_best=step <= 2)
        tensors["model.w"].to_local().zero_()
    directory.wait()


def read_own_part(rank: int, n: int, folder: str) -> tuple[bool, bool, float]:
    """Whether this process's shards are what they were, and its number that is whole."""
    targets = state(n, 100)
    newest(Path(folder) / "checkpoint", "latest")
    saved = Checkpoint.load(Path(folder) / "checkpoint" / "step-00000004")
    saved.read_into({name: targets[name] for name in ("model.w", "model.b", "exp_avg.w", "step.w")})
    same = torch.equal(targets["model.w"].full_tensor(), WHOLE + 4)
    moments = torch.equal(targets["exp_avg.w"].full_tensor(), WHOLE.bfloat16())
    return same, moments, float(targets["step.w"] + targets["model.b"].full_tensor())


def read_own_part_of_a_file(rank: int, n: int, file: str) -> bool:
    """As `read_own_part`, from a checkpoint of one process."""
    targets = state(n, 100)
    Checkpoint.load(file).read_into({"model.w": targets["model.w"]})
    return torch.equal(targets["model.w"].full_tensor(), WHOLE)


def fail_in_the_last(rank: int, n: int, folder: str) -> str:
    """The error that each process gets where the last one's disk is full."""
    from fastgpt.training import sharded

    directory = saver(rank, folder)
    if rank == n - 1:

        def full(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        sharded._Writer.write_data = full  # type: ignore[method-assign]
    directory.save(checkpoint(5, state(n)))
    try:
        directory.save(checkpoint(6, state(n)))
    except CheckpointError as error:
        dist.barrier()
        return str(error)
    return "no error"


def die_while_writing(rank: int, n: int, folder: str) -> str:
    """Every process has written its file of step 5, but the first is killed before it gives the directory its name."""
    from fastgpt.training import sharded

    if rank == 0:
        sharded.sync_folder = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
    directory = saver(rank, folder)
    directory.save(checkpoint(5, state(n)))
    try:
        directory.wait()
    except RuntimeError:  # the first has gone
        return "not written"
    return "written"


def train(rank: int, n: int, text: str, out: str, max_steps: int, is_sharded: bool = False) -> int:
    """Start or resume the run in `out`, and go on to `max_steps`; the step that it started from.

    `is_sharded` has each process hold a part of each parameter.
    """
    loop.plot_loss = lambda metrics, out: None  # which would import matplotlib
    corpus = Corpus.load(text, "char", block_size=16)
    # A constant rate: where max_steps bends it, a run to 6 steps is no part of one to 12.
    cfg = dataclasses.replace(TRAIN, max_steps=max_steps, min_lr=TRAIN.lr, warmup_steps=0)
    cfg = dataclasses.replace(cfg, parallel="fsdp" if is_sharded else "ddp")
    config = GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **MODEL)
    parts: Any = {"config": config, "train_config": cfg, "corpus": corpus, "processes": Processes(rank, n)}
    goes_on = runs.can_resume(out)
    dist.barrier()
    run = runs.resume(out, runs.load_latest(out), **parts) if goes_on else runs.start(out, **parts)
    first = run.state["step"]
    run.run(lines=False)
    return first
