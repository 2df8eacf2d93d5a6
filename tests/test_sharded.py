"""Sharded checkpoints without process groups: read in full or in part, found beside files, and told when damaged."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt import GPT, GPTConfig
from fastgpt.checkpoint import Checkpoint, CheckpointError, find_checkpoint, model_tensors, newest
from fastgpt.cli import main
from fastgpt.sharded import step_directories
from fastgpt.tokenizer import CharTokenizer
from sharded_checkpoints import write_sharded

CONFIG = GPTConfig(vocab_size=5, block_size=8, n_layer=1, n_head=2, n_embd=8)
SHARD = "shard-00002-model-00001-of-00001.safetensors"


def example(step: int = 4, value: float = 0.0) -> Checkpoint:
    torch.manual_seed(3)
    tensors = {f"model.{name}": tensor.detach() + value for name, tensor in model_tensors(GPT(CONFIG)).items()}
    tensors |= {"step.ln_f.weight": torch.tensor(4.0), "exp_avg.ln_f.weight": torch.arange(8.0)}
    tensors["rng.cpu"] = torch.get_rng_state()
    tokenizer = CharTokenizer.train("abcde").to_json()
    return Checkpoint(dataclasses.asdict(CONFIG), {}, {"step": step}, tokenizer, tensors)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with a checkpoint of three processes."""
    write_sharded(example(), tmp_path / "checkpoint" / "step-00000004", 3, is_best=True)
    return tmp_path


@pytest.mark.parametrize("place", ["", "checkpoint", "checkpoint/step-00000004"])
def test_the_model_of_several_processes_is_loaded_whole(run, place):
    model, tokenizer = fastgpt.load(run / place)
    assert tokenizer.encode("abcde") == [0, 1, 2, 3, 4]
    models = [model] if place == "checkpoint" else [model, GPT.from_pretrained(run / place)]
    for name, tensor in example().part("model").items():
        assert all(torch.equal(found.state_dict()[name], tensor) for found in models), name


def test_shapes_are_known_before_numbers_are_read(run):
    saved = Checkpoint.load(run / "checkpoint" / "step-00000004")
    original = example()
    assert saved.tensors.keys() == original.tensors.keys()
    assert all(tensor.is_meta and tensor.shape == original.tensors[n].shape for n, tensor in saved.tensors.items())
    assert (saved.model_config, saved.state, saved.model) == (original.model_config, {"step": 4}, "gpt")
    numbers = {prefix: saved.read(prefix) for prefix in ("model", "step", "exp_avg", "rng")}
    for name, tensor in original.tensors.items():
        prefix, _, rest = name.partition(".")
        assert torch.equal(numbers[prefix][rest], tensor) and numbers[prefix][rest].dtype == tensor.dtype, name


def test_a_part_is_read_into_what_is_there(run):
    saved = Checkpoint.load(run / "checkpoint" / "step-00000004")
    targets = {"step.ln_f.weight": torch.zeros(()), "exp_avg.ln_f.weight": torch.zeros(8, dtype=torch.bfloat16)}
    saved.read_into(targets)
    assert targets["step.ln_f.weight"] == 4 and torch.equal(targets["exp_avg.ln_f.weight"].float(), torch.arange(8.0))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def overwritten(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def without(field: str):
    def change(path: Path) -> None:
        file = path / "checkpoint.json"
        settings = json.loads(file.read_text())
        del settings[field]
        file.write_text(json.dumps(settings))

    return change


def of_step(step: int):
    def change(path: Path) -> None:
        file = path / "checkpoint.json"
        settings = json.loads(file.read_text())
        settings["state"]["step"] = step
        file.write_text(json.dumps(settings))

    return change


REMEDY = "copy the whole directory again, or remove it to go on from an older one, if there is one"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / SHARD).unlink(), f"{SHARD}: is missing; {REMEDY}"),
        (lambda d: cut(d / SHARD), f"{SHARD}: has .* bytes, not .*; {REMEDY}"),
        (lambda d: overwritten(d / SHARD), f"{SHARD}: not a complete safetensors file .*; {REMEDY}"),
        (lambda d: shutil.copy(d / SHARD, d / "other.safetensors"), "other.safetensors: is no part of this checkpoint"),
        (lambda d: (d / "checkpoint.json").unlink(), f"checkpoint.json: cannot be read: No such file.*; {REMEDY}"),
        (lambda d: cut(d / "checkpoint.json"), f"checkpoint.json: is not JSON .*; {REMEDY}"),
        (lambda d: (d / "checkpoint.json").write_text("[]"), "checkpoint.json: format is None, expected"),
        (without("shards"), "checkpoint.json: field 'shards' is missing"),
        (without("state"), "checkpoint.json: field 'state' is missing"),
        (without("tokenizer"), "checkpoint.json: field 'tokenizer' is missing"),
        (of_step(3), f"step-00000004: is of step 3, by its checkpoint.json; give it its old name, or {REMEDY}"),
    ],
)
def test_damage_names_the_file_and_the_remedy(run, capsys, change, message):
    change(run / "checkpoint" / "step-00000004")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.load(run / "checkpoint" / "step-00000004")
    assert main(["sample", str(run), "--prompt", "a"]) == 1
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1


@pytest.mark.parametrize("name", [SHARD, "checkpoint.json"])
def test_one_file_of_it_is_refused_and_its_folder_named(run, name):
    folder = run / "checkpoint" / "step-00000004"
    with pytest.raises(CheckpointError, match=f"{name}: is one file of .*; give its folder, {folder}$"):
        fastgpt.load(folder / name)


def test_the_larger_step_counts_whichever_its_form(tmp_path):
    folder = tmp_path / "checkpoint"
    assert newest(folder, "latest") is None
    for name, step in (("latest", 30), ("best", 20)):
        example(step).save(folder / f"{name}.safetensors")
    write_sharded(example(10), folder / "step-00000010", is_best=True)
    assert find_checkpoint(tmp_path) == newest(folder, "best") == folder / "best.safetensors"
    assert newest(folder, "latest") == folder / "latest.safetensors"
    write_sharded(example(40), folder / "step-00000040")
    assert find_checkpoint(tmp_path) == folder / "best.safetensors"
    assert newest(folder, "latest") == folder / "step-00000040"
    write_sharded(example(100_000_000), folder / "step-100000000", is_best=True)
    assert find_checkpoint(tmp_path) == newest(folder, "latest") == folder / "step-100000000"
    assert [path.name for path in step_directories(folder)] == ["step-00000010", "step-00000040", "step-100000000"]


def test_a_run_without_a_best_checkpoint_gives_its_latest_and_never_a_hidden_one(tmp_path):
    folder = tmp_path / "checkpoint"
    write_sharded(example(3), folder / "step-00000003")
    write_sharded(example(5), folder / ".step-00000005.tmp", is_best=True)
    assert find_checkpoint(tmp_path) == folder / "step-00000003"
