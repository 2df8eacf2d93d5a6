"""Seconds of training until a validation loss is reached: FastGPT's recipe for a preset's model, and nanoGPT's.

All contenders train a model of the same shape on the same text, and are evaluated on the same blocks, every
EVAL_INTERVAL steps. FastGPT trains by its preset. nanoGPT trains by its own settings and, as a second contender, at the
learning rate that was the fastest one for its AdamW (`fastgpt study recipe`). Only the steps are timed; every round has
another seed. --data names the text.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import pytest
import torch

from fastgpt.benchmarks.harness.accuracy import model_error_ratio
from fastgpt.benchmarks.harness.models import Model, ModelShape, make_present, measured_precision, model_makers
from fastgpt.benchmarks.harness.suite import OURS, Setting, Work
from fastgpt.config import GPTConfig, TrainConfig, preset
from fastgpt.data.corpus import Corpus
from fastgpt.data.layouts import evaluation_blocks, random_batch
from fastgpt.data.sources import DataError
from fastgpt.training.step import learning_rate, make_optimizer, mean_loss, training_step

EVAL_INTERVAL = 25
EVAL_BLOCKS = 240


@dataclass(frozen=True)
class Goal:
    """A preset whose model is trained until the validation loss is `loss`, in nats per token."""

    preset: str
    loss: float

    def __str__(self) -> str:
        return f"{self.preset} to {self.loss} nats"

    def on(self, text: str) -> Self:
        """nanoGPT's README names a loss for tinyshakespeare. On other texts the goal is one that all soon reach."""
        return self if text == "tinyshakespeare" else replace(self, loss=max(self.loss, 2.5))


# How nanoGPT trains the model of each preset: by its config file, for a CPU with the changes that its README makes. Its
# best rate is the learning rate, with the steps of its decay, by which its AdamW reaches 1.88 in the least time.
NANOGPT = {
    "shakespeare-char": {"nanoGPT": TrainConfig(batch_size=64, max_steps=5000)},
    "shakespeare-char-cpu": {
        "nanoGPT": TrainConfig(batch_size=12, max_steps=2000),
        "nanoGPT at its best rate": TrainConfig(batch_size=12, max_steps=1250, lr=4e-3, min_lr=4e-4),
    },
}


@pytest.mark.shapes(cpu=[Goal("shakespeare-char-cpu", 1.88)], cuda=[Goal("shakespeare-char", 1.8)])
def bench_time_to_loss(run_work, setting, suite, shape):
    goal = replace(shape, loss=3.2) if setting.quick else shape.on(Path(setting.data).stem)
    try:
        corpus = Corpus.load(setting.data)
    except DataError as reason:
        suite.absent["time_to_loss"] = {OURS: str(reason)}
        pytest.skip(str(reason))
    run_work(time_to_loss_work(setting, goal, corpus))


def time_to_loss_work(setting: Setting, goal: Goal, corpus: Corpus) -> Work:
    shape = ModelShape.of_preset(goal.preset, corpus.tokenizer.vocab_size)
    makers = model_makers(shape, setting)
    present, absent = make_present({name: makers[name] for name in (OURS, "nanoGPT")})
    recipes = {OURS: (OURS, TrainConfig(**preset(goal.preset)[1]))}
    if "nanoGPT" in present:
        recipes |= {name: ("nanoGPT", cfg) for name, cfg in NANOGPT[goal.preset].items()}
    extra: dict[str, dict] = {name: {} for name in recipes}
    return Work(
        op="time_to_loss", shape=f"{goal} on {Path(setting.data).name}", direction="train", dtype=setting.dtype_name,
        contenders={
            name: _trainer(makers[model], cfg, goal, corpus, setting, extra[name])
            for name, (model, cfg) in recipes.items()
        },
        error_ratio=lambda name: model_error_ratio(present[OURS][0], shape) if name == OURS else None,
        absent=absent, extra=extra, reports_seconds=True, min_rounds=3,
    )  # fmt: skip


def _trainer(
    make: Callable[[], Model], cfg: TrainConfig, goal: Goal, corpus: Corpus, setting: Setting, extra: dict
) -> Callable[[], float]:
    """Trains a new model at each call and returns the seconds that its steps took."""
    seeds = itertools.count(1)
    length = GPTConfig.preset(goal.preset).block_size
    blocks = evaluation_blocks(corpus.val, length, EVAL_BLOCKS)

    def train() -> float:
        seed = next(seeds)
        torch.manual_seed(seed)
        model, loss = make()
        optimizer, precision = make_optimizer(model, cfg), measured_precision(setting)
        seconds, done = 0.0, 0
        # A rate above 0 at the end lets a run go on, where a seed needs a few steps more than the recipe has.
        most = 2 * cfg.max_steps if cfg.min_lr > 0.0 else cfg.max_steps
        while done < most:
            todo = range(done, min(done + EVAL_INTERVAL, most))
            _synchronize(setting.device)
            start = time.perf_counter()
            for step in todo:
                drawn = random_batch(corpus.train, length, cfg.batch_size, seed, step)
                batch = tuple(t.to(setting.device) for t in drawn)
                training_step(model, loss, optimizer, [batch], precision, cfg.grad_clip, lr=learning_rate(step, cfg))
            _synchronize(setting.device)
            seconds += time.perf_counter() - start
            done = todo.stop
            model.eval()
            val_loss = mean_loss(loss, *blocks, cfg.batch_size, precision)
            model.train()
            if val_loss <= goal.loss:
                extra.update(val_loss=round(val_loss, 4), steps=done)
                return seconds
        raise RuntimeError(f"the loss is {val_loss:.3f} after {done} steps, and {goal.loss} was to be reached")

    return train


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
