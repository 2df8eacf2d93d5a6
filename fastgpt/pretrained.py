"""A model's folder, config.json and model.safetensors, in FastGPT's format or in Hugging Face's of GPT-2.

The model lies above this file: `write` takes its settings and tensors, and `read` gives those to make one from. Besides
the two formats `read` takes Hugging Face's folders with weights in several files, and the folder of a run. Both formats
have the tokenizer, where the model has one, in the same files (tokenizer_files.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from . import huggingface
from .checkpoint import Checkpoint, CheckpointError, check_same, find_checkpoint, read_tensors, write_tensors
from .config import LAYOUTS, ConfigError, GPTConfig, from_dict
from .files import atomic_path, expand_path
from .sharded import is_sharded

if TYPE_CHECKING:  # a model without a tokenizer does without that module
    from .tokenizer import Tokenizer

Expected = Callable[[GPTConfig], Mapping[str, Tensor]]  # the tensors, without numbers, of a GPT with these settings


class Found(NamedTuple):
    """What a model is made from."""

    cfg: GPTConfig
    tensors: dict[str, Tensor]
    source: Path  # the file of the tensors
    layout: str = "blocks"


def write(
    cfg: GPTConfig,
    parameters: Mapping[str, Tensor],
    directory: str | Path,
    format: str,
    tokenizer: Tokenizer | None = None,
    layout: str = "blocks",
) -> None:
    """Write the GPT with the settings `cfg` and these parameters. format: "fastgpt" or "huggingface".

    Raises ValueError for another format, or for settings that the format cannot express, before anything is written.
    """
    if format == "fastgpt":
        config, tensors = {"model_type": "fastgpt", **dataclasses.asdict(cfg)}, dict(parameters)
    elif format == "huggingface":
        config, tensors = huggingface.gpt2_config(cfg), huggingface.gpt2_tensors(cfg, parameters)
    else:
        raise ValueError(f"format: expected 'fastgpt' or 'huggingface', got {format!r}")
    if layout != "blocks":  # transformers keeps a field that it does not know, and GPT-2 has no other layout
        config["layout"] = layout
    if format == "huggingface" and tokenizer is not None:
        config["bos_token_id"] = config["eos_token_id"] = tokenizer.end_of_text
    folder = expand_path(directory)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    with atomic_path(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        from .tokenizer_files import write_tokenizer

        write_tokenizer(folder, tokenizer, cfg.block_size)


def read(directory: str | Path, changes: dict[str, Any], expected: Expected) -> Found:
    """The settings of the model in `directory`, with `changes` made to them, its tensors by name, and its layout.

    `expected(cfg)` are the tensors of a GPT with these settings, on the meta device: a config.json that does not fit
    the tensors is found before memory is taken. Raises CheckpointError naming the file and the field or tensor.
    """
    folder = expand_path(directory)
    config_path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder on this machine; fastgpt.load fetches models by name")
    if not config_path.exists() and ((folder / "checkpoint").is_dir() or is_sharded(folder)):
        return _read_run(find_checkpoint(folder), changes)
    if not config_path.exists():
        raise CheckpointError(
            f"{folder}: holds neither a model's config.json nor a run's checkpoint/; name the folder of one model"
        )
    config = _read_json(config_path)
    kind, layout = _kind_of(config, config_path), config.pop("layout", "blocks")
    if layout not in LAYOUTS:
        raise CheckpointError(f"{config_path}: field 'layout' is {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if kind == "gpt2":
        return _read_gpt2(config, config_path, changes, expected)._replace(layout=layout)
    with _naming(config_path):
        cfg: GPTConfig = from_dict(GPTConfig, {**config, **changes})
    tensors, source = _read_weights(folder)
    check_same(source, "model", tensors, expected(cfg))
    return Found(cfg, tensors, source, layout)


def _read_gpt2(config: dict[str, Any], path: Path, changes: dict[str, Any], expected: Expected) -> Found:
    with _naming(path):
        theirs = huggingface.GPT2Config.from_json(config)
        cfg: GPTConfig = from_dict(GPTConfig, {**theirs.settings(), **changes})
    if "dropout" not in changes and not theirs.has_one_dropout:
        _warn(
            f"{path}: resid_pdrop, embd_pdrop and attn_pdrop differ, and FastGPT's GPT has one dropout: it is "
            f"{theirs.resid_pdrop}, the first; from_pretrained(..., dropout=...) sets another"
        )
    tensors, source = _read_weights(path.parent)
    tensors = huggingface.without_prefix(tensors)
    if "tie_weights" not in changes:
        tied = huggingface.is_tied(theirs.tie_word_embeddings, tensors)
        if theirs.tie_word_embeddings and not tied:
            _warn(
                f"{source}: lm_head.weight differs from the token embedding, so they are not tied, although "
                f"config.json says so; 'tie_word_embeddings': false there ends this warning"
            )
        cfg = dataclasses.replace(cfg, tie_weights=tied)
    wanted = expected(cfg)
    with _naming(source):
        tensors = huggingface.fastgpt_tensors(tensors, wanted, cfg.tie_weights)
    check_same(source, "model", tensors, wanted)
    return Found(cfg, tensors, source)


def _read_run(path: Path, changes: dict[str, Any]) -> Found:
    saved = Checkpoint.load(path)
    if saved.model != "gpt":
        raise CheckpointError(f"{path}: field 'model' is {saved.model!r}, not 'gpt'; fastgpt.load takes every model")
    return Found(saved.config(**changes), saved.read("model"), path, saved.layout)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say in which file a setting or tensor is wrong."""
    try:
        yield
    except (ConfigError, huggingface.ConversionError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=5)  # who called GPT.from_pretrained


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # without the byte order mark that some editors write
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error


