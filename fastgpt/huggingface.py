"""Weights in and out: FastGPT's own folder (config.json, model.safetensors), and Hugging Face's GPT-2.

Hugging Face's GPT-2 keeps linears as (in, out) "Conv1D" weights, so they are transposed on the way.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import (
    Checkpoint,
    CheckpointError,
    check_same,
    find_checkpoint,
    load_parameters,
    model_tensors,
    read_tensors,
    write_tensors,
)
from .config import ConfigError, GPTConfig, check_types, from_dict
from .files import atomic_path, expand_path
from .model import GPT
from .modules import describe

# transformers has several implementations of one formula, each under a name of its own.
_ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "relu": "relu", "relu2": "relu2"}
_ACTIVATIONS |= dict.fromkeys(
    ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), "gelu_tanh"
)
_NAMES = {"attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}


def _to_hf_name(name: str) -> tuple[str, bool]:
    """FastGPT's parameter name -> (Hugging Face's, whether it is transposed)."""
    if name == "lm_head.weight":
        return name, False
    top = {"token_embedding.weight": "wte.weight", "position_embedding.weight": "wpe.weight"}
    if name in top:
        return f"transformer.{top[name]}", False
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:  # ln_f
        return f"transformer.{name}", False
    layer, module, kind = match.groups()
    hf = f"transformer.h.{layer}.{_NAMES.get(module, module)}.{kind}"
    return hf, module in _NAMES and kind == "weight"


def save_pretrained(model: GPT, directory: str | Path, format: str = "fastgpt") -> None:
    """Write `model` to a folder. format: "fastgpt" or "huggingface" (pre-norm, causal, tied, residual models only)."""
    folder = expand_path(directory)
    _check_unchanged(model)
    if format == "fastgpt":
        config = {"model_type": "fastgpt", **dataclasses.asdict(model.cfg)}
        tensors: dict[str, Tensor] = dict(model.named_parameters())
    elif format == "huggingface":
        config, tensors = _hf_config(model.cfg), _hf_tensors(model)
    else:
        raise ValueError(f"format: expected 'fastgpt' or 'huggingface', got {format!r}")
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    with atomic_path(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_unchanged(model: GPT) -> None:
    """Settings and tensors are all that a folder holds; a model that was changed since it was made may be more."""
    with torch.device("meta"):  # names without memory
        plain = GPT(model.cfg)
    remedy = "undo what was changed in it before it is saved (merge adapters, remove parametrizations), or save its "
    remedy += "state_dict()"
    for names, names_expected in (
        (dict(model.named_parameters()).keys(), dict(plain.named_parameters()).keys()),  # of tied ones the first
        (model.state_dict().keys(), plain.state_dict().keys()),
    ):
        for name in sorted(names ^ names_expected):
            what = "is not part of" if name in names else "is missing in this model, and part of"
            raise ValueError(f"model: parameter {name} {what} a GPT with its configuration; {remedy}")
    parts = dict(plain.named_modules())
    for name, module in model.named_modules():
        found, expected = describe(module), describe(parts.get(name))
        if name and found != expected:
            raise ValueError(f"model: {name} is {found}, and in a GPT with its configuration {expected}; {remedy}")


def _hf_config(cfg: GPTConfig) -> dict[str, Any]:
    for name, wanted in (("norm", "pre"), ("residual", True), ("is_causal", True), ("feed_forward", True)):
        if getattr(cfg, name) != wanted:
            raise ValueError(f"format: GPT-2 has {name}={wanted!r}, this model has {getattr(cfg, name)!r}")
    if cfg.activation == "relu2":
        raise ValueError("format: transformers' GPT-2 has no activation 'relu2'")
    back = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.block_size,
        "n_ctx": cfg.block_size,
        "n_embd": cfg.n_embd,
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "activation_function": back[cfg.activation],
        "resid_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": cfg.dropout,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": cfg.tie_weights,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _hf_tensors(model: GPT) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        hf, transposed = _to_hf_name(name)
        tensors[hf] = parameter.t() if transposed else parameter
    if not model.cfg.bias:  # GPT-2 always has biases: zeros say the same
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and "embedding" not in name and name != "lm_head.weight":
                tensors[_to_hf_name(name)[0].removesuffix("weight") + "bias"] = parameter.new_zeros(parameter.shape[0])
    return tensors


def from_pretrained(directory: str | Path, **changes: Any) -> GPT:
    """Read a folder in either format, or a run's. `changes` override settings, such as dropout=0.1.

    The model is in evaluation mode, as Hugging Face's from_pretrained leaves it: no dropout before model.train().
    """
    folder = expand_path(directory)
    config_path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; only folders on this machine are read, nothing is downloaded")
    if not config_path.exists() and (folder / "checkpoint").is_dir():
        return _from_run(find_checkpoint(folder), changes)
    if not config_path.exists():
        raise CheckpointError(
            f"{folder}: holds neither a model's config.json nor a run's checkpoint/; name the folder of one model"
        )
    config = _read_json(config_path)
    kind = _kind_of(config, config_path)
    try:
        settings = config if kind == "fastgpt" else _settings_from_hf(config, config_path, "dropout" in changes)
        cfg: GPTConfig = from_dict(GPTConfig, {**settings, **changes})
    except ConfigError as error:
        raise CheckpointError(f"{config_path}: {error}") from error
    tensors, source = _read_weights(folder)
    if kind == "gpt2":
        tensors = _plain_names(tensors)
        if "tie_weights" not in changes:
            cfg = dataclasses.replace(
                cfg, tie_weights=_is_tied(config.get("tie_word_embeddings", True), tensors, source)
            )
    with torch.device("meta"):  # what config.json is wrong about is said before memory is asked for
        plain = GPT(cfg)
    if kind == "gpt2":
        tensors = _from_hf(plain, tensors, source)
    check_same(source, "model", tensors, model_tensors(plain))
    model = GPT(cfg)
    load_parameters(model, tensors, source)
    return model.eval()


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


def _from_run(path: Path, changes: dict[str, Any]) -> GPT:
    saved = Checkpoint.load(path)
    if saved.model != GPT.kind:
        raise CheckpointError(f"{path}: field 'model' is {saved.model!r}, not 'gpt'; fastgpt sample takes every model")
    model = GPT(from_dict(GPTConfig, {**saved.model_config, **changes}))
    load_parameters(model, saved.part("model"), path)
    return model.eval()


@dataclass(frozen=True)
class _GPT2Config:
    """What a config.json of transformers says about the computation, with the types and defaults it has there."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool | None = True

    def __post_init__(self) -> None:
        check_types(self)


