"""A small model with random weights, a text for it, and its folder in shards."""

from __future__ import annotations

import codecs
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import GPT, GPTConfig
from fastgpt.checkpoint import CheckpointError

SHAPE = {"vocab_size": 41, "block_size": 16, "n_layer": 2, "n_head": 3, "n_embd": 24, "dropout": 0.0}


def random_model(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


IDX = torch.randint(41, (2, 16), generator=torch.Generator().manual_seed(1))


def write_shards(folder, model) -> dict:
    """`model` in two shards; returns the index."""
    model.save_pretrained(folder, format="huggingface")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"metadata": {"total_size": 1}, "weight_map": {name: files[i % 2] for i, name in enumerate(tensors)}}
    for file in files:
        save_file({name: t for name, t in tensors.items() if index["weight_map"][name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_bytes(codecs.BOM_UTF8 + json.dumps(index).encode())
    return index


def refuses(folder, *words: str) -> str:
    with pytest.raises(CheckpointError) as error:
        GPT.from_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message and all(word in message for word in words), message
    return message


def set_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "delete"}))
