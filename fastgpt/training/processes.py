"""The processes that train together: which one this is, what they agree on, and how all end when one fails.

`torchrun` starts them and says in the environment which is which. They share every batch: each takes its rows of it.
A process that trains alone has all rows, and imports nothing of torch.distributed.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..machine import resolve_device
from ..settings import UsageError, flag
from . import TrainingError

if TYPE_CHECKING:
    from torch.distributed import Store

_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
HOW_TO_START = "start the processes with: torchrun --nproc-per-node N -m fastgpt train ..."
_LONGEST_TURN = timedelta(days=7)
_IN_GLOO = re.compile(r"\bgloo/\S+\.(cc|h):\d+")  # a place in gloo's source, with which its errors begin


@dataclass(frozen=True)
class Processes:
    """`size` processes, of which this one has the number `rank`, and on its own machine the number `local_rank`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Store | None = field(default=None, compare=False, repr=False)  # of torchrun, which keeps it over restarts

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """This process's rows of a batch of all. Raises TrainingError where the processes cannot share it evenly."""
        if batch_size % self.size:
            raise TrainingError(
                f"batch_size: {batch_size} rows cannot be shared evenly by {self.size} processes: "
                f"give a --batch-size that is a multiple of {self.size}"
            )
        own = batch_size // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors that the processes have; in one process the tensor itself."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes have."""
        if self.size == 1:
            return number
        import torch.distributed as dist

        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def any(self, flag: bool) -> bool:
        """Whether it holds in any of the processes."""
        return bool(self.largest(int(flag)))

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process of each machine goes first; the others follow, and find what it has cached."""
        if self.size == 1:
            yield
            return
        import torch.distributed as dist

        # The usual group gives up after half an hour, and tokenizing a large text takes longer.
        patient = dist.new_group(backend="gloo", timeout=_LONGEST_TURN)
        if self.local_rank > 0:
            dist.barrier(patient)
        yield
        if self.local_rank == 0:
            dist.barrier(patient)

    def note_begun(self, run: str) -> None:
        """Let the processes that torchrun starts when one of these has failed know that `run` is theirs."""
        if self.store is not None:
            self.store.set(f"fastgpt/begun/{run}", "")

    def has_begun(self, run: str) -> bool:
        """Whether these processes were started again by torchrun, and have begun `run` before."""
        return self.store is not None and self.store.check([f"fastgpt/begun/{run}"])

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Raise TrainingError, in all processes, that names a setting which is not the same in all of them."""
        if self.size == 1:
            return
        import torch.distributed as dist

        of_all: list[Any] = [None] * self.size
        dist.all_gather_object(of_all, dict(settings))
        for rank, others in enumerate(of_all):
            for name, value in of_all[0].items():
                if others[name] != value:
                    raise TrainingError(
                        f"{flag(name)}: is {value!r} in process 0 and {others[name]!r} in process {rank}: "
                        f"start all processes with the same settings and data"
                    )


ALONE = Processes()


def of_environment(environment: Mapping[str, str]) -> Processes | None:
    """What `torchrun` has written there; None where it has not. Raises TrainingError where a part of it is missing."""
    if not any(name in environment for name in _OF_TORCHRUN[:3]):  # clusters set the others for any program
        return None
    for name in _OF_TORCHRUN:
        if not environment.get(name):
            raise TrainingError(
                f"{name}: is missing in the environment, which has a part of torchrun's; {HOW_TO_START}"
            )
    values = []
    for name in (*_OF_TORCHRUN[:3], "MASTER_PORT"):
        if not environment[name].isdecimal():
            raise TrainingError(
                f"{name}: expected a number in the environment, got {environment[name]!r}; {HOW_TO_START}"
            )
        values.append(int(environment[name]))
    rank, size, local_rank, _ = values
    if not rank < size:
        raise TrainingError(
            f"RANK: expected less than WORLD_SIZE={size} in the environment, got {rank}; {HOW_TO_START}"
        )
    return Processes(rank, size, local_rank)


@contextlib.contextmanager
def joined(device: str, environment: Mapping[str, str] = os.environ) -> Iterator[Processes]:
    """The processes that `torchrun` has started, joined for training on the device of that name; ALONE without them.

    Inside, all but the first print nothing. An error in one ends all, and where several have the same it is raised
    in one of them: in the others SystemExit takes its place.
    """
    processes = of_environment(environment)
    kept_by_torchrun = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if processes is None or (processes.size == 1 and not kept_by_torchrun):
        yield ALONE
        return
    backend, kind = "gloo", resolve_device(device).type
    if kind not in ("cpu", "cuda") and processes.size > 1:  # gloo moves no tensors of Apple's GPU
        raise ConfigError(f"device: several processes train on CUDA GPUs or on CPUs, not on {kind}: give --device cpu")
    if kind == "cuda":
        _take_own_gpu(device, processes.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    import torch.distributed as dist

    try:
        store, _, _ = next(dist.rendezvous("env://", processes.rank, processes.size))
    except (RuntimeError, ValueError) as error:
        place = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        raise TrainingError(
            f"MASTER_ADDR, MASTER_PORT: the {processes.size} processes do not meet at {place}: "
            f"{str(error).splitlines()[0].rstrip('.')}; {HOW_TO_START}"
        ) from error
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if kept_by_torchrun:
        processes = replace(processes, store=store)
    store = dist.PrefixStore(f"fastgpt/attempt {environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if processes.size == 1:
        yield processes
        return
    dist.init_process_group(backend, store=store, rank=processes.rank, world_size=processes.size)
    try:
        with contextlib.nullcontext() if processes.is_first else _silence():
            yield processes
    except (ConfigError, UsageError):  # as all have, and the command line shows it once
        raise
    except Exception as error:
        told = shown(error)
        if not _is_first_to_say(str(told), store, processes):
            raise SystemExit(1) from None
        raise told from error
    dist.destroy_process_group()


def _take_own_gpu(device: str, local_rank: int) -> None:
    """Make "cuda" mean this process's GPU."""
    if ":" in device:
        raise TrainingError(f"device: {device!r} is one GPU, and each process takes its own: give --device cuda")
    if local_rank >= torch.cuda.device_count():
        raise TrainingError(
            f"LOCAL_RANK: this machine has {torch.cuda.device_count()} GPUs, and process {local_rank} of it finds "
            f"none: give torchrun --nproc-per-node {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local_rank)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def shown(error: Exception) -> Exception:
    """The error to show: where a connection broke, that is what another process's end looks like from here."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError) or _IN_GLOO.search(str(error)):
        return TrainingError("another process has ended, and so does this one")
    return error


def _is_first_to_say(text: str, store: Store, processes: Processes) -> bool:
    try:
        return store.add(f"said/{text}", 1) == 1
    except Exception:  # whoever kept the store has ended
        return processes.is_first
