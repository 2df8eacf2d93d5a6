"""The state of a run as a checkpoint: what is in it, and what is refused when it is read."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastgpt.checkpoint import Checkpoint, CheckpointError
from small_runs import TRAIN, trainer


def test_the_random_state_of_any_gpu_is_kept(corpus, tmp_path, monkeypatch):
    """As on a Mac, with a stand-in for torch.mps: AdamW's count of steps stays on the CPU, where PyTorch wants it."""

    class Module:
        state = torch.arange(16, dtype=torch.uint8)

        def get_rng_state(self, device):
            assert device.type == "mps"
            return self.state

        def set_rng_state(self, state, device):
            assert device.type == "mps"
            self.state = state

    module = Module()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    run = trainer(corpus, tmp_path, dataclasses.replace(TRAIN, max_steps=1))
    run.run()
    run.device = torch.device("mps")
    saved = run.checkpoint()
    assert torch.equal(saved.tensors["rng.mps"], torch.arange(16, dtype=torch.uint8))
    module.state = torch.zeros(16, dtype=torch.uint8)
    run.optimizer.param_groups[-1]["fused"] = False
    run.restore(saved)
    assert torch.equal(module.state, torch.arange(16, dtype=torch.uint8))
    assert {s["step"].device.type for s in run.optimizer.state.values()} == {"cpu"}
    assert "rng.mps" not in trainer(corpus, tmp_path, new=False).checkpoint().tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.tensors.pop("exp_avg.ln_f.weight"), "tensor exp_avg.ln_f.weight is missing"),
        (lambda c: c.tensors.pop("model.ln_f.weight"), "tensor model.ln_f.weight is missing"),
        (lambda c: c.tensors.pop("step.ln_f.weight"), "tensor step.ln_f.weight is missing"),
        (lambda c: c.tensors.update({"step.ln_f.weight": torch.zeros(2)}), r"step.ln_f.weight has shape \(2,\)"),
        (lambda c: c.tensors.pop("rng.cpu"), "tensor rng.cpu is missing"),
        (lambda c: c.state.update(train_tokens=5), "field 'train_tokens' is 5"),
        (lambda c: c.state.update(data="0" * 64), "field 'data' is not the fingerprint of the data given"),
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


def test_moments_of_what_is_frozen_now_are_left_out(corpus, tmp_path):
    run = trainer(corpus, tmp_path, dataclasses.replace(TRAIN, max_steps=1))
    run.run()
    resumed = trainer(corpus, tmp_path, new=False)
    resumed.model.blocks[0].requires_grad_(False)
    resumed.restore(Checkpoint.load(run.folder.latest))
    assert len(resumed.optimizer.state) == sum(p.requires_grad for p in resumed.model.parameters())


@pytest.mark.parametrize(
    ("name", "value"), [("step", -3), ("step", 2.5), ("tokens", None), ("best_val", "low"), ("best_val", math.nan)]
)
def test_counters_that_no_run_has_are_refused(corpus, tmp_path, name, value):
    new = trainer(corpus, tmp_path)
    saved = new.checkpoint()
    saved.state[name] = value
    with pytest.raises(CheckpointError, match=rf"field '{name}' of 'state' is {value!r}, which a run cannot have"):
        new.restore(saved)
