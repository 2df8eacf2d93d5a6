"""Runs that are stopped, killed or fail to save: resumed, they end with the same bits as a run in one go."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.baselines import build_model
from fastgpt.checkpoint import Checkpoint, CheckpointError
from fastgpt.config import TrainConfig
from fastgpt.training.loop import Interrupted, Trainer
from fastgpt.training.run_folder import RunFolder, read_metrics
from small_runs import MODEL, TRAIN, assert_same_checkpoint, signal_at, trainer


@pytest.mark.parametrize("stop_at", [1, 5, 8])
def test_stopped_and_resumed_equals_uninterrupted(corpus, tmp_path, stop_at, monkeypatch):
    """A signal at any step, with dropout and gradient accumulation: weights, moments, random state, val losses."""
    cfg = dataclasses.replace(TRAIN, grad_accum=2)
    trainer(corpus, tmp_path / "whole", cfg).run()

    stopped = trainer(corpus, tmp_path / "parts", cfg)
    signal_at(stop_at, stopped, monkeypatch)
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


def test_stopped_before_a_step_it_has_evaluated_once_and_so_has_the_run_that_goes_on(corpus, tmp_path, monkeypatch):
    trainer(corpus, tmp_path / "whole").run()
    stopped = trainer(corpus, tmp_path / "parts")
    save = stopped._save

    def save_when_signalled(is_best: bool) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(is_best)

    monkeypatch.setattr(stopped, "_save", save_when_signalled)
    with pytest.raises(Interrupted, match=r"SIGTERM: stopped at step 0 and saved "):
        stopped.run()
    assert [row["step"] for row in read_metrics(stopped.folder.metrics_path)] == [0]

    resumed = trainer(corpus, tmp_path / "parts", new=False)
    resumed.restore(Checkpoint.load(resumed.folder.latest))
    resumed.folder.rewind(resumed.state["step"])
    resumed.run()
    rows = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "parts")]
    assert [(row["step"], row["loss"]) for row in rows[0]] == [(row["step"], row["loss"]) for row in rows[1]]


def cli(*args: str) -> tuple[int, str]:
    """The exit code and the output of `fastgpt ...`, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "fastgpt", *args], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


SIGNALLED = """
import os, signal, sys
from fastgpt.cli import main
from fastgpt.training.run_folder import RunFolder

append = RunFolder.append

def append_then_signal(self, row):
    append(self, row)
    if (row["step"], row["split"]) == (100, "{split}"):
        os.kill(os.getpid(), signal.{name})

RunFolder.append = append_then_signal
sys.exit(main(sys.argv[1:]))
"""


def signalled(name: str, split: str, *args: str) -> tuple[int, str]:
    """As `cli`, in a process that sends itself the signal `name` once the row of `split` at step 100 is written."""
    program = SIGNALLED.format(name=name, split=split)
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


