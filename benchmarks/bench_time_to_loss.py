"""Seconds of training until a validation loss is reached: nanoGPT's character recipe, by FastGPT and by nanoGPT.

Both see the same batches in the same order, the same learning rates, optimizer and clipping, and are evaluated on the
same blocks, every EVAL_INTERVAL steps. Only the steps are timed; every round has another seed. --data names the text.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fastgpt.benchmarks.harness.accuracy import model_error_ratio
from fastgpt.benchmarks.harness.models import Model, ModelShape, make_present, measured_precision, model_makers
from fastgpt.benchmarks.harness.suite import OURS, Setting, Work
from fastgpt.config import TrainConfig, preset
from fastgpt.data.corpus import Corpus
from fastgpt.data.layouts import evaluation_blocks, random_batch
from fastgpt.data.sources import DataError
from fastgpt.training.step import learning_rate, make_optimizer, mean_loss, training_step

EVAL_INTERVAL = 25
EVAL_BATCHES = 10


@dataclass(frozen=True)
class Goal:
    preset: str
    loss: float  # nats per token, on the validation part

    def __str__(self) -> str:
        return f"{self.preset} to {self.loss} nats"


@pytest.mark.shapes(cpu=[Goal("shakespeare-char-cpu", 2.5)], cuda=[Goal("shakespeare-char", 1.8)])
def bench_time_to_loss(run_work, setting, suite, shape):
    goal = replace(shape, loss=3.2) if setting.quick else shape
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
    extra: dict[str, dict] = {name: {} for name in present}
    return Work(
        op="time_to_loss", shape=f"{goal} on {Path(setting.data).name}", direction="train", dtype=setting.dtype_name,
        contenders={name: _trainer(makers[name], goal, corpus, shape, setting, extra[name]) for name in present},
        error_ratio=lambda name: model_error_ratio(present[OURS][0], shape) if name == OURS else None,
        absent=absent, extra=extra, reports_seconds=True, min_rounds=3,
    )  # fmt: skip


def _trainer(
    make: Callable[[], Model], goal: Goal, corpus: Corpus, shape: ModelShape, setting: Setting, extra: dict
) -> Callable[[], float]:
    """Trains a new model at each call and returns the seconds that its steps took."""
    seeds = itertools.count(1)
    cfg = TrainConfig(**preset(goal.preset)[1])
    blocks = evaluation_blocks(corpus.val, shape.T, EVAL_BATCHES * cfg.batch_size)

    def train() -> float:
        seed = next(seeds)
        torch.manual_seed(seed)
        model, loss = make()
        optimizer, precision = make_optimizer(model, cfg), measured_precision(setting)
        seconds, done = 0.0, 0
        while done < cfg.max_steps:
            todo = range(done, min(done + EVAL_INTERVAL, cfg.max_steps))
            _synchronize(setting.device)
            start = time.perf_counter()
            for step in todo:
                batch = tuple(t.to(setting.device) for t in random_batch(corpus.train, shape.T, shape.B, seed, step))
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
