"""fastgpt.load: a model and its tokenizer from every place that has them, and what is said where they are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt import GPT, GPTConfig
from fastgpt.baselines import LSTM
from fastgpt.checkpoint import Checkpoint, CheckpointError
from fastgpt.cli import main
from fastgpt.config import ConfigError, TrainConfig
from fastgpt.data.corpus import Corpus
from fastgpt.tokenizer import BPETokenizer, CharTokenizer
from fastgpt.training.runs import start

TEXT = "to be, or not to be, that is the question:\n" * 60
CONFIG = TrainConfig(batch_size=4, max_steps=2, eval_interval=2, eval_batches=1, log_interval=2, device="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run of an LSTM on names."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "names.txt").write_text("ann\nbob\neve\nmax\nzoe\nada\nian\nleo\nmia\nsue\n", encoding="utf-8")
    corpus = Corpus.load(folder / "names.txt", "char", block_size=16, layout="names")
    config = GPTConfig(vocab_size=corpus.tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=16)
    train = TrainConfig(**{**vars(CONFIG), "layout": "names"})
    start(folder / "run", config=config, train_config=train, corpus=corpus, kind="lstm").run()
    return folder / "run"


def gpt(tokenizer, **changes) -> GPT:
    """A GPT as `fastgpt.load` gives it, with random weights."""
    torch.manual_seed(0)
    config = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, **changes}
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **config))
    model.tokenizer = tokenizer
    return model.eval()


@pytest.mark.parametrize("place", ["", "checkpoint", "checkpoint/latest.safetensors"])
def test_a_run_and_a_checkpoint_of_any_model(run, place):
    model, tokenizer = fastgpt.load(run / place, dropout=0.25)
    assert isinstance(model, LSTM) and not model.training and model.cfg.dropout == 0.25
    assert model.tokenizer is tokenizer and tokenizer.decode(tokenizer.encode("zoe")) == "zoe"
    assert model.layout == "names"
    saved = Checkpoint.load(run / "checkpoint" / "latest.safetensors").part("model")
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())
    with pytest.raises(ConfigError, match="drop_out: expected a setting of GPTConfig"):
        fastgpt.load(run / place, drop_out=0.0)


@pytest.mark.parametrize("format", ["fastgpt", "huggingface"])
@pytest.mark.parametrize("tokenizer", [CharTokenizer.train(TEXT), BPETokenizer.train(TEXT, 270)], ids=["char", "bpe"])
def test_a_saved_model_has_its_tokenizer(tmp_path, format, tokenizer):
    model = gpt(tokenizer)
    model.layout = "names"
    model.save_pretrained(tmp_path, format=format)
    for place in (tmp_path, tmp_path / "model.safetensors"):
        loaded, found = fastgpt.load(place)
        assert loaded.cfg == model.cfg and loaded.layout == "names" and not loaded.training
        assert found.fingerprint() == tokenizer.fingerprint()
        idx = torch.tensor([tokenizer.encode("to be, or")])
        assert torch.equal(loaded(idx)[0], model(idx)[0])
    assert GPT.from_pretrained(tmp_path).layout == "names"


def test_a_folder_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = BPETokenizer.train(TEXT, 270)
    config = transformers.GPT2Config(vocab_size=270, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokenizer.vocab)}))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in tokenizer.merges))
    loaded, found = fastgpt.load(tmp_path)
    idx = torch.tensor([found.encode("to be, or not")])
    torch.testing.assert_close(loaded(idx)[0], model(idx).logits)
    assert found.encode(TEXT) == tokenizer.encode(TEXT)


def test_every_command_takes_the_same_places(tmp_path, capsys):
    model = gpt(BPETokenizer.train(TEXT, 270))
    (tmp_path / "text.txt").write_text(TEXT)
    for format in ("fastgpt", "huggingface"):
        model.save_pretrained(tmp_path / format, format=format)
        path = str(tmp_path / format)
        assert main(["sample", path, "--prompt", "To be", "--max-new-tokens", "3"]) == 0
        assert capsys.readouterr().out.startswith("To be")
        assert main(["eval", path, "--data", str(tmp_path / "text.txt")]) == 0
        capsys.readouterr()
    assert main(["study", "attention", path, "--prompt", "to be", "--out", str(tmp_path / "study")]) == 0


def test_a_model_without_a_tokenizer_or_with_anothers(tmp_path):
    model = gpt(CharTokenizer.train(TEXT))
    model.tokenizer = None
    model.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"without a tokenizer: add its tokenizer\.json, or vocab\.json and merges"
    ):
        fastgpt.load(tmp_path)
    gpt(BPETokenizer.train(TEXT, 270)).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.json", tmp_path)
    with pytest.raises(CheckpointError, match="the tokenizer has 270 tokens and the model only 16: they belong to"):
        fastgpt.load(tmp_path)


def test_a_folder_that_holds_a_run_and_a_saved_model(run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    gpt(CharTokenizer.train(TEXT)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="the saved model is read; name .*checkpoint for the run"):
        assert isinstance(fastgpt.load(tmp_path)[0], GPT)
    assert isinstance(fastgpt.load(tmp_path / "checkpoint")[0], LSTM)


def test_a_checkpoint_under_any_name(run, tmp_path):
    shutil.copy(run / "checkpoint" / "latest.safetensors", tmp_path / "model.safetensors")
    assert isinstance(fastgpt.load(tmp_path / "model.safetensors")[0], LSTM)
    with pytest.raises(CheckpointError, match=r"run.model\.safetensors: no such file or folder"):
        fastgpt.load(run / "model.safetensors")  # and not the run that is there
    saved = Checkpoint.load(run / "checkpoint" / "latest.safetensors")
    saved.model = "llama"
    saved.save(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: field 'model' is 'llama', expected one of gpt"):
        fastgpt.load(tmp_path / "other.safetensors")


def test_a_place_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder; expected the folder of a run"):
        fastgpt.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint; expected the folder of a run"):
        fastgpt.load(tmp_path)
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(CheckpointError, match="this run has no checkpoint yet; it writes one at its first evaluation"):
        fastgpt.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "fastgpt", "layout": "spirals"}))
    with pytest.raises(CheckpointError, match="field 'layout' is 'spirals', expected one of blocks"):
        fastgpt.load(tmp_path)
