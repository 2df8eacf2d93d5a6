"""What a step of training keeps, computes and exchanges, counted while it runs; `fastgpt.plan` says it beforehand."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class Saved:
    """Bytes of what autograd saves for backward, by storage, each of which counts once; parameters do not count."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._own = {_address(p) for p in parameters}
        self._sizes: dict[int, int] = {}
        self._kept: list[Tensor] = []  # so that no address is used twice

    @property
    def n_bytes(self) -> int:
        return sum(self._sizes.values())

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if address not in self._own and address not in self._sizes:
            self._sizes[address] = tensor.untyped_storage().nbytes()
            self._kept.append(tensor)
        return tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def flops_of(call: Callable[[], Any]) -> int:
    """Operations of a call, as PyTorch counts them: matrix products, a multiply-add as two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that this process holds of the tensors; of a sharded one its own part."""
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """AdamW's two of each parameter."""
    return [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]


class Exchanged(TorchDispatchMode):
    """Bytes of the whole tensors of each kind of collective that is called from Python, and how often it is called.

    What DDP exchanges is called from C++, and is not seen here: a communication hook sees its buckets.
    """

    # The name of a collective, which of its arguments is the whole tensor, and what plan.py calls it.
    KINDS: ClassVar = {"_allgather_base_": (0, "all_gather"), "_reduce_scatter_base_": (1, "reduce_scatter")}

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes: Counter = Counter()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in self.KINDS:
            position, kind = self.KINDS[name]
            self.n_bytes[kind] += math.prod(args[position].shape) * args[position].element_size()
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))
