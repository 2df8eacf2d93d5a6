"""Hugging Face's GPT-2: its names, tensors and settings, converted to FastGPT's and back.

Only conversion: no file is read here and no model is built, so the model can use it (see `pretrained.py`). Hugging Face
keeps the weights of GPT-2's linears as (in, out), its "Conv1D", so they are transposed on the way.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import GPTConfig, check_types

# transformers has several implementations of one formula, each under a name of its own.
_ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "relu": "relu", "relu2": "relu2"}
_ACTIVATIONS |= dict.fromkeys(
    ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), "gelu_tanh"
)
_LINEARS = {"attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
_EMBEDDINGS = {"token_embedding.weight": "wte.weight", "position_embedding.weight": "wpe.weight"}
_LAYER_NORM_EPS = 1e-5


class ConversionError(ValueError):
    """A GPT-2 that FastGPT's GPT cannot express, or a file that is not complete. The message names field or tensor."""


def gpt2_name(name: str) -> tuple[str, bool]:
    """FastGPT's parameter name -> (Hugging Face's name, whether the tensor is transposed there)."""
    if name == "lm_head.weight":
        return name, False
    if name in _EMBEDDINGS:
        return f"transformer.{_EMBEDDINGS[name]}", False
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:  # ln_f
        return f"transformer.{name}", False
    layer, module, kind = match.groups()
    return f"transformer.h.{layer}.{_LINEARS.get(module, module)}.{kind}", module in _LINEARS and kind == "weight"


# ---- from FastGPT ----


def gpt2_config(cfg: GPTConfig) -> dict[str, Any]:
    """What config.json says of a GPT with these settings. Raises ConversionError for a setting GPT-2 does not have."""
    for name, wanted in (("norm", "pre"), ("residual", True), ("is_causal", True), ("feed_forward", True)):
        if getattr(cfg, name) != wanted:
            raise ConversionError(f"format: GPT-2 has {name}={wanted!r}, this model has {getattr(cfg, name)!r}")
    if cfg.activation == "relu2":
        raise ConversionError("format: transformers' GPT-2 has no activation 'relu2'")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.block_size,
        "n_ctx": cfg.block_size,
        "n_embd": cfg.n_embd,
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}[cfg.activation],
        "resid_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": cfg.dropout,
        "layer_norm_epsilon": _LAYER_NORM_EPS,
        "tie_word_embeddings": cfg.tie_weights,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def gpt2_tensors(cfg: GPTConfig, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a GPT with these settings, under Hugging Face's names and in its layout."""
    tensors = {}
    for name, parameter in parameters.items():
        theirs, transposed = gpt2_name(name)
        tensors[theirs] = parameter.t() if transposed else parameter
    if not cfg.bias:  # GPT-2 always has biases: zeros say the same
        for name, parameter in parameters.items():
            if name.endswith("weight") and "embedding" not in name and name != "lm_head.weight":
                tensors[gpt2_name(name)[0].removesuffix("weight") + "bias"] = parameter.new_zeros(parameter.shape[0])
    return tensors


# ---- from Hugging Face ----


@dataclass(frozen=True)
class GPT2Config:
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
    layer_norm_epsilon: float = _LAYER_NORM_EPS
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool | None = True

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> GPT2Config:
        """Raises ConversionError or ConfigError for a field that is missing or holds something else than it should."""
        config = {_COMMON_NAMES.get(name, name): value for name, value in config.items()}
        fields = dataclasses.fields(cls)
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in config:
                raise ConversionError(f"field {field.name!r} is missing")
        return cls(**{field.name: config[field.name] for field in fields if field.name in config})

    def settings(self) -> dict[str, Any]:
        """The settings of GPTConfig that say the same. Raises ConversionError for what FastGPT's GPT does not have."""
        self._expect("layer_norm_epsilon", _LAYER_NORM_EPS)
        self._expect("scale_attn_weights", True)
        self._expect("scale_attn_by_inverse_layer_idx", False)
        self._expect("n_inner", None, 4 * self.n_embd)
        if self.activation_function not in _ACTIVATIONS:
            raise ConversionError(
                f"field 'activation_function' is {self.activation_function!r}, expected one of {sorted(_ACTIVATIONS)}"
            )
        return {
            "vocab_size": self.vocab_size,
            "block_size": self.n_positions,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_embd": self.n_embd,
            "dropout": self.resid_pdrop,
            "activation": _ACTIVATIONS[self.activation_function],
        }

    def _expect(self, name: str, *expected: Any) -> None:
        value = getattr(self, name)
        if value not in expected:
            raise ConversionError(f"field {name!r} is {value!r}; FastGPT's GPT has {expected[-1]!r}")

    @property
    def has_one_dropout(self) -> bool:
        return self.resid_pdrop == self.embd_pdrop == self.attn_pdrop


# The names that transformers gives these fields in every model; it reads them in a GPT-2's config.json too.
_COMMON_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix "transformer.", which older files lack, and the causal masks that they hold as buffers."""
    masks = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in plain.items() if not masks.fullmatch(name)}


def is_tied(declared: bool | None, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the head is the token embedding: as `declared`, but a head that differs is kept, as transformers 5 does.

    None, which transformers 4 took for false and 5 refuses, leaves it to the tensors (`without_prefix`).
    """
    head, embedding = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    own_head = head is not None and embedding is not None and not torch.equal(head, embedding)
    return declared is not False and not own_head


def fastgpt_tensors(tensors: Mapping[str, Tensor], names: Iterable[str], tied: bool) -> dict[str, Tensor]:
    """The parameters called `names` in FastGPT, out of `tensors` (`without_prefix`), in FastGPT's layout.

    Raises ConversionError for a tensor that is missing, left over or quantised.
    """
    left = dict(tensors)
    if tied and "lm_head.weight" in left:  # a copy of the embedding; in some files the only one
        left.setdefault("wte.weight", left.pop("lm_head.weight"))
    found = {}
    for name in names:
        theirs, transposed = gpt2_name(name)
        tensor = left.pop(theirs.removeprefix("transformer."), None)
        if tensor is None:
            raise ConversionError(f"tensor {theirs} is missing")
        if not tensor.is_floating_point():
            raise ConversionError(f"tensor {theirs} holds {tensor.dtype}; quantised weights are not read")
        found[name] = tensor.t() if transposed else tensor
    for name in left:
        raise ConversionError(f"tensor {name} is not part of the model that config.json describes")
    return found
