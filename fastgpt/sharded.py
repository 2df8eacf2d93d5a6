"""A checkpoint of several processes: a directory with a safetensors file of each, and checkpoint.json for the rest.

torch.distributed.checkpoint writes the files, each process its own, and reads any part of a tensor from whichever files
have it: a checkpoint of two processes is read by one, by four, or by none at all, as `fastgpt.load` does. No pickle.
A directory is written under a hidden name and renamed when it is complete, so what has the name is whole.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import FileError

FORMAT = "fastgpt-sharded-checkpoint-1"
SETTINGS = "checkpoint.json"  # all but the tensors
REMEDY = "copy the whole directory again, or remove it to go on from an older one, if there is one"
_STEP = re.compile(r"step-\d{8,}")


def directory_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(directory: Path) -> int:
    return int(directory.name[len("step-") :])


def step_directories(folder: Path) -> list[Path]:
    """The sharded checkpoints in a run's folder `checkpoint`, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def is_sharded(path: Path) -> bool:
    """Whether `path` is one sharded checkpoint, perhaps a damaged one."""
    return path.is_dir() and ((path / SETTINGS).is_file() or _STEP.fullmatch(path.name) is not None)


def read_settings(path: Path) -> dict[str, Any]:
    """What checkpoint.json holds. Raises FileError where the file is missing, damaged, or of another format."""
    file = path / SETTINGS
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{file}: cannot be read: {error.strerror}; {REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{file}: is not JSON ({error}); {REMEDY}") from error
    found = settings.get("format") if isinstance(settings, dict) else None
    if found != FORMAT:
        raise FileError(f"{file}: format is {found!r}, expected {FORMAT!r}: not a FastGPT checkpoint")
    if not isinstance(settings.get("shards"), dict):
        raise FileError(f"{file}: field 'shards' is missing: the size in bytes of each file; {REMEDY}")
    return settings


def check_step(path: Path, step: object) -> None:
    """Raise FileError where the directory is named as that of another step: by their names a run finds its newest."""
    if _STEP.fullmatch(path.name) and step != step_of(path):
        raise FileError(f"{path}: is of step {step!r}, by its {SETTINGS}; give it its old name, or {REMEDY}")


def check_shards(path: Path, sizes: Mapping[str, int]) -> None:
    """Raise FileError for the first file that is missing, has another size than `sizes` says, or does not belong."""
    from safetensors import safe_open

    for name, size in sizes.items():
        shard = path / name
        if not shard.is_file():
            raise FileError(f"{shard}: is missing; {REMEDY}")
        if shard.stat().st_size != size:
            raise FileError(f"{shard}: has {shard.stat().st_size} bytes, not {size}; {REMEDY}")
        try:
            with safe_open(shard, framework="pt") as file:
                file.keys()
        except Exception as error:  # safetensors has an exception type of its own
            raise FileError(f"{shard}: not a complete safetensors file ({error}); {REMEDY}") from error
    for shard in sorted(path.glob("*.safetensors")):
        if shard.name not in sizes:
            raise FileError(f"{shard}: is no part of this checkpoint; remove the file")


def empty_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the checkpoint as shapes and dtypes, without numbers: they are on the meta device."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")  # type: ignore[union-attr]
        for name, tensor in stored.items()
    }


def read_into(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Copy the tensors of these names into `targets`, of the same shapes, on any device and in any dtype.

    Of a DTensor this process reads its own shard alone, without a word to the other processes.
    """
    from torch.distributed import checkpoint

    reader = checkpoint.HuggingFaceStorageReader(str(path))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it shall be
            checkpoint.load({name: t.detach() for name, t in targets.items()}, storage_reader=reader, no_dist=True)
    except checkpoint.CheckpointException as error:
        raise FileError(f"{path}: cannot be read: {reason_of(error)}; {REMEDY}") from error


def copy_whole(target: Tensor, whole: Tensor) -> None:
    """Copy `whole`, which every process has, into `target`; into a DTensor the shard that is this process's own."""
    if type(target) not in (Tensor, torch.nn.Parameter):
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(target, DTensor):
            whole = whole.to(target.device, target.dtype)
            whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)


def reason_of(error: BaseException) -> str:
    """In a line, what went wrong in the first process that failed."""
    failures = getattr(error, "failures", None)  # a CheckpointException has an error and its traceback of each process
    if failures:
        error = next(iter(failures.values()))[0]
    lines = str(getattr(error, "strerror", None) or error).splitlines() or [type(error).__name__]
    return lines[0]
