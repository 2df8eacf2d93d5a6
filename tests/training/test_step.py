"""The step of training: the learning rate, weight decay, gradient accumulation, the dtype, and the mean of a loss."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from fastgpt import GPTConfig
from fastgpt.baselines import build_model
from fastgpt.config import TrainConfig
from fastgpt.data.corpus import Corpus
from fastgpt.data.layouts import IGNORED
from fastgpt.training import TrainingError
from fastgpt.training.step import Precision, learning_rate, make_optimizer, mean_loss, training_dtype, training_step
from small_runs import MODEL, TRAIN


def test_schedule():
    cfg = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=9, max_steps=109)
    rates = [learning_rate(step, cfg) for step in range(112)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == max(rates) == 1.0
    assert rates[59] == pytest.approx(0.55)
    assert rates[109:] == [0.1] * 3
    assert all(a > b for a, b in pairwise(rates[9:110]))
    assert learning_rate(0, TrainConfig(max_steps=0, warmup_steps=0, lr=1.0, min_lr=0.5)) == 0.5


def test_a_linear_decay_falls_by_the_same_amount_at_every_step():
    cfg = TrainConfig(lr=1.0, min_lr=0.2, warmup_steps=9, max_steps=109, lr_decay="linear")
    assert learning_rate(9, cfg) == 1.0 and learning_rate(109, cfg) == 0.2
    assert all(learning_rate(s, cfg) - learning_rate(s + 1, cfg) == pytest.approx(0.008) for s in range(9, 109))


def test_weight_decay_is_on_matrices_only(corpus):
    model = build_model(GPTConfig(vocab_size=9, **MODEL), 0)
    decayed, kept = make_optimizer(model, TRAIN).param_groups
    assert {p.ndim for p in decayed["params"]} == {2} and decayed["weight_decay"] == 0.1
    assert {p.ndim for p in kept["params"]} == {1} and kept["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def masked(y: torch.Tensor, seed: int) -> torch.Tensor:
    """Targets left out at random, all of them in the first quarter of the rows."""
    keep = torch.rand(y.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    keep[: len(y) // 4] = False
    return torch.where(keep, y, IGNORED)


def rows_of(layout: str, corpus: Corpus, names: Corpus) -> tuple[torch.Tensor, torch.Tensor]:
    if layout == "names":
        return names.examples("train", 16).batch(12, seed=1, step=0)
    x, y = dataclasses.replace(corpus, layout="windows" if layout == "windows" else "blocks").examples(
        "train", 16
    ).batch(12, seed=1, step=0)  # fmt: skip
    return x, masked(y, 2) if layout == "masked" else y


@pytest.mark.parametrize("layout", ["blocks", "windows", "names", "masked"])
@pytest.mark.parametrize("splits", [[4, 4, 4], [3, 3, 3, 3], [1, 2, 9]], ids=str)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-7), (torch.float32, 1e-6)], ids=str)
@pytest.mark.filterwarnings("ignore:fastgpt. .* does not take the native backend")
def test_gradients_accumulated_are_those_of_one_batch(corpus, names, layout, splits, dtype, atol):
    """One step of plain gradient descent, from 12 rows at once and from the same rows in parts."""
    x, y = rows_of(layout, corpus, names)

    def step(sizes: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = build_model(GPTConfig(vocab_size=40, **MODEL | {"dropout": 0.0}), 0).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        micro_batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
        precision = Precision(torch.device("cpu"), "float32")
        return training_step(model, model.loss, optimizer, micro_batches, precision, 0.0), list(model.parameters())

    (loss, weights), (expected_loss, expected) = step(splits), step([12])
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=0)  # the trainer adds losses up in float32
    for p, q in zip(weights, expected, strict=True):
        torch.testing.assert_close(p, q, atol=atol, rtol=0)


def test_a_step_without_a_counted_target_moves_nothing_and_is_no_nan():
    model = build_model(GPTConfig(vocab_size=9, **MODEL), 0)
    before = [p.clone() for p in model.parameters()]
    x, y = torch.zeros(2, 4, 16, dtype=torch.int64), torch.full((2, 4, 16), IGNORED)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss = training_step(
        model, model.loss, optimizer, list(zip(x, y, strict=True)), Precision(torch.device("cpu"), "float32"), 1.0
    )
    assert loss == 0.0 and all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_mean_loss_is_over_targets_in_batches_of_any_size(names):
    model = build_model(GPTConfig(vocab_size=names.tokenizer.vocab_size, **MODEL), 0).eval()
    x, y = names.examples("val", 16).evenly_spaced(9)
    y[4:6] = IGNORED
    precision = Precision(torch.device("cpu"), "float32")
    at_once = float(model.loss(x, y).detach())
    for batch_size in (1, 2, 4, 9, 100):
        assert mean_loss(model.loss, x, y, batch_size, precision) == pytest.approx(at_once, rel=1e-6)
    assert math.isnan(mean_loss(model.loss, x, torch.full_like(y, IGNORED), 4, precision))


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "asked", "dtype", "why"),
    [
        ("cuda", True, "auto", torch.bfloat16, "this GPU has it"),
        ("cuda", False, "auto", torch.float16, "this GPU emulates bfloat16"),
        ("cuda", False, "bfloat16", torch.bfloat16, "asked for, but this GPU emulates it: float16 is faster"),
        ("cuda", True, "bfloat16", torch.bfloat16, "asked for"),
        ("cuda", True, "float16", torch.float16, "asked for"),
        ("cuda", True, "float32", torch.float32, "asked for"),
        ("cpu", True, "auto", torch.float32, "half precision is the default on CUDA alone"),
        ("mps", True, "auto", torch.float32, "half precision is the default on CUDA alone"),
        ("mps", False, "float16", torch.float16, "asked for"),
    ],
)
def test_the_dtype_of_training(monkeypatch, device, has_bfloat16, asked, dtype, why):
    """As PyTorch answers on a T4: bfloat16 is supported, unless one asks for it without emulation."""
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bfloat16 or including_emulation
    )
    assert training_dtype(torch.device(device), asked) == (dtype, why)


def test_a_device_without_autocast_trains_in_float32_alone():
    assert Precision(torch.device("meta"), "float32").dtype == torch.float32
    with pytest.raises(TrainingError, match="dtype: float16 needs autocast, which PyTorch does not have on 'meta'"):
        Precision(torch.device("meta"), "float16")


def test_clipping_sees_gradients_without_their_scale(corpus, monkeypatch):
    """Plain gradient descent with a small clip: an unscaled gradient of norm 1e-3 moves the weights by that much."""
    model = build_model(GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **MODEL), 0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batch = corpus.examples("train", 16).batch(4, seed=1, step=0)
    training_step(model, model.loss, optimizer, [batch], Precision(torch.device("cpu"), "float16"), 1e-3)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-2)
