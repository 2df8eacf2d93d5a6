"""Checkpoints: whole or not at all, and an error that names file and field for anything else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastgpt import checkpoint as checkpoint_module
from fastgpt import files
from fastgpt.checkpoint import Checkpoint, CheckpointError, find_checkpoint, load_parameters
from fastgpt.config import ConfigError
from fastgpt.files import link_or_copy


def example(step: int = 3) -> Checkpoint:
    tensors = {"model.w": torch.arange(6.0).view(2, 3), "model.b": torch.ones(3), "rng.cpu": torch.get_rng_state()}
    return Checkpoint({"n_embd": 3}, {"lr": 0.1}, {"step": step}, '{"kind": "char"}', tensors)


class Model(torch.nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2, width))
        self.b = torch.nn.Parameter(torch.zeros(width))


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "latest.safetensors"
    saved = example()
    saved.save(path)
    loaded = Checkpoint.load(path)
    assert (loaded.model_config, loaded.train_config, loaded.state) == ({"n_embd": 3}, {"lr": 0.1}, {"step": 3})
    assert loaded.tokenizer == saved.tokenizer
    assert all(torch.equal(loaded.tensors[name], t) for name, t in saved.tensors.items())
    assert set(loaded.part("model")) == {"w", "b"}
    assert [p.name for p in path.parent.iterdir()] == ["latest.safetensors"], "no temporary file stays"


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_truncated_file(tmp_path, kept):
    path = tmp_path / "latest.safetensors"
    example().save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"latest\.safetensors: not a complete safetensors file"):
        Checkpoint.load(path)


def test_foreign_files(tmp_path):
    path = tmp_path / "latest.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        Checkpoint.load(path)
    torch.save({"model": torch.ones(3)}, path)  # a pickle: refused, never executed
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        Checkpoint.load(path)
    save_file({"w": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="format is None"):
        Checkpoint.load(path)


@pytest.mark.parametrize("field", ["model_config", "train_config", "state", "tokenizer"])
def test_missing_or_broken_field_is_named(tmp_path, field):
    path = tmp_path / "latest.safetensors"
    metadata = {"format": checkpoint_module.FORMAT, "tokenizer": "{}"}
    metadata |= {name: json.dumps({}) for name in ("model_config", "train_config", "state")}
    del metadata[field]
    save_file({"w": torch.ones(1)}, path, metadata)
    with pytest.raises(CheckpointError, match=f"latest.safetensors: field '{field}' is missing"):
        Checkpoint.load(path)
    if field != "tokenizer":
        save_file({"w": torch.ones(1)}, path, {**metadata, field: "{"})
        with pytest.raises(CheckpointError, match=f"field '{field}'"):
            Checkpoint.load(path)
        save_file({"w": torch.ones(1)}, path, {**metadata, field: "[]"})
        with pytest.raises(CheckpointError, match=f"field '{field}' is no JSON object"):
            Checkpoint.load(path)


def test_what_a_field_cannot_hold_is_named_with_the_file(tmp_path):
    saved = Checkpoint({"n_layer": "1"}, {"layout": "spirals"}, {}, '{"kind": "word"}', {}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: n_layer: expected an integer, got '1'"):
        saved.config()
    with pytest.raises(CheckpointError, match=r"x\.safetensors: field 'layout' is 'spirals', expected one of blocks"):
        _ = saved.layout
    with pytest.raises(CheckpointError, match=r"x\.safetensors: tokenizer: kind is 'word'"):
        saved.read_tokenizer()
    saved.model_config = {"n_layer": 1}
    with pytest.raises(ConfigError, match=r"^n_layer: expected an integer, got '2'"):  # the caller's
        saved.config(n_layer="2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("b"), "tensor model.b is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "tensor model.extra is not part of the model"),
        (lambda t: t.update(b=torch.ones(4)), r"tensor model.b has shape \(4,\), the model has \(3,\)"),
    ],
)
def test_mismatched_parameters_change_nothing(change, message):
    model, tensors = Model(), {"w": torch.ones(2, 3), "b": torch.ones(3)}
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_parameters(model, tensors, None)
    assert not model.w.any() and not model.b.any()


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "latest.safetensors"
    example(step=1).save(path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"latest\.safetensors: cannot be written: .*No space left on device"):
        example(step=2).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_best_keeps_what_it_was_when_latest_moves_on(tmp_path):
    latest, best = tmp_path / "latest.safetensors", tmp_path / "best.safetensors"
    example(step=1).save(latest)
    link_or_copy(latest, best)
    example(step=2).save(latest)
    assert Checkpoint.load(best).state["step"] == 1
    assert Checkpoint.load(latest).state["step"] == 2
    link_or_copy(latest, best)
    assert Checkpoint.load(best).state["step"] == 2


@pytest.mark.skipif(os.name != "posix", reason="needs modes")
def test_a_file_that_is_written_again_keeps_its_mode(tmp_path):
    path = tmp_path / "latest.safetensors"
    for mode in (0o600, 0o640, 0o664):
        example().save(path)
        path.chmod(mode)
        example(step=2).save(path)
        assert path.stat().st_mode & 0o777 == mode


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    best = tmp_path / "rün" / "checkpoint" / "best.safetensors"
    example().save("~/rün/checkpoint/best.safetensors")
    assert Checkpoint.load("~/rün/checkpoint/best.safetensors").path == best
    assert find_checkpoint("~/rün") == find_checkpoint(Path("~/rün")) == best
