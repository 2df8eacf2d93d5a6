"""One way to a trained model and its tokenizer, which `fastgpt.load` and every command take.

model, tokenizer = fastgpt.load("runs/shakespeare")
print(model.generate_text("ROMEO. ", max_new_tokens=100))
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from .baselines import MODELS
from .checkpoint import Checkpoint, CheckpointError, find_checkpoint, load_parameters
from .hub import model_place
from .language_model import LanguageModel
from .model import GPT
from .tokenizer import Tokenizer
from .tokenizer_files import read_tokenizer


def load(path: str | Path, **changes: Any) -> tuple[LanguageModel, Tokenizer]:
    """The model, in evaluation mode on the CPU, and its tokenizer, which `model.tokenizer` holds as well.

    path: the folder of a run, of which the best checkpoint is taken; one checkpoint; a folder that
    `model.save_pretrained` wrote; or the folder of a Hugging Face GPT-2, with config.json, safetensors, and either
    tokenizer.json or vocab.json and merges.txt. Where this machine has nothing of that name, "gpt2" and the like, and
    "owner/name", are fetched from the Hugging Face Hub. `changes` override settings of the model: dropout=0.1.

    Raises CheckpointError, or ValueError for a tokenizer, naming the file and what is wrong with it.
    """
    place = find_model(path)
    if (place / "config.json").is_file() and (place / "checkpoint").is_dir():
        warnings.warn(
            f"{place}: holds a saved model and a run: the saved model is read; name {place / 'checkpoint'} for the run",
            stacklevel=2,
        )
    model = _saved_model(place, changes) if (place / "config.json").is_file() else _checkpoint(place, changes)
    assert model.tokenizer is not None
    if model.tokenizer.vocab_size > model.cfg.vocab_size:
        raise CheckpointError(
            f"{place}: the tokenizer has {model.tokenizer.vocab_size} tokens and the model only "
            f"{model.cfg.vocab_size}: they belong to different models"
        )
    return model, model.tokenizer


def find_model(path: str | Path) -> Path:
    """The file or folder that a model is read from: the file with a saved or exported model stands for its folder."""
    place = model_place(path)
    is_saved = (
        place.name in ("model.safetensors", "model.onnx", "model.pt2") and (place.parent / "config.json").is_file()
    )
    return place.parent if is_saved else place


def _saved_model(folder: Path, changes: dict[str, Any]) -> LanguageModel:
    model = GPT.from_pretrained(folder, **changes)
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "merges.txt")):
        raise CheckpointError(
            f"{folder}: holds a model without a tokenizer: add its tokenizer.json, or vocab.json and merges.txt; "
            f"in Python, GPT.from_pretrained reads the model alone"
        )
    model.tokenizer = read_tokenizer(folder)
    return model


def _checkpoint(path: Path, changes: dict[str, Any]) -> LanguageModel:
    saved = Checkpoint.load(find_checkpoint(path))
    if saved.model not in MODELS:
        raise CheckpointError(f"{saved.path}: field 'model' is {saved.model!r}, expected one of {', '.join(MODELS)}")
    model = MODELS[saved.model](saved.config(**changes))
    load_parameters(model, saved.read("model"), saved.path)
    model.tokenizer, model.layout = saved.read_tokenizer(), saved.layout
    return model.eval()