SMALL = ["--block-size", "16", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--batch-size", "4"]


SMALL += ["--device", "cpu"]


def test_a_killed_process_resumes_to_the_same_bits(text_file, tmp_path):
    """SIGKILL leaves no time to save: the run goes on from its last checkpoint and ends where it would have."""
    options = ["train", "--data", str(text_file), *SMALL, "--eval-interval", "50", "--eval-batches", "2"]
    options += ["--max-steps", "130"]
    code, output = signalled("SIGKILL", "val", *options, "--out", str(tmp_path / "killed"))
    assert code == -signal.SIGKILL, output
    assert Checkpoint.load(tmp_path / "killed" / "checkpoint" / "latest.safetensors").state["step"] == 50
    for out, extra in (("killed", ["--resume"]), ("whole", [])):
        code, output = cli(*options, "--out", str(tmp_path / out), *extra)
        assert code == 0, output
    a, b = (tmp_path / run / "checkpoint" / "latest.safetensors" for run in ("killed", "whole"))
    assert Checkpoint.load(a).state["step"] == 130
    assert_same_checkpoint(a, b)
    rows = [[(r["step"], r["split"], r["loss"]) for r in read_metrics(tmp_path / run / "metrics.jsonl")]
            for run in ("killed", "whole")]  # fmt: skip
    assert rows[0] == rows[1]


def test_ctrl_c_saves_and_says_how_to_resume(text_file, tmp_path):
    out = tmp_path / "run"
    code, output = signalled("SIGINT", "train", "train", "--data", str(text_file), *SMALL, "--out", str(out))
    assert code == 1
    assert Checkpoint.load(out / "checkpoint" / "latest.safetensors").state["step"] == 100
    assert "SIGINT: stopped at step 100 and saved" in output
    assert f"Resume with: fastgpt train --out {out} --resume" in output
    assert "Traceback" not in output


def test_disk_full_while_saving_names_the_file_and_keeps_the_old_checkpoint(corpus, tmp_path, monkeypatch):
    run = trainer(corpus, tmp_path)
    run.run()
    before = run.folder.latest.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastgpt.files.os.fsync", full)
    with pytest.raises(CheckpointError, match=r"latest\.safetensors: cannot be written: .*No space left"):
        run._save()
    assert run.folder.latest.read_bytes() == before


def test_a_frozen_part_stays_as_it_is_and_resumes(corpus, tmp_path):
    """Fine-tuning the last block and the head: frozen weights are saved, but have no moments."""

    def frozen(path: Path, cfg: TrainConfig, new: bool = True) -> Trainer:
        folder = RunFolder(path)
        if new:
            folder.create({})
        model = build_model(GPTConfig(vocab_size=corpus.tokenizer.vocab_size, tie_weights=False, **MODEL), 0)
        for part in (model.token_embedding, model.position_embedding, model.blocks[0]):
            part.requires_grad_(False)
        return Trainer(model, corpus, cfg, folder)

    cfg = dataclasses.replace(TRAIN, warmup_steps=0, min_lr=TRAIN.lr)
    whole = frozen(tmp_path / "whole", cfg)
    before = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    whole.run()
    for name, p in whole.model.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name
    frozen(tmp_path / "parts", dataclasses.replace(cfg, max_steps=5)).run()
    resumed = frozen(tmp_path / "parts", cfg, new=False)
    resumed.restore(Checkpoint.load(resumed.folder.latest))
    resumed.run()
    assert_same_checkpoint(whole.folder.latest, resumed.folder.latest)
    saved = Checkpoint.load(whole.folder.latest)
    assert saved.part("exp_avg").keys() == {n for n, p in whole.model.named_parameters() if p.requires_grad}
    assert saved.part("model").keys() == before.keys()


class Counting(GPT):
    """A user's model: a buffer that is kept and one that is not, and a weight that only odd passes use."""

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__(cfg)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.late = torch.nn.Parameter(torch.zeros(cfg.n_embd))

    def hidden(self, idx, cache=None):
        if self.training:
            self.passes += 1
        x = super().hidden(idx, cache)
        return x + self.late if self.passes % 2 else x


def test_buffers_and_weights_of_some_steps_resume_to_the_same_bits(corpus, tmp_path):
    def counting(path: Path, max_steps: int, new: bool = True) -> Trainer:
        folder = RunFolder(path)
        if new:
            folder.create({})
        torch.manual_seed(1)
        model = Counting(GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **MODEL))
        cfg = dataclasses.replace(TRAIN, max_steps=max_steps, warmup_steps=0, min_lr=TRAIN.lr)
        run = Trainer(model, corpus, cfg, folder)
        if not new:
            run.restore(Checkpoint.load(folder.latest))
        run.run()
        return run

    whole = counting(tmp_path / "whole", 9)
    counting(tmp_path / "parts", 4)
    resumed = counting(tmp_path / "parts", 9, new=False)
    assert_same_checkpoint(whole.folder.latest, resumed.folder.latest)
    saved = Checkpoint.load(whole.folder.latest)
    assert int(saved.tensors["model.passes"]) == 9 and "model.scratch" not in saved.tensors
    assert float(saved.tensors["step.late"]) == 5.0 and float(saved.tensors["step.ln_f.weight"]) == 9.0
