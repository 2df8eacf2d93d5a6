"""What the studies share: the text, a short training run in memory, and the machine's facts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..config import ConfigError, GPTConfig, TrainConfig, preset
from ..data.corpus import Corpus
from ..data.layouts import evaluation_blocks, random_batch
from ..data.shards import pieces
from ..machine import facts, resolve_device, short_commit
from ..model import GPT
from ..training.step import Precision, learning_rate, make_optimizer, mean_loss, training_step

VALIDATION_BLOCKS = 64
SMALL_GPT = "shakespeare-char-cpu"  # the preset of the model that a study trains for itself
Number = TypeVar("Number", int, float)


class StudyError(ValueError):
    """The given text, checkpoint or file cannot be studied. The message is one line with the remedy."""


# ---- settings ----


def numbers(name: str, text: str, kind: type[Number]) -> list[Number]:
    """The numbers of a setting such as "2,8,24": at least one, each above 0, in the order given."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{name}: expected {what} above 0 with commas between them, got {text!r}")
    if len(set(values)) < len(values):
        raise ConfigError(f"{name}: {text!r} gives a number twice")
    return values


def at_least(settings: Any, **least: int) -> None:
    """Refuse a setting that is below its least value, or not finite: at_least(settings, steps=1, width=2)."""
    for name, limit in least.items():
        if not limit <= (value := getattr(settings, name)) < math.inf:
            raise ConfigError(f"{name}: expected at least {limit}, got {value}")


def recorded(settings: Any) -> dict[str, Any]:
    """The settings as results.json keeps them. Of a path it keeps the last part, as folders differ between machines."""
    values = dataclasses.asdict(settings)
    for name in ("data", "checkpoint", "vectors"):
        if values.get(name) is not None:
            values[name] = Path(values[name]).name
    left_out = ("out", "config", "device", "resume", "threads")
    return {name: value for name, value in values.items() if name not in left_out}


# ---- text and models ----


def load_corpus(settings: Any, block_size: int) -> Corpus:
    """The characters of --data, which must be enough for a block."""
    return Corpus.load(settings.data, "char", block_size=block_size)


def new_gpt(cfg: GPTConfig, seed: int) -> GPT:
    """A freshly initialised GPT whose weights follow from `seed`."""
    torch.manual_seed(seed)
    return GPT(cfg)


def small_gpt(settings: Any) -> tuple[GPT, Corpus]:
    """The model of the preset SMALL_GPT and its text, for a study that was given no checkpoint; to be trained yet."""
    cfg = GPTConfig.preset(SMALL_GPT)
    corpus = load_corpus(settings, cfg.block_size)
    cfg = dataclasses.replace(cfg, vocab_size=corpus.tokenizer.vocab_size)
    return new_gpt(cfg, settings.seed).to(resolve_device(settings.device)).eval(), corpus


def train_small_gpt(model: GPT, corpus: Corpus, settings: Any) -> float:
    """Train it by the preset's recipe, in `settings.steps` steps; returns its validation loss."""
    recipe = TrainConfig(**{**preset(SMALL_GPT)[1], "max_steps": settings.steps, "seed": settings.seed})
    print(f"training the model of {SMALL_GPT} for {settings.steps} steps", flush=True)
    for _ in training_steps(model, corpus, recipe):
        pass
    loss = finite(validation_loss(model, corpus))
    if loss is None:
        raise StudyError("the model's loss is not finite after training; give a --checkpoint instead")
    return loss


class _NotFinite(Exception):
    """Ends a training whose loss is no longer a finite number."""


def training(
    model: Any, corpus: Corpus, seed: int, steps: int, *, batch_size: int, warmup_steps: int, lr: float = 1e-3
) -> Iterator[float]:
    """`training_steps` with the settings of `fastgpt train`, and a learning rate that falls to a tenth."""
    cfg = TrainConfig(
        batch_size=batch_size, max_steps=steps, lr=lr, min_lr=lr / 10, warmup_steps=warmup_steps, seed=seed
    )
    return training_steps(model, corpus, cfg)


def training_steps(model: Any, corpus: Corpus, cfg: TrainConfig) -> Iterator[float]:
    """Train `model` in memory, in float32: each loss that is taken from this iterator is one step.

    Optimizer, schedule, clipping and batches are the same as in `fastgpt train`. A step's loss is measured on its batch
    before its update. A loss that is not finite is the last one, and the weights are not updated with it.
    """

    def finite_loss(x: Tensor, y: Tensor) -> Tensor:
        loss = model.loss(x, y)
        if not math.isfinite(value := float(loss.detach())):
            raise _NotFinite(value)
        return loss

    precision = Precision(next(model.parameters()).device, "float32")
    optimizer = make_optimizer(model, cfg)
    for step in range(cfg.max_steps):
        x, y = random_batch(corpus.train, model.cfg.block_size, cfg.batch_size, cfg.seed, step)
        batch = (x.to(precision.device), y.to(precision.device))
        model.train()
        rate = learning_rate(step, cfg)
        try:
            loss = training_step(model, finite_loss, optimizer, [batch], precision, cfg.grad_clip, rate)
        except _NotFinite as error:
            yield error.args[0]
            return
        yield float(loss)


def validation_loss(model: Any, corpus: Corpus, n_blocks: int = VALIDATION_BLOCKS) -> float:
    """Mean loss in nats per token, in eval mode, over evenly spaced blocks of the validation text."""
    device = next(model.parameters()).device
    model.eval()
    x, y = evaluation_blocks(corpus.val, model.cfg.block_size, n_blocks)
    return mean_loss(model.loss, x, y, 16, Precision(device, "float32"))


def frequency_loss(corpus: Corpus, block_size: int) -> float:
    """The validation loss of a model that knows only how often each token occurs in the training text.

    One is added to each count, so that a token that does not occur there has a probability.
    """
    _, targets = evaluation_blocks(corpus.val, block_size, VALIDATION_BLOCKS)
    counts = np.ones(corpus.tokenizer.vocab_size)
    for piece in pieces(corpus.train):
        counts += np.bincount(piece, minlength=len(counts))
    return float(-np.log(counts / counts.sum())[targets.numpy()].mean())


def finite(value: float) -> float | None:
    """A loss as results.json keeps it: four decimals, and None where it is not finite, as JSON has no such number."""
    return round(value, 4) if math.isfinite(value) else None


def described(corpus: Corpus, settings: Any, block_size: int) -> dict[str, Any]:
    """The text that losses were measured on; results.json keeps it, because a loss means nothing without its text."""
    return {
        "name": Path(settings.data).name,
        "train_tokens": len(corpus.train),
        "val_tokens": len(corpus.val),
        "vocab_size": corpus.tokenizer.vocab_size,
        "frequency_loss": round(frequency_loss(corpus, block_size), 4),
    }


# ---- the machine ----


def study_facts(device: str) -> dict[str, Any]:
    """Device, versions, commit and date of the measurement."""
    found = facts(resolve_device(device))
    found["commit"] = short_commit(found["commit"])
    return {name: found[name] for name in ("device", "threads", "python", "torch", "fastgpt", "commit", "date")}
