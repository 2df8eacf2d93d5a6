"""CUDA graphs: the kernels that a function launches, recorded once and then launched all at once.

From Python, each kernel takes the host tens of microseconds, and many run for less. A graph takes one launch for all of
them. It repeats what was recorded, on the memory it was recorded with: inputs are copied into tensors that stay where
they are, and Python code between the kernels, such as a hook, does not run again. So whoever uses a graph compares its
first results with those of the function, and goes on without it, and with the reason, where they differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import nn

from .config import ConfigError
from .ops.library import end_allocating, hooks_of

Result = TypeVar("Result")


class Recorder(Protocol):
    """What makes graphs. Tests have one that runs the function again, in the place of a graph."""

    def warm_up(self, run: Callable[[], Result]) -> Result:
        """run(). It has to run once before it is recorded, so that all kernels are compiled and all state is there."""

    def record(self, run: Callable[[], Result], generator: torch.Generator | None = None) -> Callable[[], Result]:
        """A function that launches what `run` launches, and returns the same tensors each time, with new values.

        It draws from `generator` and from PyTorch's own generator what `run` would draw. `run` is called, but none of
        its kernels runs. Raises whatever the recording raises; the function may then be called as before.
        """


class CUDARecorder:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def warm_up(self, run: Callable[[], Result]) -> Result:
        with torch.cuda.device(self._device):
            stream, side_stream = torch.cuda.current_stream(), torch.cuda.Stream()
            side_stream.wait_stream(stream)  # PyTorch asks for a side stream here, as the recording is on one
            with torch.cuda.stream(side_stream):
                result = run()
            stream.wait_stream(side_stream)
        return result

    def record(self, run: Callable[[], Result], generator: torch.Generator | None = None) -> Callable[[], Result]:
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        with torch.cuda.device(self._device):
            pool = torch.cuda.graph_pool_handle()  # of its own, by a name that is known if the recording fails
            try:
                # A recording that fails leaves its stream as the current one; the outer context puts that right. The
                # mode lets another thread pin memory meanwhile, for the next batches.
                with (
                    torch.cuda.stream(torch.cuda.current_stream()),
                    torch.cuda.graph(graph, pool, torch.cuda.Stream(), capture_error_mode="thread_local"),
                ):
                    result = run()
            except BaseException:
                end_allocating(torch.cuda.current_device(), pool)
                _stop_waiting(default_generator(self._device), generator)
                raise

        def replay() -> Result:
            graph.replay()
            return result

        return replay


def _stop_waiting(*generators: torch.Generator | None) -> None:
    """Let `generators` draw again. After a recording that failed, their states wait for its end, and a copy does not.

    PyTorch would say "Offset increment outside graph capture encountered unexpectedly".
    """
    for generator in generators:
        if generator is not None:
            generator.graphsafe_set_state(generator.clone_state())


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that PyTorch draws from on `device` where it is given none."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def recorder(device: torch.device) -> Recorder:
    """What makes graphs on `device`. Raises ConfigError for a device that has none."""
    if device.type != "cuda":
        raise ConfigError(f"cuda_graph: needs a CUDA device, and this is {str(device)!r}; switch it off")
    return CUDARecorder(device)


def why_not_recorded(model: object) -> str | None:
    """Why a graph would leave out something that `model` does, or None. Hooks are Python code, which it does not run.

    A model that is no torch.nn.Module has none that could be found.
    """
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            reason = hooks_of(module)
            if reason is not None:
                return f"{name or 'the model'}: {reason}, which a graph would not run"
    return None


def said(what: str, reason: str) -> str:
    """`reason`, after a warning that `what` goes on without a graph."""
    warnings.warn(f"fastgpt: {what} goes on without a CUDA graph: {reason}", stacklevel=4)
    return reason


def words(error: Exception) -> str:
    """The first line of an error, or its type where it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__