def _kind_of(config: Any, path: Path) -> str:
    """The format, taken out of `config`: fastgpt, or gpt2, which the first uploads did not say."""
    kind = config.pop("model_type", None) if isinstance(config, dict) else None
    if kind is None and isinstance(config, dict) and {"n_positions", "n_head"} <= config.keys():
        return "gpt2"
    if kind in ("fastgpt-onnx", "fastgpt-torch"):  # exporting.py writes these
        raise CheckpointError(
            f"{path.parent}: is an export for {'onnxruntime' if kind == 'fastgpt-onnx' else 'torch.export.load'}, and "
            f"holds no model that FastGPT reads; give the run or the folder that it was made from"
        )
    if kind not in ("fastgpt", "gpt2"):
        raise CheckpointError(f"{path}: field 'model_type' is {kind!r}, expected 'fastgpt' or 'gpt2'")
    return kind


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """The tensors of a folder, and the file to name where one of them is wrong."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_tensors(single)[0], single
    if index.is_file():
        return _read_shards(index), index
    for pickled in sorted(folder.glob("pytorch_model*.bin")):
        place = json.dumps(str(folder), ensure_ascii=False)
        code = f"from transformers import GPT2LMHeadModel as M; M.from_pretrained({place}).save_pretrained({place})"
        raise CheckpointError(
            f"{pickled}: is a pickle, which can run code when it is loaded, and is not read; convert it with: "
            f"python -c {shlex.quote(code)}"
        )
    raise CheckpointError(f"{single}: no such file")


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of a model in several files: the index has the file of each tensor, all in its own folder."""
    listed = _read_json(index)
    file_of = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(file_of, dict) or not file_of:
        raise CheckpointError(f"{index}: field 'weight_map' is missing; expected the file of each tensor")
    shards: dict[str, dict[str, Tensor]] = {}
    for name, file in file_of.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file):
            raise CheckpointError(
                f"{index}: tensor {name} is in {file!r}, expected a *.safetensors file of this folder"
            )
        if file not in shards:
            shards[file] = read_tensors(index.with_name(file))[0]
        if name not in shards[file]:
            raise CheckpointError(f"{index.with_name(file)}: tensor {name} is missing")
    return {name: shards[file][name] for name, file in file_of.items()}
