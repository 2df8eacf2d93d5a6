"""What a step of training keeps, computes and exchanges, counted while it runs; `fastgpt.plan` says it beforehand."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from fastgpt.ops.library import DispatchMode


class Saved:
    """Bytes of what autograd saves for backward, by storage, each of which counts once.

    The model's parameters do not count. Under FSDP these are the whole ones, which are there while a module computes.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.n_bytes = 0  # at the end of the last `counting`
        self._model = model
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        self._storages.clear()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield
        self.n_bytes = sum(storage.nbytes() for storage in self._storages.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        plain = (p for p in self._model.parameters() if not isinstance(p, DTensor))
        if all(storage.data_ptr() != p.untyped_storage().data_ptr() for p in plain):
            self._storages[storage.data_ptr()] = storage
        return tensor


def flops_of(call: Callable[[], Any]) -> int:
    """Operations of a call, as PyTorch counts them: matrix products, a multiply-add as two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that this process holds of the tensors; of a sharded one its own part."""
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """AdamW's two of each parameter."""
    return [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]


class Exchanged(DispatchMode):
    """Bytes of the whole tensors of each kind of collective that FSDP calls while the mode is on, by the plan's names.

    DDP calls its collectives from C++, where no mode sees them; `all_reduce_bucket` is a communication hook that does.
    """

    # Of a collective: which of its arguments is the whole tensor, and its name.
    KINDS: ClassVar = {"_allgather_base_": (0, "all_gather"), "_reduce_scatter_base_": (1, "reduce_scatter")}

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes: Counter = Counter()
        self.phase = "forward"  # the caller says when it is another one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        position, name = self.KINDS.get(func._schema.name.partition("::")[2], (0, None))
        if name == "all_gather":
            name = f"{name}_{self.phase}"
        if name is not None:
            self.n_bytes[name] += bytes_of([args[position]])
        return func(*args, **(kwargs or {}))

    def all_reduce_bucket(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's own mean of a bucket of gradients, which ends before it returns."""
        gradients = bucket.buffer()
        self.n_bytes["all_reduce"] += bytes_of([gradients])
        dist.all_reduce(gradients.div_(dist.get_world_size()))
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(gradients)
        return done