# The names that transformers gives these fields in every model; it reads them in a GPT-2's config.json too.
_COMMON_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def _settings_from_hf(config: dict[str, Any], path: Path, own_dropout: bool) -> dict[str, Any]:
    config = {_COMMON_NAMES.get(name, name): value for name, value in config.items()}
    fields = dataclasses.fields(_GPT2Config)
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in config:
            raise CheckpointError(f"{path}: field {field.name!r} is missing")
    theirs = _GPT2Config(**{field.name: config[field.name] for field in fields if field.name in config})

    def check(name: str, *expected: Any) -> None:
        value = getattr(theirs, name)
        if value not in expected:
            raise CheckpointError(f"{path}: field {name!r} is {value!r}; FastGPT's GPT has {expected[-1]!r}")

    check("layer_norm_epsilon", 1e-5)
    check("scale_attn_weights", True)
    check("scale_attn_by_inverse_layer_idx", False)
    check("n_inner", None, 4 * theirs.n_embd)
    if theirs.activation_function not in _ACTIVATIONS:
        raise CheckpointError(
            f"{path}: field 'activation_function' is {theirs.activation_function!r}, "
            f"expected one of {sorted(_ACTIVATIONS)}"
        )
    if not own_dropout and not theirs.resid_pdrop == theirs.embd_pdrop == theirs.attn_pdrop:
        warnings.warn(
            f"{path}: resid_pdrop, embd_pdrop and attn_pdrop differ, and FastGPT's GPT has one dropout: it is "
            f"{theirs.resid_pdrop}, the first; from_pretrained(..., dropout=...) sets another",
            stacklevel=4,
        )
    return {
        "vocab_size": theirs.vocab_size,
        "block_size": theirs.n_positions,
        "n_layer": theirs.n_layer,
        "n_head": theirs.n_head,
        "n_embd": theirs.n_embd,
        "dropout": theirs.resid_pdrop,
        "activation": _ACTIVATIONS[theirs.activation_function],
    }


def _plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix "transformer.", which older files lack, and the causal masks that they hold as buffers."""
    masks = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in plain.items() if not masks.fullmatch(name)}


def _is_tied(declared: bool | None, tensors: dict[str, Tensor], path: Path) -> bool:
    """Whether the head is the token embedding: as `declared`, but a head that differs is kept, as transformers 5 does.

    null, which transformers 4 took for false and 5 refuses, leaves it to the file.
    """
    head, embedding = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    own = head is not None and embedding is not None and not torch.equal(head, embedding)
    if own and declared:
        warnings.warn(
            f"{path}: lm_head.weight differs from the token embedding, so they are not tied, although config.json says "
            f"so; 'tie_word_embeddings': false there ends this warning",
            stacklevel=4,  # the caller of GPT.from_pretrained
        )
    return declared is not False and not own


def _from_hf(model: GPT, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Rename and transpose."""
    left = dict(tensors)
    if model.cfg.tie_weights and "lm_head.weight" in left:
        left.setdefault("wte.weight", left.pop("lm_head.weight"))
    found = {}
    for name, parameter in model.named_parameters():
        hf, transposed = _to_hf_name(name)
        tensor = left.pop(hf.removeprefix("transformer."), None)
        if tensor is None:
            raise CheckpointError(f"{path}: tensor {hf} is missing")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: tensor {hf} holds {tensor.dtype}; quantised weights are not read")
        found[name] = (tensor.t() if transposed else tensor).to(parameter.dtype)
    for name in left:
        raise CheckpointError(f"{path}: tensor {name} is not part of the model that config.json describes")
    return found
