"""What `fastgpt.patch` gains: a training step of transformers' GPT-2, patched, against the same model as it is.

Both are one GPT2LMHeadModel with sdpa attention, from one seed, fed the same tokens with labels, and trained by
FastGPT's `training_step`: the same fused AdamW and clipping; float32 on a CPU, bfloat16 autocast on a GPU. Before
anything is timed, loss and gradients of the patched model are held to the rule of the ops, where the model as it is
takes PyTorch's place, and the losses of both in a few steps have to be the same.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fastgpt
from fastgpt import parity
from fastgpt.benchmarks.bench_train_step import step_demand
from fastgpt.benchmarks.harness.accuracy import error_ratio
from fastgpt.benchmarks.harness.models import ModelShape, measured_precision, transformers
from fastgpt.benchmarks.harness.peers import make_present
from fastgpt.benchmarks.harness.suite import OURS, ParityError, Setting, Work
from fastgpt.config import TrainConfig
from fastgpt.training.step import make_optimizer, training_step

THEIRS = "transformers sdpa"
CHECKED_STEPS = 3
LOSS_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}  # of a loss in nats: float32; bfloat16 autocast


_SMALL = ModelShape(B=12, T=64, L=4, H=4, C=128, V=65)
_GPT2 = ModelShape(B=1, T=256, L=12, H=12, C=768, V=50257)


@pytest.mark.shapes(
    cpu=[_SMALL, _GPT2, replace(_GPT2, dropout=0.1)],
    cuda=[replace(_GPT2, B=16, T=1024), replace(_GPT2, B=16, T=1024, dropout=0.1)],
)
def bench_patch(run_work, setting, shape):
    run_work(patch_work(setting, shape))


def patch_work(setting: Setting, shape: ModelShape) -> Work:
    torch.manual_seed(0)
    made, absent = make_present({THEIRS: lambda: transformers(shape, "sdpa")[0].to(setting.device)})
    if THEIRS in absent:
        pytest.skip(f"{THEIRS}: {absent[THEIRS]}")
    theirs = made[THEIRS]
    patched = copy.deepcopy(theirs)
    fastgpt.patch(patched)
    n_parameters = sum(p.numel() for p in theirs.parameters())
    contenders = {OURS: stepper(patched, shape, setting), THEIRS: stepper(theirs, shape, setting)}
    return Work(
        op="patch", shape=str(shape), direction="step", dtype=setting.dtype_name, contenders=contenders,
        error_ratio=lambda name: patched_error_ratio(theirs, shape, setting) if name == OURS else None,
        demand=step_demand(shape, n_parameters), tokens=shape.B * shape.T,
        warmups=0 if setting.device.type == "cpu" else 3,
    )  # fmt: skip


def loss_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """transformers shifts the labels itself: they are the tokens."""
    return lambda x, y: model(input_ids=x, labels=x, use_cache=False).loss


def stepper(model: nn.Module, shape: ModelShape, setting: Setting) -> Callable[[], object]:
    model.train()
    optimizer, precision = make_optimizer(model, TrainConfig()), measured_precision(setting)
    turn = itertools.cycle(shape.random_batches(setting.device, 4))
    return lambda: training_step(model, loss_of(model), optimizer, [next(turn)], precision, grad_clip=1.0)


def patched_error_ratio(model: nn.Module, shape: ModelShape, setting: Setting) -> float:
    """Loss and every gradient, each relative to its largest value, of copies without dropout.

    Raises ParityError where the losses of a few steps, side by side, are not the same.
    """
    theirs = without_dropout(model)
    patched, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    fastgpt.patch(patched)
    x = shape.random_batches(setting.device, 1)[0][0][:2]
    exact_loss = float64_loss(exact, x)
    exact_loss.backward()
    errors = {}
    for name, copied in ((OURS, patched), (THEIRS, theirs)):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            loss = loss_of(copied)(x, x)
        loss.backward()
        pairs = [(loss.detach(), exact_loss.detach())]
        pairs += [(p.grad, q.grad) for p, q in zip(copied.parameters(), exact.parameters(), strict=True)]
        errors[name] = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)
    del exact
    check_losses(patched, theirs, shape, setting)
    return error_ratio(errors[OURS], errors[THEIRS], parity.ATOL[torch.bfloat16 if x.is_cuda else torch.float32])


def without_dropout(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model).train()
    for module in copied.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return copied


def float64_loss(model: nn.Module, x: Tensor) -> Tensor:
    """From the logits, because transformers' own loss converts them to float32."""
    logits = model(input_ids=x, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())


def check_losses(patched: nn.Module, theirs: nn.Module, shape: ModelShape, setting: Setting) -> None:
    steps = [stepper(model, shape, setting) for model in (patched, theirs)]
    for turn in range(CHECKED_STEPS):
        ours, expected = (float(step()) for step in steps)
        if not abs(ours - expected) <= LOSS_TOLERANCE[setting.device.type]:
            raise ParityError(f"patch {shape}: the loss of step {turn + 1} is {ours}, unpatched {expected}")
