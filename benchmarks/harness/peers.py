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

from fastgpt.benchmarks.publish.rows import OURS

T = TypeVar("T")


class Absent(Exception):
    """Why a peer is not measured."""


@dataclass(frozen=True)
class Peer:
    """A function that takes the op's tensors by position and returns what the op returns."""

    function: Callable[..., Any]
    overwrites: bool = False  # it writes over its inputs, so that it needs copies
    # Of a function that is compiled for each shape: the same one uncompiled. Its results are checked on another shape,
    # for which nothing is compiled, so that each shape that is timed is compiled once.
    uncompiled: Callable[..., Any] | None = None


Makers = dict[str, Callable[[], Peer]]  # a peer's name -> what makes it, or raises `Absent`


def make_present(makers: Mapping[str, Callable[[], T]]) -> tuple[dict[str, T], dict[str, str]]:
    """What the makers make, and why each peer is missing that cannot be made, whatever it raises."""
    present, absent = {}, {}
    for name, make in makers.items():
        try:
            present[name] = make()
        except Exception as error:
            if name == OURS:
                raise
            absent[name] = str(error) if isinstance(error, Absent) else f"cannot be made: {_first_line(error)}"
    return present, absent


def import_peer(module: str, package: str) -> Any:
    """The module, where its package is installed and loads."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        is_installed = importlib.util.find_spec(module.split(".")[0]) is not None
        what = f"{package} needs {error.name}, which" if is_installed else package
        raise Absent(f"{what} is not installed") from None
    except (Exception, SystemExit) as error:  # a missing driver, an incompatible version: what it says is the reason
        raise Absent(f"{package} does not load: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)


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
        function = getattr(import_peer(module, package), name, None)
        if function is None:  # what is left of a package that was removed has no contents, and can be imported
            raise Absent(f"{package} has no {name} in {module}")
        return Peer(adapt(function) if adapt else function, overwrites)

    return {package: make}


def torch_peers(function: Callable[..., Any]) -> Makers:
    """PyTorch's own op, as it is and compiled."""
    return {
        "torch": lambda: Peer(function),
        "torch.compile": lambda: Peer(torch.compile(function, fullgraph=True, dynamic=False), uncompiled=function),
    }
