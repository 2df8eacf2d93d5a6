"""Runs from Python: started, and resumed to the same bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fastgpt import GPTConfig
from fastgpt.checkpoint import Checkpoint, CheckpointError
from fastgpt.config import TrainConfig
from fastgpt.data.corpus import Corpus
from fastgpt.training import TrainingError
from fastgpt.training.run_folder import RunFolder, read_metrics
from fastgpt.training.runs import load_latest, resume, start

CONFIG = TrainConfig(batch_size=4, max_steps=4, eval_interval=2, eval_batches=1, log_interval=2, device="cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("to be, or not to be, that is the question:\n" * 60)
    return Corpus.load(path, "char", block_size=16)


@pytest.fixture(scope="module")
def parts(corpus) -> dict:
    """The arguments of start and of resume."""
    model = GPTConfig(vocab_size=corpus.tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=16)
    return {"config": model, "train_config": CONFIG, "corpus": corpus}


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory) -> Path:
    """A finished run's folder, which the tests leave as it is."""
    out = tmp_path_factory.mktemp("run")
    start(out, **parts).run()
    return out


def test_the_folder_records_the_settings_and_is_not_started_in_again(run, parts):
    model, train = dataclasses.asdict(parts["config"]), dataclasses.asdict(CONFIG)
    given = {name: value for name, value in {"model": "gpt", **model, **train}.items() if value is not None}
    assert RunFolder(run).read_settings() == given
    with pytest.raises(TrainingError, match="already holds a run"):
        start(run, **parts)


def test_a_resumed_run_ends_in_the_same_bits_and_says_what_changed(run, parts, tmp_path, capsys):
    short = dataclasses.replace(CONFIG, max_steps=2)  # in the warm-up, where max_steps does not change the rates
    start(tmp_path, **parts | {"train_config": short}).run()
    capsys.readouterr()
    torch.manual_seed(999)  # another process would start with other random numbers
    resumed = resume(tmp_path, load_latest(tmp_path), **parts)
    assert capsys.readouterr().out == "max_steps: 2 -> 4, which the learning rate's schedule follows\n"
    resumed.run()
    whole, again = (Checkpoint.load(folder / "checkpoint" / "latest.safetensors") for folder in (run, tmp_path))
    assert whole.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in whole.tensors.items())
    capsys.readouterr()
    resume(tmp_path, load_latest(tmp_path), **parts | {"train_config": dataclasses.replace(short, lr=2e-3)})
    said = capsys.readouterr().out.splitlines()
    assert said == ["max_steps: 4 -> 2, but step 4 is reached already: there is nothing to do", "lr: 0.001 -> 0.002"]
    assert RunFolder(tmp_path).read_settings()["lr"] == 2e-3


def test_rows_after_the_checkpoint_are_written_again(parts, tmp_path):
    start(tmp_path, **parts).run()
    folder = RunFolder(tmp_path)
    row = read_metrics(folder.metrics_path)[-1]
    folder.append({**row, "step": 5})
    resume(tmp_path, load_latest(tmp_path), **parts)
    assert read_metrics(folder.metrics_path)[-1] == row


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "bigram"}, "field 'model' is 'gpt', not 'bigram': a resumed run keeps it; leave --model out"),
        ({"train_config": dataclasses.replace(CONFIG, layout="windows")}, "field 'layout' is 'blocks', not 'windows'"),
    ],
)
def test_a_resumed_run_keeps_its_model_and_its_layout(run, parts, changes, message):
    before = (run / "config.toml").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        resume(run, load_latest(run), **parts | changes)
    assert (run / "config.toml").read_bytes() == before


EPOCHS = dataclasses.replace(CONFIG, order="epochs")


def test_a_run_in_the_order_of_epochs_is_resumed_to_the_same_bits(parts, tmp_path):
    for name, steps in (("whole", [4]), ("parts", [2, 4])):
        for max_steps in steps:
            given = parts | {"train_config": dataclasses.replace(EPOCHS, max_steps=max_steps)}
            out = tmp_path / name
            (start(out, **given) if max_steps == steps[0] else resume(out, load_latest(out), **given)).run()
    whole, again = (
        Checkpoint.load(tmp_path / name / "checkpoint" / "latest.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in whole.tensors.items())


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        (CONFIG, {"order": "epochs"}, "'order' is 'random', not 'epochs'.*leave --order out"),
        (EPOCHS, {"order": "random"}, "'order' is 'epochs'"),
        (EPOCHS, {"batch_size": 2}, "'batch_size' is 4, not 2"),
        (EPOCHS, {"grad_accum": 2}, "'grad_accum' is 1, not 2"),
        (EPOCHS, {"seed": 5}, "'seed' is 1337, not 5"),
    ],
)
def test_a_resumed_run_repeats_no_data(parts, tmp_path, before, after, named):
    start(tmp_path, **parts | {"train_config": dataclasses.replace(before, max_steps=1)}).run()
    with pytest.raises(CheckpointError, match=named):
        resume(tmp_path, load_latest(tmp_path), **parts | {"train_config": dataclasses.replace(before, **after)})


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match=r"latest\.safetensors: no such .* from; leave --resume out to start"):
        load_latest(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}')  # without --resume this folder is refused
    with pytest.raises(CheckpointError, match=r"latest\.safetensors: no such .* from; give another --out to start"):
        load_latest(tmp_path)
