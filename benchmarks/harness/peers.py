"""How a peer is made, and why one is absent. An op's peers are in its benchmark's file, the model's in models.py.

Every peer does the same work as FastGPT: same shapes, dtype and dropout. A peer that cannot be measured here (a package
that is not installed, a checkout whose path was not given, a kernel for another device) is listed with the reason.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Absent(Exception):
    """Why a peer is not measured."""


@dataclass(frozen=True)
class Peer:
    """A function that takes the op's tensors by position and returns what the op returns."""

    function: Callable[..., Any]
    overwrites: bool = False  # it writes over its inputs, so that it needs copies


Makers = dict[str, Callable[[], Peer]]  # a peer's name -> what makes it, or raises `Absent`


def make_present(makers: Mapping[str, Callable[[], T]]) -> tuple[dict[str, T], dict[str, str]]:
    """What the makers make, and the reasons of those that raise `Absent`."""
    present, absent = {}, {}
    for name, make in makers.items():
        try:
            present[name] = make()
        except Absent as reason:
            absent[name] = str(reason)
    return present, absent


def import_peer(module: str, package: str) -> Any:
    """The module, where its package is installed and loads."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        is_installed = importlib.util.find_spec(module.split(".")[0]) is not None
        what = f"{package} needs {error.name}, which" if is_installed else package
        raise Absent(f"{what} is not installed") from None
    except Exception as error:  # a driver that is missing, an incompatible version: whatever it says is the reason
        raise Absent(f"{package} does not load: {str(error).splitlines()[0] if str(error) else error!r}") from None


def only_on_gpus(device: torch.device) -> None:
    if device.type != "cuda":
        raise Absent("its kernels run on CUDA devices only")


def gpu_peer(
    device: torch.device, package: str, path: str, adapt: Callable[..., Any] | None = None, overwrites: bool = False
) -> Makers:
    """The function at `path` in a package whose kernels need a GPU; `adapt` makes it take the op's tensors."""

    def make() -> Peer:
        only_on_gpus(device)
        module, _, name = path.rpartition(".")
        function = getattr(import_peer(module, package), name)
        return Peer(adapt(function) if adapt else function, overwrites)

    return {package: make}


def torch_peers(function: Callable[..., Any]) -> Makers:
    """PyTorch's own op, as it is and compiled."""
    return {
        "torch": lambda: Peer(function),
        "torch.compile": lambda: Peer(torch.compile(function, fullgraph=True, dynamic=False)),
    }
