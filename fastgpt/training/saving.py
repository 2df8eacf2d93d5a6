"""Where the checkpoints of a run go: to a file where it is one process, to a directory where it is several."""

from __future__ import annotations

from typing import Protocol

from ..checkpoint import Checkpoint
from ..files import link_or_copy
from .run_folder import RunFolder


class Saver(Protocol):
    def save(self, checkpoint: Checkpoint, is_best: bool = False) -> None:
        """Save the state of this step; `is_best` where its validation loss is the lowest so far."""

    def wait(self) -> None:
        """Return when all that was saved is on the disk. Raises CheckpointError where it cannot be written."""


class FileSaver:
    """latest.safetensors and best.safetensors, written before `save` returns."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def save(self, checkpoint: Checkpoint, is_best: bool = False) -> None:
        checkpoint.save(self.folder.latest)
        if is_best:
            link_or_copy(self.folder.latest, self.folder.best)
        self.folder.remove_superseded()

    def wait(self) -> None:
        pass


def saver(folder: RunFolder, *, is_first: bool = True, is_alone: bool = True) -> Saver:
    """What saves the run in `folder`; each of its processes makes one. What a killed run left there is removed."""
    if is_first:
        folder.remove_leftovers()
    if is_alone:
        return FileSaver(folder)
    from .sharded import DirectorySaver

    return DirectorySaver(folder, is_first)
