"""Fine-tuning: a run that starts from a trained model, keeps its shape and tokenizer, and is resumed like any other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastgpt
from fastgpt import GPT, GPTConfig
from fastgpt.checkpoint import Checkpoint, model_tensors
from fastgpt.cli import main
from fastgpt.config import ConfigError
from fastgpt.tokenizer import BPETokenizer
from fastgpt.training.initial import initial_model
from fastgpt.training.run_folder import RunFolder, read_metrics

TEXT = "the quick brown fox jumps over the lazy dog? THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG!\n" * 20
SHAPE = "--n-layer 2 --n-head 2 --n-embd 32 --block-size 16 --dropout 0.1"
QUICK = "--batch-size 16 --eval-batches 1 --device cpu"
PAIRS = [(f"{a}{b}?", f"{a}{b}!".upper()) for a in "abcdefghi" for b in "klmnop"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run on text in `run`, its model saved in `saved` and as a GPT-2 in `hf`, and completions in pairs.jsonl."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "text.txt").write_text(TEXT)
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    train = ["train", "--data", str(folder / "text.txt"), *SHAPE.split(), *QUICK.split(), "--out", str(folder / "run")]
    assert main([*train, "--max-steps", "2"]) == 0
    model, _ = fastgpt.load(folder / "run")
    model.save_pretrained(folder / "saved")
    bpe = BPETokenizer.train(TEXT, 300).with_end()
    of_gpt2 = GPT(GPTConfig(vocab_size=310, block_size=16, n_layer=1, n_head=2, n_embd=16, activation="gelu_tanh"))
    of_gpt2.tokenizer = bpe
    of_gpt2.save_pretrained(folder / "hf", format="huggingface")
    return folder


def tune(folder: Path, start: str, out: Path, *more: str) -> list[str]:
    words = ["train", "--init-from", str(folder / start), "--data", str(folder / "pairs.jsonl"), "--out", str(out)]
    return [*words, "--layout", "completions", *QUICK.split(), *more]


def val_losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl") if row["split"] == "val"]


@pytest.mark.parametrize("start", ["run", "run/checkpoint/latest.safetensors", "saved", "hf"])
def test_every_kind_of_model_is_a_start(folder, tmp_path, start, capsys):
    model, tokenizer = fastgpt.load(folder / start)
    assert main(tune(folder, start, tmp_path / "run", "--max-steps", "0")) == 0
    tuned, same = fastgpt.load(tmp_path / "run")
    assert same.fingerprint() == tokenizer.fingerprint() and tuned.cfg == model.cfg and tuned.layout == "completions"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tuned.parameters(), strict=True))
    recorded = RunFolder(tmp_path / "run").read_settings()
    assert recorded["init_from"] == str(folder / start) and recorded["n_layer"] == model.cfg.n_layer
    assert "starts from" in capsys.readouterr().out
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--max-steps", "1"]) == 0, "without its start"


def test_fine_tuning_learns_is_resumed_to_the_same_bits_and_sampled(folder, tmp_path, capsys):
    rate = ["--lr", "0.01", "--min-lr", "0.01", "--warmup-steps", "0", "--eval-interval", "30"]
    assert main(tune(folder, "run", tmp_path / "whole", *rate, "--max-steps", "60")) == 0
    assert main(tune(folder, "run", tmp_path / "parts", *rate, "--max-steps", "30")) == 0
    assert main(["train", "--out", str(tmp_path / "parts"), "--resume", "--max-steps", "60"]) == 0
    whole, parts = (Checkpoint.load(tmp_path / run / "checkpoint/latest.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(tensor, parts.tensors[name]) for name, tensor in whole.tensors.items())
    losses = val_losses(tmp_path / "whole")
    assert losses[-1] < 0.5 < 2.0 < losses[0], "of the completions"
    capsys.readouterr()
    assert main(["sample", "--checkpoint", str(tmp_path / "whole"), "--prompt", "cm?", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "cm?CM!\n"


def test_the_layout_is_that_of_the_model_unless_another_is_given(folder, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("the\nfox\ndog\nlazy\nover\njumps\n")
    named = ["--data", str(tmp_path / "names.txt"), *QUICK.split(), "--max-steps", "0"]
    first = ["train", *named, *SHAPE.split(), "--layout", "names", "--out", str(tmp_path / "first")]
    assert main(first) == 0
    tuned = ["train", "--init-from", str(tmp_path / "first"), *named]
    assert main([*tuned, "--out", str(tmp_path / "names")]) == 0
    assert "layout: names, that of the model's data; --layout blocks takes plain text" in capsys.readouterr().out
    assert main([*tuned, "--out", str(tmp_path / "blocks"), "--layout", "blocks", "--block-size", "2"]) == 0
    assert "layout:" not in capsys.readouterr().out
    assert [fastgpt.load(tmp_path / layout)[0].layout for layout in ("names", "blocks")] == ["names", "blocks"]


def test_the_context_may_become_shorter_and_the_dropout_another(folder):
    whole, tokenizer = initial_model(folder / "run", {"n_embd": 32, "tokenizer": "char"})
    part, _ = initial_model(folder / "run", {"block_size": 7, "dropout": 0.5})
    assert whole.cfg.block_size == 16 and part.cfg.block_size == 7 and part.cfg.dropout == 0.5
    assert part.tokenizer.fingerprint() == tokenizer.fingerprint()
    idx = torch.arange(7)[None]
    assert torch.equal(whole(idx)[0], part(idx)[0])
    assert model_tensors(part)["position_embedding.weight"].shape == (7, 32)


REFUSED = [
    ({"block_size": 17}, "block_size: the model in .* has positions for 16 tokens, not 17; give at most 16"),
    ({"n_layer": 6}, "n_layer: the model in .*run has 2, not 6, and keeps it; leave it out"),
    ({"tokenizer": "bpe"}, "tokenizer: the model in .* has 'char', not 'bpe'"),
    ({"model": "lstm"}, "model: the model in .* has 'gpt', not 'lstm'"),
]


@pytest.mark.parametrize(("asked", "message"), REFUSED)
def test_what_the_model_is_cannot_be_changed(folder, asked, message):
    with pytest.raises(ConfigError, match=message):
        initial_model(folder / "run", asked)


def test_the_command_line_names_the_conflict(folder, tmp_path, capsys):
    for option, value in (("--n-layer", "6"), ("--vocab-size", "512"), ("--block-size", "99"), ("--tokenizer", "bpe")):
        assert main(tune(folder, "run", tmp_path / "run", option, value)) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"fastgpt train: {option}: the model in ") and error.count("\n") == 1
    assert main(["train", "--init-from", str(folder / "run"), "--out", str(tmp_path / "run")]) == 2
    assert "--data is missing: say what the model shall learn now" in capsys.readouterr().err
    assert main(tune(folder, "nothing", tmp_path / "run")) == 1
    assert "nothing: no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "settings.toml").write_text("n_embd = 48\n")
    assert main(tune(folder, "run", tmp_path / "run", "--config", str(tmp_path / "settings.toml"))) == 2
    assert "--n-embd: the model in" in capsys.readouterr().err
    assert main(tune(folder, "run", tmp_path / "run", "--max-steps", "0", "--n-layer", "2")) == 0, "as it is"
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--init-from", str(folder / "hf")]) == 2
    assert "--init-from: the run in" in capsys.readouterr().err


def test_a_preset_gives_training_alone_and_without_one_the_rate_follows_the_width(folder, tmp_path, capsys):
    assert main(tune(folder, "run", tmp_path / "a", "--max-steps", "0")) == 0
    settings = RunFolder(tmp_path / "a").read_settings()
    assert settings["lr"] == 0.128 / 32 and settings["optimizer"] == "adamw"
    assert "lr: 0.004, which follows from the model's width of 32" in capsys.readouterr().out
    preset = ["--preset", "shakespeare-char-cpu", "--max-steps", "0"]
    assert main(tune(folder, "run", tmp_path / "b", *preset)) == 0
    settings = RunFolder(tmp_path / "b").read_settings()
    assert settings["lr"] == 0.016 and settings["optimizer"] == "muon" and settings["n_layer"] == 2


def test_a_model_by_its_name(folder, tmp_path, monkeypatch, capsys):
    stand_in = ModuleType("huggingface_hub")
    stand_in.snapshot_download = lambda repository, allow_patterns: str(folder / "hf")
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    monkeypatch.chdir(tmp_path)
    model, tokenizer = fastgpt.load("gpt2")
    assert model.cfg.vocab_size == 310 and tokenizer.end_of_text == tokenizer.vocab_size - 1
    words = tune(folder, "run", tmp_path / "run", "--max-steps", "0")
    words[2] = "openai-community/gpt2"
    assert main(words) == 0
    assert RunFolder(tmp_path / "run").read_settings()["init_from"] == "openai-community/gpt2"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["sample", "--checkpoint", "gpt2"]) == 1
    error = capsys.readouterr().err
    assert "pip install huggingface_hub" in error and error.count("\n") == 1
