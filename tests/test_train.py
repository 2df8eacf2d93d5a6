"""The trainer: learns, stops where told, survives being killed, and resumes to the same bits."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fastgpt import GPTConfig
from fastgpt.checkpoint import Checkpoint, CheckpointError
from fastgpt.config import TrainConfig
from fastgpt.data import Corpus
from fastgpt.train import (
    Interrupted,
    RunFolder,
    Trainer,
    TrainingError,
    build_model,
    learning_rate,
    make_optimizer,
    read_metrics,
    resolve_device,
)

TEXT = "to be, or not to be, that is the question:\nwhether 'tis nobler in the mind to suffer\n" * 60
MODEL = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.1}
TRAIN = TrainConfig(
    batch_size=4, max_steps=12, eval_interval=4, eval_batches=2, log_interval=2, warmup_steps=2, device="cpu"
)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def corpus(text_file) -> Corpus:
    return Corpus.load(text_file, "char", block_size=16)


def trainer(corpus: Corpus, path: Path, cfg: TrainConfig = TRAIN, new: bool = True, **model_changes) -> Trainer:
    folder = RunFolder(path)
    if new:
        folder.create(dataclasses.asdict(cfg))
    model_config = GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **{**MODEL, **model_changes})
    return Trainer(build_model(model_config, cfg.seed), corpus, cfg, folder, "fastgpt train --resume")


def assert_same_checkpoint(a: Path, b: Path) -> None:
    first, second = Checkpoint.load(a), Checkpoint.load(b)
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name
    for name in ("step", "tokens", "best_val"):
        assert first.state[name] == second.state[name]


def test_it_learns_and_writes_what_the_design_says(corpus, tmp_path):
    cfg = dataclasses.replace(TRAIN, max_steps=60, eval_interval=20, lr=1e-2, min_lr=1e-3)
    state = trainer(corpus, tmp_path, cfg, dropout=0.0).run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if r["split"] == "val"] == [0, 20, 40, 60]
    assert [r["step"] for r in rows if r["split"] == "train"] == list(range(2, 61, 2))
    for row in rows:
        assert list(row) == ["step", "split", "loss", "elapsed_s", "tokens", "tokens_per_s", "lr"]
        assert row["tokens"] == row["step"] * 4 * 16
    val = [r["loss"] for r in rows if r["split"] == "val"]
    assert val[0] == pytest.approx(math.log(corpus.tokenizer.vocab_size), abs=0.1)
    assert val[-1] < val[0] - 1.0
    assert state["step"] == 60 and state["best_val"] == min(val)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert Checkpoint.load(tmp_path / "checkpoint" / "best.safetensors").state["best_val"] == min(val)


def test_target_loss_ends_the_run_early(corpus, tmp_path):
    cfg = dataclasses.replace(TRAIN, max_steps=500, lr=1e-2, target_loss=2.9)
    state = trainer(corpus, tmp_path, cfg).run()
    assert state["step"] < 500 and state["best_val"] <= 2.9


@pytest.mark.parametrize("stop_at", [1, 5, 8])
def test_stopped_and_resumed_equals_uninterrupted(corpus, tmp_path, stop_at, monkeypatch):
    """A signal at any step, with dropout and gradient accumulation: weights, moments, random state, val losses."""
    cfg = dataclasses.replace(TRAIN, grad_accum=2)
    trainer(corpus, tmp_path / "whole", cfg).run()

    stopped = trainer(corpus, tmp_path / "parts", cfg)
    step = stopped._step

    def step_then_signal(batches):
        loss = step(batches)
        if stopped.state["step"] + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(stopped, "_step", step_then_signal)
    with pytest.raises(Interrupted, match=rf"SIGTERM: stopped at step {stop_at} .*Resume with: fastgpt train --resume"):
        stopped.run()

    torch.manual_seed(999)  # what another process would start with
    resumed = trainer(corpus, tmp_path / "parts", cfg, new=False)
    resumed.restore(Checkpoint.load(resumed.folder.latest))
    resumed.folder.rewind(resumed.state["step"])
    assert resumed.state["step"] == stop_at
    resumed.run()
    for name in ("latest", "best"):
        file = f"checkpoint/{name}.safetensors"
        assert_same_checkpoint(tmp_path / "whole" / file, tmp_path / "parts" / file)
    losses = [
        [(r["step"], r["loss"]) for r in read_metrics(tmp_path / run / "metrics.jsonl") if r["split"] == "val"]
        for run in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def cli(*args: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fastgpt", *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


SMALL = ["--block-size", "16", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--batch-size", "4"]


def test_a_killed_process_resumes_to_the_same_bits(text_file, tmp_path):
    """SIGKILL leaves no time to save: the run goes on from its last checkpoint and ends where it would have."""
    options = ["--data", str(text_file), *SMALL, "--eval-interval", "50", "--eval-batches", "2", "--device", "cpu"]
    options += ["--warmup-steps", "0", "--min-lr", "0.001"]  # a constant rate: the two runs' max-steps differ at first
    process = cli("train", *options, "--out", str(tmp_path / "killed"), "--max-steps", "100000")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 600  # only ends a hang
    while not (metrics.exists() and '"step": 100, "split": "val"' in metrics.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = Checkpoint.load(tmp_path / "killed" / "checkpoint" / "latest.safetensors").state["step"]
    assert done >= 50 and done % 50 == 0
    end = str(done + 75)
    for out, extra in (("killed", ["--resume"]), ("whole", [])):
        process = cli("train", *options, "--out", str(tmp_path / out), "--max-steps", end, *extra)
        assert process.wait(600) == 0, process.communicate()[0]
    a, b = (tmp_path / run / "checkpoint" / "latest.safetensors" for run in ("killed", "whole"))
    assert Checkpoint.load(a).state["step"] == int(end)
    assert_same_checkpoint(a, b)


def test_ctrl_c_saves_and_says_how_to_resume(text_file, tmp_path):
    out = tmp_path / "run"
    process = cli("train", "--data", str(text_file), *SMALL, "--out", str(out), "--max-steps", "100000")
    deadline = time.monotonic() + 600  # only ends a hang
    while not ((out / "metrics.jsonl").exists() and '"train"' in (out / "metrics.jsonl").read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 1
    step = Checkpoint.load(out / "checkpoint" / "latest.safetensors").state["step"]
    assert f"SIGINT: stopped at step {step} and saved" in output
    assert f"Resume with: fastgpt train --out {out} --resume" in output
    assert "Traceback" not in output


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path, monkeypatch):
    run = trainer(corpus, tmp_path)
    loss = run.loss
    monkeypatch.setattr(run, "loss", lambda x, y: loss(x, y) * (math.inf if run.state["step"] == 6 else 1.0))
    with pytest.raises(TrainingError, match=r"step 7: the loss is inf; last good checkpoint: .*latest\.safetensors"):
        run.run()
    assert Checkpoint.load(run.folder.latest).state["step"] == 4


def test_a_diverging_learning_rate_ends_in_that_error(corpus, tmp_path):
    cfg = dataclasses.replace(TRAIN, lr=1e30, min_lr=1e30, warmup_steps=0, grad_clip=0.0, max_steps=50)
    with pytest.raises(TrainingError, match=r"loss is (nan|inf)"):
        trainer(corpus, tmp_path, cfg).run()


def test_schedule():
    cfg = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=9, max_steps=109)
    rates = [learning_rate(step, cfg) for step in range(112)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == max(rates) == 1.0
    assert rates[59] == pytest.approx(0.55)
    assert rates[109:] == [0.1] * 3
    assert all(a > b for a, b in pairwise(rates[9:110]))
    assert learning_rate(0, TrainConfig(max_steps=0, warmup_steps=0, lr=1.0, min_lr=0.5)) == 0.5


def test_weight_decay_is_on_matrices_only(corpus):
    model = build_model(GPTConfig(vocab_size=9, **MODEL), 0)
    decayed, kept = make_optimizer(model, TRAIN).param_groups
    assert {p.ndim for p in decayed["params"]} == {2} and decayed["weight_decay"] == 0.1
    assert {p.ndim for p in kept["params"]} == {1} and kept["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_gradient_accumulation_equals_the_larger_batch(corpus, tmp_path):
    """Two micro-batches of 4 and one of 8 with the same rows take the same step."""
    cfg = dataclasses.replace(TRAIN, max_steps=1)
    one = trainer(corpus, tmp_path / "a", dataclasses.replace(cfg, batch_size=8), dropout=0.0)
    two = trainer(corpus, tmp_path / "b", dataclasses.replace(cfg, batch_size=4, grad_accum=2), dropout=0.0)
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randint(corpus.tokenizer.vocab_size, (8, 16), generator=g) for _ in range(2))
    a = one._step(iter([(x, y)]))
    b = two._step(iter([(x[:4], y[:4]), (x[4:], y[4:])]))
    torch.testing.assert_close(a, b)
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.tensors.pop("exp_avg.ln_f.weight"), "tensor exp_avg.ln_f.weight is missing"),
        (lambda c: c.tensors.pop("model.ln_f.weight"), "tensor model.ln_f.weight is missing"),
        (lambda c: c.tensors.pop("rng.cpu"), "tensor rng.cpu is missing"),
        (lambda c: c.state.update(train_tokens=5), "field 'train_tokens' is 5"),
        (lambda c: c.state.pop("tokens"), "field 'state'"),
        (lambda c: c.tensors.update({"rng.cpu": torch.zeros(3, dtype=torch.uint8)}), "tensor rng.cpu"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(corpus, tmp_path, change, message):
    run = trainer(corpus, tmp_path)
    run.run()
    saved = Checkpoint.load(run.folder.latest)
    change(saved)
    fresh = trainer(corpus, tmp_path, new=False)
    before = [p.clone() for p in fresh.model.parameters()]
    with pytest.raises(CheckpointError, match=message):
        fresh.restore(saved)
    assert all(torch.equal(p, q) for p, q in zip(before, fresh.model.parameters(), strict=True))
    assert fresh.state["step"] == 0 and not fresh.optimizer.state


def test_a_folder_with_a_run_is_not_overwritten(corpus, tmp_path):
    run = trainer(corpus, tmp_path)
    run.run()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(TrainingError, match="already holds a run; add --resume"):
        trainer(corpus, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_disk_full_while_saving_names_the_file_and_keeps_the_old_checkpoint(corpus, tmp_path, monkeypatch):
    run = trainer(corpus, tmp_path)
    run.run()
    before = run.folder.latest.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastgpt.checkpoint.os.fsync", full)
    with pytest.raises(CheckpointError, match=r"latest\.safetensors: cannot be written: .*No space left"):
        run._save()
    assert run.folder.latest.read_bytes() == before


def test_metrics_reader(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(TrainingError, match="line 2 is not JSON"):
        read_metrics(path)


def test_unknown_device():
    with pytest.raises(TrainingError, match="device: 'nonsense'"):
        resolve_device("nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(TrainingError, match="device: 'cuda' cannot be used here"):
            resolve_device("cuda")


def test_settings_are_stored_as_toml(corpus, tmp_path):
    import tomllib

    trainer(corpus, tmp_path)
    stored = tomllib.loads((tmp_path / "config.toml").read_text())
    assert stored["lr"] == TRAIN.lr and "target_loss" not in stored
    assert json.loads(json.dumps(stored)) == {k: v for k, v in dataclasses.asdict(TRAIN).items() if v is not None}
