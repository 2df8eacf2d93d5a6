"""Writes the checkpoints of a run of several processes, in the background, while training goes on.

Each process copies its tensors and writes its own file; torch.distributed.checkpoint shares out what several have. The
directory has a hidden name until the first process, once all have written, renames it: a run that is killed before
leaves a hidden directory, which nobody reads and the next start removes.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, async_save

from ..checkpoint import Checkpoint, CheckpointError
from ..files import sync_folder
from ..sharded import SETTINGS, directory_name, reason_of
from .run_folder import RunFolder


class DirectorySaver:
    """Saves to `folder`. Every process makes one and calls it for the same steps."""

    def __init__(self, folder: RunFolder, is_first: bool) -> None:
        self.folder, self.is_first = folder, is_first
        # A group of its own: training sends through the usual one meanwhile. The copies are in the CPU's memory.
        self._group = dist.new_group(backend="gloo")
        self._pending: tuple[Path, Future[Any]] | None = None

    def save(self, checkpoint: Checkpoint, is_best: bool = False) -> None:
        """Copy the checkpoint, which may change from then on, and start to write it. Waits for the one before."""
        self.wait()
        target = self.folder.checkpoints / directory_name(checkpoint.state["step"])
        writer = _Writer(self.folder, target, checkpoint.settings() | {"is_best": is_best})
        tensors = {name: tensor.detach() for name, tensor in checkpoint.tensors.items()}
        written = async_save(tensors, storage_writer=writer, process_group=self._group)
        self._pending = target, cast("Future[Any]", written)

    def wait(self) -> None:
        """Return when the last checkpoint is there as a whole; CheckpointError in all processes where one failed."""
        if self._pending is None:
            return
        (target, written), self._pending = self._pending, None
        try:
            written.result()
        except CheckpointException as error:
            if self.is_first:
                self.folder.remove_leftovers()
            raise CheckpointError(
                f"{target}: cannot be written: {reason_of(error)}; the checkpoints before it are untouched"
            ) from error


class _Writer(HuggingFaceStorageWriter):
    """Writes to a hidden directory, and in the first process completes it and gives it its name."""

    def __init__(self, folder: RunFolder, target: Path, settings: dict[str, Any]) -> None:
        self.folder, self.target, self.settings = folder, target, settings
        self.temporary = folder.hidden(target)
        super().__init__(str(self.temporary), save_distributed=True)

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        """Called once in the first process, when all have written. Where it raises, all processes get the error."""
        names = sorted({written.storage_data.relative_path for of_one in results for written in of_one})
        for name in names:
            if not (self.temporary / name).is_file():
                raise CheckpointError(
                    f"{name} is not in the folder of the first process: --out must be on a disk that all machines share"
                )
        settings = self.settings | {"shards": {name: (self.temporary / name).stat().st_size for name in names}}
        with open(self.temporary / SETTINGS, "w", encoding="utf-8") as file:
            json.dump(settings, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.temporary)
        if self.target.is_dir():  # the same step of the same run, which was resumed there and stopped at once
            shutil.rmtree(self.temporary)
        else:
            self.temporary.rename(self.target)
        sync_folder(self.target.parent)
        self.folder.remove_superseded()
