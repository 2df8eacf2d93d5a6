"""A small model, its settings and its training run, and a comparison of two checkpoints."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch

from fastgpt import GPTConfig
from fastgpt.baselines import build_model
from fastgpt.checkpoint import Checkpoint
from fastgpt.config import TrainConfig
from fastgpt.data.corpus import Corpus
from fastgpt.training.loop import Trainer
from fastgpt.training.run_folder import RunFolder

TEXT = "to be, or not to be, that is the question:\nwhether 'tis nobler in the mind to suffer\n" * 60
MODEL = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.1}
TRAIN = TrainConfig(
    batch_size=4, max_steps=12, eval_interval=4, eval_batches=2, log_interval=2, warmup_steps=2, device="cpu"
)


def trainer(corpus: Corpus, path: Path, cfg: TrainConfig = TRAIN, new: bool = True, **model_changes) -> Trainer:
    folder = RunFolder(path)
    if new:
        folder.create(dataclasses.asdict(cfg))
    model_config = GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **{**MODEL, **model_changes})
    return Trainer(build_model(model_config, cfg.seed), corpus, cfg, folder, "fastgpt train --resume")


def signal_at(step: int, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SIGTERM reach the run of `trainer` while it takes step number `step`."""
    take = trainer._step

    def take_then_signal(micro_batches):
        loss = take(micro_batches)
        if trainer.state["step"] + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(trainer, "_step", take_then_signal)


def assert_same_checkpoint(a: Path, b: Path) -> None:
    first, second = Checkpoint.load(a), Checkpoint.load(b)
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name
    for name in ("step", "tokens", "best_val"):
        assert first.state[name] == second.state[name]
