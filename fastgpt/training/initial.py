"""What `fastgpt train --init-from` starts from: a trained model, in the settings of the run that trains it further."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..baselines import model_class
from ..checkpoint import load_parameters, model_tensors
from ..config import ConfigError
from ..language_model import LanguageModel
from ..loading import load
from ..tokenizer import Tokenizer

_POSITIONS = "position_embedding.weight"  # (T, C)


def initial_model(path: str | Path, asked: Mapping[str, Any]) -> tuple[LanguageModel, Tokenizer]:
    """The model that `fastgpt.load(path)` gives, with the changes that are asked for, and its tokenizer.

    asked: settings that were asked for, by name: fields of GPTConfig, "model" and "tokenizer". A `dropout` replaces the
    model's, and so does a smaller `block_size`: the embeddings of positions beyond it are dropped. Any other setting
    has to be the model's own. Raises ConfigError naming the setting.
    """
    model, tokenizer = load(path)
    own = {"model": model.kind, "tokenizer": tokenizer.kind, **dataclasses.asdict(model.cfg)}
    changes = {}
    for name, value in asked.items():
        if name == "block_size" and value > own[name]:
            raise ConfigError(
                f"{name}: the model in {path} has positions for {own[name]} tokens, not {value}; give at most "
                f"{own[name]}, or leave it out"
            )
        if name in ("block_size", "dropout"):
            changes[name] = value
        elif value != own[name]:
            raise ConfigError(
                f"{name}: the model in {path} has {own[name]!r}, not {value!r}, and keeps it; leave it out, or train a "
                f"new model without --init-from"
            )
    return (_changed(model, changes) if changes else model), tokenizer


def _changed(model: LanguageModel, changes: Mapping[str, Any]) -> LanguageModel:
    """The same weights in a model with these changes to its settings."""
    tensors = model_tensors(model)
    cfg = dataclasses.replace(model.cfg, **changes)
    if _POSITIONS in tensors:
        tensors[_POSITIONS] = tensors[_POSITIONS][: cfg.block_size]
    changed = model_class(model.kind)(cfg)
    load_parameters(changed, tensors, None)
    changed.tokenizer, changed.layout = model.tokenizer, model.layout
    return changed.eval()
