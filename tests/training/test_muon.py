"""Muon: its update against the formula, which parameters it takes, and runs that are stopped and resumed."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch

from fastgpt import GPTConfig
from fastgpt.baselines import build_model
from fastgpt.checkpoint import Checkpoint, CheckpointError
from fastgpt.cli import main
from fastgpt.config import ConfigError, TrainConfig
from fastgpt.training.loop import Interrupted
from fastgpt.training.muon import Muon
from fastgpt.training.step import Precision, make_optimizer, training_step
from newton_schulz import by_singular_values
from small_runs import MODEL, TRAIN, assert_same_checkpoint, signal_at, trainer
from stand_in_graph import StandIn

MUON = dataclasses.replace(TRAIN, optimizer="muon", muon_lr=0.03)


def test_the_update_is_that_of_the_formula():
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in ((6, 4), (4, 6), (6, 4))]
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    bias = torch.nn.Parameter(torch.randn(4))
    lr, momentum, decay = 0.1, 0.9, 0.2
    optimizer = Muon(parameters, torch.optim.AdamW([bias], lr=1e-2), lr, momentum, decay, lr_ratio=10.0)
    expected_bias = torch.nn.Parameter(bias.detach().clone())
    adamw = torch.optim.AdamW([expected_bias], lr=1e-2)
    buffers = [torch.zeros_like(w) for w in weights]
    for step in range(3):
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape)
            if step == 1 and i == 2:
                parameter.grad = None
                continue
            buffers[i] = momentum * buffers[i] + (1 - momentum) * parameter.grad
            update = by_singular_values(momentum * buffers[i] + (1 - momentum) * parameter.grad).float()
            rows, columns = parameter.shape
            weights[i] = (1 - lr * decay) * weights[i] - lr * math.sqrt(max(1, rows / columns)) * update
        bias.grad = torch.randn(4)
        expected_bias.grad = bias.grad.clone()
        optimizer.step()
        adamw.step()
    for parameter, weight in zip(parameters, weights, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, atol=1e-4, rtol=0)
    assert torch.equal(bias, expected_bias)


def test_queries_keys_and_values_are_three_matrices():
    torch.manual_seed(0)
    model = build_model(GPTConfig(vocab_size=9, **MODEL), 0)
    optimizer = make_optimizer(model, dataclasses.replace(MUON, muon_momentum=0.0, weight_decay=0.0))
    weight = model.blocks[0].attn.qkv.weight
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for old, new, gradient in zip(before.chunk(3), weight.detach().chunk(3), weight.grad.chunk(3), strict=True):
        update = by_singular_values(gradient).float()
        torch.testing.assert_close(new, old - MUON.muon_lr * update, atol=1e-4, rtol=0)


def test_the_state_survives_pytorchs_own_saving():
    def made() -> tuple[list[torch.nn.Parameter], Muon]:
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(4, 6)), torch.nn.Parameter(torch.randn(4))]
        return parameters, Muon(parameters[:1], torch.optim.AdamW(parameters[1:]), 0.1, 0.9, 0.1, lr_ratio=10.0)

    def train(parameters: list[torch.nn.Parameter], optimizer: Muon, steps: range) -> None:
        for step in steps:
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, step + 1.0)
            optimizer.step()

    whole, optimizer = made()
    train(whole, optimizer, range(4))
    first, optimizer = made()
    train(first, optimizer, range(2))
    second, resumed = made()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(first, second, strict=True):
        q.data.copy_(p)
    train(second, resumed, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(whole, second, strict=True))


@pytest.mark.parametrize(
    ("kind", "changes", "n_matrices"),
    [
        ("gpt", {}, 8),
        ("gpt", {"tie_weights": False}, 8),
        ("lstm", {}, 4),
        ("positional-bigram", {}, 0),
        ("bigram", {}, 0),
    ],
)
def test_muon_takes_the_matrices_between_embeddings_and_head(kind, changes, n_matrices):
    model = build_model(GPTConfig(vocab_size=9, **MODEL, **changes), 0, kind)
    optimizer = make_optimizer(model, MUON)
    assert isinstance(optimizer, Muon) == (n_matrices > 0)
    by_muon = optimizer.matrices if n_matrices else []
    assert len(by_muon) == n_matrices and all(p.ndim == 2 for p in by_muon)
    outside = [p for name, p in model.named_parameters() if "embedding" in name or "head" in name or "table" in name]
    assert not {*by_muon} & {*outside}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == len(set(trained)) and set(trained) == set(model.parameters())
    if n_matrices:  # both rates follow one schedule
        x = torch.zeros(2, 8, dtype=torch.int64)
        training_step(
            model, model.loss, optimizer, [(x, x)], Precision(torch.device("cpu"), "float32"), 1.0, MUON.lr / 4
        )
        assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(MUON.muon_lr / 4)] + [
            MUON.lr / 4
        ] * 2


def test_frozen_matrices_are_left_out():
    model = build_model(GPTConfig(vocab_size=9, **MODEL), 0)
    model.blocks[0].requires_grad_(False)
    assert len(make_optimizer(model, MUON).matrices) == 4
    model.blocks.requires_grad_(False)
    assert isinstance(make_optimizer(model, MUON), torch.optim.AdamW)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_learns_and_resumes_to_the_same_bits(corpus, tmp_path, monkeypatch, dtype):
    cfg = dataclasses.replace(MUON, dtype=dtype)
    whole = trainer(corpus, tmp_path / "whole", cfg)
    before = whole.evaluate("val")
    whole.run()
    assert whole.evaluate("val") < before
    stopped = trainer(corpus, tmp_path / "parts", cfg)
    signal_at(5, stopped, monkeypatch)
    with pytest.raises(Interrupted):
        stopped.run()
    torch.manual_seed(999)
    resumed = trainer(corpus, tmp_path / "parts", cfg, new=False)
    resumed.restore(Checkpoint.load(resumed.folder.latest))
    resumed.run()
    assert_same_checkpoint(whole.folder.latest, resumed.folder.latest)
    saved = Checkpoint.load(whole.folder.latest)
    assert len(saved.part("momentum_buffer")) == 8
    assert not saved.part("momentum_buffer").keys() & saved.part("exp_avg").keys()


def test_a_graph_gives_the_bits_of_plain_training(corpus, tmp_path, use_recorder):
    """With rates that float32 holds: a graph reads the learning rate from a float32 tensor."""
    recorder, runs = use_recorder(StandIn()), []
    rates = {"lr": 2.0**-10, "min_lr": 2.0**-10, "muon_lr": 2.0**-6, "warmup_steps": 0}
    for graphed in (False, True):
        runs.append(trainer(corpus, tmp_path / str(graphed), dataclasses.replace(MUON, cuda_graph=graphed, **rates)))
        runs[-1].run()
    assert_same_checkpoint(runs[0].folder.latest, runs[1].folder.latest)
    assert runs[1]._take.reason is None and recorder.replays == TRAIN.max_steps - 1


def test_a_step_whose_float16_gradients_overflow_is_left_out(corpus, tmp_path):
    run = trainer(corpus, tmp_path, dataclasses.replace(MUON, dtype="float16"))
    loss = run.loss

    def overflowing(x, y):
        value = loss(x, y)
        if run.state["step"] == 3:
            value.register_hook(lambda gradient: gradient * math.inf)
        return value

    run.loss = overflowing
    run.run()
    assert run.skipped_steps() == 1
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())


def test_a_run_keeps_its_optimizer(text_file, tmp_path, capsys):
    args = ["train", "--data", str(text_file), "--out", str(tmp_path / "run"), "--block-size", "16", "--n-layer", "1"]
    args += ["--n-head", "2", "--n-embd", "16", "--batch-size", "4", "--max-steps", "2", "--device", "cpu"]
    assert main([*args, "--optimizer", "muon"]) == 0
    assert "optimizer: muon for 4 matrices (3,072 parameters), adamw for the rest" in capsys.readouterr().out
    assert main([*args, "--resume", "--optimizer", "adamw"]) == 1
    error = capsys.readouterr().err
    assert "field 'optimizer' is 'muon', not 'adamw'" in error and "leave --optimizer out" in error
    assert error.count("\n") == 1
    assert main([*args[:3], *args[3:5], "--resume", "--max-steps", "3"]) == 0  # it is the run's
    assert len(Checkpoint.load(tmp_path / "run/checkpoint/latest.safetensors").part("momentum_buffer")) == 4


def test_another_optimizers_state_is_refused(corpus, tmp_path):
    trainer(corpus, tmp_path, TRAIN).run()
    other = trainer(corpus, tmp_path, MUON, new=False)
    with pytest.raises(CheckpointError, match=r"tensor step\.blocks\..* is not part of the model"):
        other.restore(Checkpoint.load(other.folder.latest))


def test_a_model_without_such_matrices_says_so(text_file, tmp_path, capsys):
    args = [
        "train",
        "--data",
        str(text_file),
        "--out",
        str(tmp_path / "run"),
        "--model",
        "bigram",
        "--optimizer",
        "muon",
    ]
    assert main([*args, "--block-size", "8", "--batch-size", "2", "--max-steps", "1", "--device", "cpu"]) == 0
    assert "optimizer: adamw for all parameters: none is a matrix between" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer: expected one of adamw, muon, got 'sgd'"),
        ({"muon_lr": -1.0}, "muon_lr: expected at least 0"),
        ({"muon_momentum": 1.0}, r"muon_momentum: expected a number in \[0, 1\)"),
        ({"optimizer": "muon", "lr": 0.0, "min_lr": 0.0}, "lr: expected more than 0 with optimizer=muon"),
    ],
)
def test_bad_settings_are_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**change)


def test_a_copy_steps_as_the_original_does():
    torch.manual_seed(0)
    model = build_model(GPTConfig(vocab_size=9, **MODEL), 0)
    pairs = [(model, make_optimizer(model, MUON))]
    idx = torch.randint(9, (2, 8))

    def step(model, optimizer):
        training_step(model, model.loss, optimizer, [(idx, idx)], Precision(torch.device("cpu")), 1.0)

    step(*pairs[0])
    pairs += [copy.deepcopy(pairs[0]), pickle.loads(pickle.dumps(pairs[0]))]
    for pair in pairs:
        torch.manual_seed(1)  # of dropout
        step(*pair)
    expected = pairs[0][0].state_dict()
    for other, _ in pairs[1:]:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in other.state_dict().items())
