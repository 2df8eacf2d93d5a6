"""Training in float16: scaled gradients, skipped steps, and resuming with the scale."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from fastgpt.checkpoint import Checkpoint
from fastgpt.training import TrainingError
from fastgpt.training.loop import Trainer
from fastgpt.training.run_folder import read_metrics
from small_runs import TRAIN, assert_same_checkpoint, trainer

HALF = dataclasses.replace(TRAIN, dtype="float16", max_steps=10, grad_accum=2)


def overflow_at(run: Trainer, *steps: int) -> None:
    """Make the gradients of these steps overflow, as float16's do where the scale has become too large for them."""
    loss = run.loss

    def overflowing(x, y):
        value = loss(x, y)
        if run.state["step"] in steps:
            value.register_hook(lambda gradient: gradient * math.inf)
        return value

    run.loss = overflowing


def test_float16_trains_with_scaled_gradients(corpus, tmp_path):
    cfg = dataclasses.replace(HALF, max_steps=60, eval_interval=20, lr=1e-2, min_lr=1e-3, grad_accum=1)
    run = trainer(corpus, tmp_path, cfg, dropout=0.0)
    dtypes = set()
    hook = run.model.blocks[0].mlp.up.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    run.run()
    hook.remove()
    assert dtypes == {torch.float16} and run.model.lm_head.weight.dtype == torch.float32
    val = [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["split"] == "val"]
    assert val[-1] < val[0] - 1.0
    assert run.precision.scaler.get_scale() > 1.0
    assert run.checkpoint().state["scaler"]["_growth_tracker"] == 60 - run.skipped_steps()


def test_a_step_whose_gradients_overflow_is_left_out(corpus, tmp_path, capsys):
    run = trainer(corpus, tmp_path, HALF)
    overflow_at(run, 2, 6)
    moved, step = [], run._step

    def watched(micro_batches):
        before = [p.detach().clone() for p in run.model.parameters()]
        loss = step(micro_batches)
        moved.append(any(not torch.equal(p, q) for p, q in zip(before, run.model.parameters(), strict=True)))
        return loss

    run._step = watched
    state = run.run()
    assert moved == [number not in (2, 6) for number in range(10)]
    assert state["step"] == 10 and run.skipped_steps() == 2
    assert run.precision.scaler.get_scale() == 2.0**14  # halved twice from PyTorch's 2**16
    assert {int(s["step"]) for s in run.optimizer.state.values()} == {8}
    assert "2 steps skipped, whose float16 gradients overflowed" in capsys.readouterr().out


def test_float16_resumes_to_the_same_bits(corpus, tmp_path):
    """With overflows on both sides of the stop: scale, growth and AdamW's own count of steps are in the checkpoint."""

    def run_to(path: Path, max_steps: int, new: bool = True) -> Trainer:
        constant = {"warmup_steps": 0, "min_lr": HALF.lr}  # the schedule is that of max_steps, which differ here
        run = trainer(corpus, path, dataclasses.replace(HALF, max_steps=max_steps, **constant), new)
        overflow_at(run, 1, 7)
        if not new:
            torch.manual_seed(999)
            run.restore(Checkpoint.load(run.folder.latest))
        run.run()
        return run

    run_to(tmp_path / "whole", 10)
    run_to(tmp_path / "parts", 6)
    resumed = run_to(tmp_path / "parts", 10, new=False)
    assert resumed.skipped_steps() == 2
    a, b = (tmp_path / run / "checkpoint" / "latest.safetensors" for run in ("whole", "parts"))
    assert_same_checkpoint(a, b)
    assert Checkpoint.load(a).state["scaler"] == Checkpoint.load(b).state["scaler"]


def test_a_checkpoint_from_before_the_scaler_resumes(corpus, tmp_path):
    """Without the scaler's state and AdamW's own count of steps, as checkpoints were; in float32 to the same bits."""
    for dtype in ("float32", "float16"):
        cfg = dataclasses.replace(TRAIN, dtype=dtype, max_steps=4)
        run = trainer(corpus, tmp_path / dtype, cfg)
        run.run()
        saved = Checkpoint.load(run.folder.latest)
        saved.state.pop("scaler", None)
        saved.tensors = {n: t for n, t in saved.tensors.items() if not n.startswith("step.")}
        resumed = trainer(corpus, tmp_path / dtype, cfg, new=False)
        resumed.restore(saved)
        assert resumed.precision.scaler.get_scale() == (2.0**16 if dtype == "float16" else 1.0)
        assert {float(s["step"]) for s in resumed.optimizer.state.values()} == {4.0}
        if dtype == "float32":
            before, after = run.checkpoint().tensors, resumed.checkpoint().tensors
            assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())


def test_gradients_that_overflow_without_a_scale_end_the_run(corpus, tmp_path):
    run = trainer(corpus, tmp_path, dataclasses.replace(HALF, max_steps=40, eval_interval=40))
    overflow_at(run, *range(40))
    with pytest.raises(
        TrainingError, match=r"step 18: the gradients overflow float16 even unscaled; .*--dtype float32"
    ):
        run.run()


def test_a_loss_that_is_not_finite_is_an_error_in_float16_too(corpus, tmp_path):
    run = trainer(corpus, tmp_path, HALF)
    loss = run.loss
    run.loss = lambda x, y: loss(x, y) * (math.nan if run.state["step"] == 5 else 1.0)
    with pytest.raises(TrainingError, match=r"step 6: the loss is nan; last good checkpoint: .*latest\.safetensors"):
        run.run()
