"""Weights in and out: FastGPT's own folder (config.json, model.safetensors), and Hugging Face's GPT-2.

Hugging Face's GPT-2 keeps linears as (in, out) "Conv1D" weights, so they are transposed on the way.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import (
    Checkpoint,
    CheckpointError,
    atomic_path,
    find_checkpoint,
    load_parameters,
    read_tensors,
    write_tensors,
)
from .config import ConfigError, GPTConfig, from_dict
from .model import GPT

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
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
    folder = Path(directory)
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
                tensors[_to_hf_name(name)[0].removesuffix("weight") + "bias"] = torch.zeros(parameter.shape[0])
    return tensors


def from_pretrained(directory: str | Path, **changes: Any) -> GPT:
    """Read a folder in either format, or a run's. `changes` override settings, such as dropout=0.1.

    The model is in evaluation mode, as Hugging Face's from_pretrained leaves it: no dropout before model.train().
    """
    folder = Path(directory)
    config_path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; only folders on this machine are read, nothing is downloaded")
    if not config_path.exists() and (folder / "checkpoint").is_dir():
        return _from_run(find_checkpoint(folder), changes)
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{config_path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{config_path}: not JSON ({error})") from error
    kind = config.pop("model_type", None) if isinstance(config, dict) else None
    weights = folder / "model.safetensors"
    if kind not in ("fastgpt", "gpt2"):
        raise CheckpointError(f"{config_path}: field 'model_type' is {kind!r}, expected 'fastgpt' or 'gpt2'")
    try:
        settings = config if kind == "fastgpt" else _settings_from_hf(config, config_path)
        model = GPT(from_dict(GPTConfig, {**settings, **changes}))
    except ConfigError as error:
        raise CheckpointError(f"{config_path}: {error}") from error
    tensors, _ = read_tensors(weights)
    load_parameters(model, tensors if kind == "fastgpt" else _from_hf(model, tensors, weights), weights)
    return model.eval()


def _from_run(path: Path, changes: dict[str, Any]) -> GPT:
    saved = Checkpoint.load(path)
    if saved.model != GPT.kind:
        raise CheckpointError(f"{path}: field 'model' is {saved.model!r}, not 'gpt'; fastgpt sample takes every model")
    model = GPT(from_dict(GPTConfig, {**saved.model_config, **changes}))
    load_parameters(model, saved.part("model"), path)
    return model.eval()


def _settings_from_hf(config: dict[str, Any], path: Path) -> dict[str, Any]:
    activation = config.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise CheckpointError(
            f"{path}: field 'activation_function' is {activation!r}, expected one of {sorted(_ACTIVATIONS)}"
        )
    required = {"vocab_size": "vocab_size", "block_size": "n_positions", "n_layer": "n_layer"}
    required |= {"n_head": "n_head", "n_embd": "n_embd"}
    for name in required.values():
        if name not in config:
            raise CheckpointError(f"{path}: field {name!r} is missing")
    for name, expected in (
        ("layer_norm_epsilon", 1e-5),
        ("scale_attn_by_inverse_layer_idx", False),
        ("scale_attn_weights", True),
    ):
        if config.get(name, expected) != expected:
            raise CheckpointError(f"{path}: field {name!r} is {config[name]!r}; FastGPT's GPT has {expected!r}")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise CheckpointError(f"{path}: field 'n_inner' is {config['n_inner']!r}; FastGPT's GPT has 4 * n_embd")
    settings = {ours: config[theirs] for ours, theirs in required.items()}
    tied = config.get("tie_word_embeddings", True)
    return {
        **settings,
        "dropout": float(config.get("resid_pdrop", 0.0)),
        "activation": _ACTIVATIONS[activation],
        "tie_weights": tied,
    }


def _from_hf(model: GPT, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Rename and transpose; older files lack the "transformer." prefix and carry the causal mask as a buffer."""
    buffers = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
    left = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    left = {name: t for name, t in left.items() if not buffers.fullmatch(name)}
    if model.cfg.tie_weights:
        left.pop("lm_head.weight", None)  # a copy of the token embedding
    found = {}
    for name, parameter in model.named_parameters():
        hf, transposed = _to_hf_name(name)
        tensor = left.pop(hf.removeprefix("transformer."), None)
        if tensor is None:
            raise CheckpointError(f"{path}: tensor {hf} is missing")
        found[name] = (tensor.t() if transposed else tensor).to(parameter.dtype)
    for name in left:
        raise CheckpointError(f"{path}: tensor {name} is not part of the model that config.json describes")
    return found
