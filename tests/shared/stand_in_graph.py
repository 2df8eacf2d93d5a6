"""A stand-in for CUDA graphs: what was recorded is run again, and its results are written into the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class StandIn:
    """A `cuda_graph.Recorder` for any device, which counts its recordings and replays."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.recordings = self.replays = 0

    def warm_up(self, run: Callable[[], Any]) -> Any:
        return run()

    def record(self, run: Callable[[], Any], generator: torch.Generator | None = None) -> Callable[[], Any]:
        self.recordings += 1
        kept: list[Any] = []

        def replay() -> Any:
            self.replays += 1
            self.again(run, kept)
            return kept[0]

        return replay

    def again(self, run: Callable[[], Any], kept: list[Any]) -> None:
        """Run once more, with the results where those of the first run are. A wrong graph is made here."""
        results = run()
        if not kept:
            kept.append(results)
        for old, new in zip(_as_tuple(kept[0]), _as_tuple(results), strict=True):
            old.copy_(new)


class Failing(StandIn):
    """Nothing can be recorded: a driver that raises."""

    def record(self, run: Callable[[], Any], generator: torch.Generator | None = None) -> Callable[[], Any]:
        self.recordings += 1
        raise RuntimeError("operation not permitted when stream is capturing\nand a second line")


class DoingNothing(StandIn):
    """The graph of the first replay, and then one that changes nothing."""

    def again(self, run: Callable[[], Any], kept: list[Any]) -> None:
        if not kept:
            super().again(run, kept)


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
