"""Steps of AdamW that clip in one pass: PyTorch's weights and hooks, and PyTorch's step where ours cannot serve."""

from __future__ import annotations

import pytest
import torch

import fastgpt
from fastgpt import GPTConfig
from fastgpt.baselines import build_model
from fastgpt.ops.backend import preferred, unavailable
from fastgpt.training import adamw as module
from fastgpt.training.adamw import AdamW
from fastgpt.training.step import Precision, make_optimizer, training_step
from small_runs import MODEL, TRAIN

REASON = unavailable("native", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch):
    monkeypatch.setattr(module, "one_pass_choice", lambda: (preferred() != "torch", "a test"))


@pytest.fixture
def calls(monkeypatch) -> list[float]:
    """What the gradients are multiplied by, for each group that takes the extension's step."""
    seen: list[float] = []
    run = module.adamw_
    monkeypatch.setattr(module, "adamw_", lambda *a, **k: seen.append(k["grad_scale"]) or run(*a, **k))
    return seen


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in ((40, 30), (33,), (5, 7))
    ]


def trained(kind: type, dtype: torch.dtype) -> list[torch.Tensor]:
    """The weights after 20 steps, most of whose gradients are clipped."""
    weights = parameters(dtype)
    groups = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]
    optimizer = kind(groups, lr=0.01, betas=(0.9, 0.99), fused=True)
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        for p in weights:
            p.grad = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.1 * (step % 3)).to(dtype)
        if not (isinstance(optimizer, AdamW) and optimizer.clip_at_step(weights, 1.0)):
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    return [p.detach() for p in weights]


def test_twenty_steps_are_those_of_pytorch_to_rounding(calls):
    """The error against float64 is at most twice PyTorch's, plus a unit."""
    exact = trained(torch.optim.AdamW, torch.float64)
    theirs, ours = trained(torch.optim.AdamW, torch.float32), trained(AdamW, torch.float32)
    assert len(calls) == 20 * 2 and min(calls) < 0.5 and max(calls) == 1.0
    for found, other, right in zip(ours, theirs, exact, strict=True):
        assert float((found - right).abs().max()) <= 2 * float((other - right).abs().max()) + 1e-6


def test_the_step_of_training_takes_one_pass(calls):
    """The same weights as on the torch backend, for a model whose parameters are all the optimizer's or not."""
    x = torch.randint(9, (4, 16), generator=torch.Generator().manual_seed(2))

    def weights(frozen: bool) -> list[torch.Tensor]:
        model = build_model(GPTConfig(vocab_size=9, **MODEL | {"dropout": 0.0}), 0)
        model.blocks[0].requires_grad_(not frozen)
        optimizer = make_optimizer(model, TRAIN)
        for _ in range(4):
            training_step(model, model.loss, optimizer, [(x, x)], Precision(torch.device("cpu"), "float32"), 0.1, 1e-2)
        return [p.detach() for p in model.parameters()]

    for frozen in (False, True):
        calls.clear()
        ours = weights(frozen)
        assert len(calls) == 4 * 2
        with fastgpt.use_backend("torch"):
            torch.testing.assert_close(ours, weights(frozen), atol=2e-3, rtol=0)
        assert len(calls) == 4 * 2


def test_a_gradient_that_is_not_a_number_makes_such_weights_as_pytorchs_does():
    weights = parameters()
    optimizer = AdamW(weights, lr=0.01, fused=True)
    for value in (1.0, float("nan")):
        for p in weights:
            p.grad = torch.full_like(p, value)
        assert optimizer.clip_at_step(weights, 1.0)
        optimizer.step()
    assert all(bool(p.isnan().all()) for p in weights)


def test_hooks_run_once_at_each_step(calls):
    torch.optim.AdamW(parameters())  # PyTorch wraps a class's step at its first optimizer
    weights = parameters()
    optimizer, seen = AdamW(weights, lr=0.01, fused=True), []
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    for p in weights:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    assert seen == ["before", "after"] * 3 and len(calls) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"maximize": True},
        {"fused": False},
        {"lr": torch.tensor(0.01)},
        "float64",
        "strided",
        "missing",
    ],
    ids=str,
)
def test_what_the_kernel_does_not_take_is_pytorchs(calls, options):
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        weights = parameters(torch.float64 if options == "float64" else torch.float32)
        optimizer = kind(weights, **{"lr": 0.01, "fused": True} | (options if isinstance(options, dict) else {}))
        for _ in range(3):
            for p in weights:
                p.grad = torch.ones_like(p)
            if options == "strided":
                weights[0].grad = torch.ones(30, 40).t()
            if options == "missing":
                weights[0].grad = None
            if kind is AdamW and optimizer.clip_at_step(weights, 1.0):
                assert options == "missing"
            else:
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        results.append(weights)
    torch.testing.assert_close(*results)
    assert bool(calls) == (options == "missing"), "a parameter without a gradient is left out"


def test_float16_steps_are_clipped_too(calls):
    """The scaler gives the step what only PyTorch's takes. The first moment shows the gradients that it has used."""
    model = build_model(GPTConfig(vocab_size=9, **MODEL | {"dropout": 0.0}), 0)
    optimizer, x = make_optimizer(model, TRAIN), torch.zeros(2, 16, dtype=torch.int64)
    precision = Precision(torch.device("cpu"), "float16")
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)  # no gradient overflows
    training_step(model, model.loss, optimizer, [(x, x)], precision, 1e-3)
    first_moments = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in model.parameters()])
    assert float(first_moments.norm()) == pytest.approx(1e-3 * (1 - TRAIN.beta1), rel=1e-2)
    assert not calls and optimizer.clip_factor == 1.0


def test_a_closure_is_called(calls):
    weights = parameters()
    optimizer = AdamW(weights, lr=0.01, fused=True)

    def closure() -> torch.Tensor:
        loss = sum(p.square().sum() for p in weights)
        optimizer.zero_grad()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2] and not calls


def test_the_state_does_not_follow_torchs_defaults(calls):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = AdamW([weight], lr=0.1, fused=True)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    state = optimizer.state[weight]
    assert calls == [1.0] and {t.dtype for t in state.values()} == {torch.float32} and float(state["step"]) == 1.0
