"""Training state on disk: one safetensors file per checkpoint, its settings as JSON in the header. No pickle anywhere.

A file is written beside its place, flushed to the disk and renamed onto it: whatever happens, the old one or the new
one is there, whole. A run of several processes writes a directory in its place (sharded.py). Tensors are called
``model.<parameter or buffer>``; ``step.<parameter>``, ``exp_avg.<parameter>``, ``exp_avg_sq.<parameter>`` (AdamW's
state); ``momentum_buffer.<parameter>`` (Muon's); and ``rng.cpu`` / ``rng.cuda`` / ``rng.mps``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import sharded
from .config import LAYOUTS, ConfigError, GPTConfig, from_dict
from .files import FileError, atomic_path, expand_path

if TYPE_CHECKING:  # a model without a tokenizer does without that module
    from .tokenizer import Tokenizer

FORMAT = "fastgpt-checkpoint-1"
_JSON_FIELDS = ("model_config", "train_config", "state")

CheckpointError = FileError  # a checkpoint's errors are those of any file


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except Exception as error:
        why = "a pointer to a file in Git LFS: run git lfs pull in its folder" if _is_lfs_pointer(path) else error
        raise CheckpointError(f"{path}: not a complete safetensors file ({why})") from error


def _is_lfs_pointer(path: Path) -> bool:
    """What a clone of a repository has in a large file's place where git-lfs is not installed."""
    try:
        with open(path, "rb") as file:
            return file.read(24) == b"version https://git-lfs."
    except OSError:
        return False


@dataclass
class Checkpoint:
    """What a run needs to go on, or to be sampled from. `state` is the trainer's counters.

    `model` is the name of the model in `baselines.MODELS`; a file that does not say holds a GPT. The tensors of a
    sharded checkpoint are on the meta device, names and shapes alone: `read` and `read_into` give their numbers.
    """

    model_config: dict[str, Any]
    train_config: dict[str, Any]
    state: dict[str, Any]
    tokenizer: str
    tensors: dict[str, Tensor]
    path: Path | None = None
    model: str = "gpt"

    def save(self, path: str | Path) -> None:
        metadata = {"format": FORMAT, "tokenizer": self.tokenizer, "model": self.model}
        metadata |= {name: json.dumps(getattr(self, name)) for name in _JSON_FIELDS}
        write_tensors(expand_path(path), self.tensors, metadata)

    def settings(self) -> dict[str, Any]:
        """All but the tensors, for the checkpoint.json of a sharded checkpoint."""
        fields = {name: getattr(self, name) for name in (*_JSON_FIELDS, "tokenizer", "model")}
        return {"format": sharded.FORMAT, **fields}

    @classmethod
    def load(cls, path: str | Path) -> Checkpoint:
        """Read a file, or the settings of a sharded checkpoint. Raises CheckpointError naming the file or the field."""
        path = expand_path(path)
        if sharded.is_sharded(path):
            return cls._load_sharded(path)
        tensors, metadata = read_tensors(path)
        return cls(**_fields_of(metadata, path), tensors=tensors, path=path)

    @classmethod
    def _load_sharded(cls, path: Path) -> Checkpoint:
        settings = sharded.read_settings(path)
        fields = _checked(settings, path / sharded.SETTINGS)
        sharded.check_step(path, fields["state"].get("step"))
        sharded.check_shards(path, settings["shards"])
        return cls(**fields, tensors=sharded.empty_tensors(path), path=path)

    def config(self, **changes: Any) -> GPTConfig:
        """The settings of the model with `changes` made to them; ConfigError where it is these that are wrong."""
        try:
            own: GPTConfig = from_dict(GPTConfig, self.model_config)
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        return from_dict(GPTConfig, {**dataclasses.asdict(own), **changes})

    @property
    def layout(self) -> str:
        """That of the data that the model was trained on. Older checkpoints do not say."""
        layout = self.train_config.get("layout", "blocks")
        if layout not in LAYOUTS:
            raise CheckpointError(f"{self.path}: field 'layout' is {layout!r}, expected one of {', '.join(LAYOUTS)}")
        return layout

    def read_tokenizer(self) -> Tokenizer:
        from .tokenizer import tokenizer_from_json

        try:
            return tokenizer_from_json(self.tokenizer)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors called ``prefix.*``, by the rest of their names."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + ".")}

    def read(self, prefix: str) -> dict[str, Tensor]:
        """As `part`, with numbers in all of them."""
        found = self.part(prefix)
        on_meta = {name: torch.empty_like(t, device="cpu") for name, t in found.items() if t.is_meta}
        self.read_into({f"{prefix}.{name}": tensor for name, tensor in on_meta.items()})
        return found | on_meta

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Copy the tensors of these names into `targets`, which have their shapes; of a DTensor, its own shard."""
        on_meta = {name: target for name, target in targets.items() if self.tensors[name].is_meta}
        if on_meta:
            assert self.path is not None
            sharded.read_into(self.path, on_meta)
        with torch.no_grad():
            for name in targets.keys() - on_meta.keys():
                sharded.copy_whole(targets[name], self.tensors[name])


def _fields_of(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """The fields of a Checkpoint in the header of the file `path`."""
    found = metadata.get("format")
    if found != FORMAT:
        raise CheckpointError(f"{path}: format is {found!r}, expected {FORMAT!r}: not a FastGPT checkpoint")
    fields: dict[str, Any] = dict(metadata)
    for name in _JSON_FIELDS:
        try:
            fields[name] = json.loads(metadata[name])
        except (KeyError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: field {name!r} is missing or is not JSON") from error
    return _checked(fields, path)


def _checked(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a Checkpoint, without others that a file has."""
    for name in _JSON_FIELDS:
        if name not in fields:
            raise CheckpointError(f"{path}: field {name!r} is missing")
        if not isinstance(fields[name], dict):
            raise CheckpointError(f"{path}: field {name!r} is no JSON object")
    if not isinstance(fields.get("tokenizer"), str):
        raise CheckpointError(f"{path}: field 'tokenizer' is missing")
    return {name: fields[name] for name in (*_JSON_FIELDS, "tokenizer")} | {"model": fields.get("model", "gpt")}


def check_same(path: Path | None, prefix: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for the first name or shape in which `found` differs from `expected`."""
    for name, tensor in expected.items():
        if name not in found:
            raise CheckpointError(f"{path}: tensor {prefix}.{name} is missing")
        if found[name].shape != tensor.shape:
            got, want = tuple(found[name].shape), tuple(tensor.shape)
            raise CheckpointError(f"{path}: tensor {prefix}.{name} has shape {got}, the model has {want}")
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{path}: tensor {prefix}.{name} is not part of the model")


def model_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """What of a model is kept: its parameters, shared ones once, and the buffers that its state dict holds."""
    kept = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in kept}


def count_parameters(path: Path) -> int:
    """How many parameters the model in a checkpoint has, by the names and shapes alone."""
    if sharded.is_sharded(path):
        shapes = {name: tensor.shape for name, tensor in sharded.empty_tensors(path).items()}
    else:
        with _opened(path) as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("model."))


def load_parameters(model: torch.nn.Module, found: dict[str, Tensor], path: Path | None) -> None:
    """Copy `found` into the model's parameters and buffers; nothing is changed unless every name and shape fits."""
    expected = model_tensors(model)
    check_same(path, "model", found, expected)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(found[name])


def newest(folder: Path, name: str) -> Path | None:
    """The "latest" or "best" checkpoint in a run's folder `checkpoint`.

    A run may have been one process at first, which writes files, and several later, which write directories, or the
    other way round: the checkpoint of the larger step counts.
    """
    file = folder / f"{name}.safetensors"
    directories = sharded.step_directories(folder)
    if name == "best":
        directories = [path for path in directories if sharded.read_settings(path).get("is_best")]
    if not directories:
        return file if file.exists() else None
    last = directories[-1]
    return file if file.exists() and _step_of(file) > sharded.step_of(last) else last


def _step_of(file: Path) -> int:
    """The step of a checkpoint in one file, from its header alone."""
    with _opened(file) as opened:
        metadata = opened.metadata() or {}
    step = _fields_of(metadata, file)["state"].get("step")
    if not isinstance(step, int):
        raise CheckpointError(f"{file}: field 'state' has no 'step'")
    return step


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint to take weights from: `path` itself, or the best (else the latest) of a run's folder."""
    path = expand_path(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; expected the folder of a run, as fastgpt train writes it, or of a "
            f"saved model"
        )
    if not path.is_dir() and sharded.is_sharded(path.parent):
        raise CheckpointError(
            f"{path}: is one file of a checkpoint of several processes; give its folder, {path.parent}"
        )
    if not path.is_dir() or sharded.is_sharded(path):
        return path
    for folder in (path / "checkpoint", path):
        for name in ("best", "latest"):
            if (found := newest(folder, name)) is not None:
                return found
    if (path / "config.toml").exists():
        raise CheckpointError(f"{path}: this run has no checkpoint yet; it writes one at its first evaluation")
    raise CheckpointError(
        f"{path}: holds no checkpoint; expected the folder of a run, as fastgpt train writes it, or of a saved model"
    )
