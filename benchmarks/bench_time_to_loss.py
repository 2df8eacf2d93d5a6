"""Seconds of training until a validation loss is reached: nanoGPT's character recipe, by FastGPT and by nanoGPT.

Both see the same batches in the same order, the same learning rates, optimizer and clipping, and are evaluated on the
same blocks, every EVAL_INTERVAL steps. Only steps count; every round has another seed. The text is that of --data.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgpt.benchmarks.harness import peers
from fastgpt.benchmarks.harness.measure import ReportedClock
from fastgpt.benchmarks.harness.suite import OURS, Work, model_error_ratio
from fastgpt.config import TrainConfig, preset
from fastgpt.data.corpus import Corpus
from fastgpt.data.layouts import evaluation_blocks, random_batch
from fastgpt.data.sources import DataError
from fastgpt.training.step import learning_rate, make_optimizer, mean_loss, training_step

EVAL_INTERVAL = 25
EVAL_BATCHES = 10


@dataclasses.dataclass(frozen=True)
class Case:
    preset: str
    target: float  # nats per token, on the validation part

    def __str__(self) -> str:
        return f"{self.preset} to {self.target} nats"


CASES = {"cpu": [Case("shakespeare-char-cpu", 2.5)], "cuda": [Case("shakespeare-char", 1.8)]}


def bench_time_to_loss(bench, setting, suite, case):
    if setting.quick:
        case = dataclasses.replace(case, target=3.2)
    try:
        corpus = Corpus.load(setting.data)
    except DataError as reason:
        suite.absent["time_to_loss"] = {OURS: str(reason)}
        pytest.skip(str(reason))
    bench(work(case, setting, corpus))


def work(case: Case, setting, corpus: Corpus) -> Work:
    model_settings, train_settings = preset(case.preset)
    cfg = TrainConfig(**train_settings)
    defaults = {"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384} | model_settings
    shape = peers.Shape(
        B=cfg.batch_size, T=defaults["block_size"], L=defaults["n_layer"], H=defaults["n_head"], C=defaults["n_embd"],
        V=corpus.tokenizer.vocab_size, dropout=defaults["dropout"],
    )  # fmt: skip
    device, extra = setting.device, {}
    makers = {
        OURS: lambda: peers.fastgpt_model(shape),
        "nanoGPT": lambda: peers.nanogpt(shape, setting.nanogpt),
    }
    contenders, absent = {}, {}
    for name, make in makers.items():
        try:
            make()
        except peers.Absent as reason:
            absent[name] = str(reason)
            continue
        extra[name] = {}
        contenders[name] = _train(make, corpus, cfg, shape.T, case.target, device, extra[name])
    few = tuple(torch.randint(shape.V, (2, shape.T), device=device) for _ in range(2))
    return Work(
        op="time_to_loss", shape=f"{case} on {Path(setting.data).name}", direction="train",
        dtype="float32" if device.type == "cpu" else "bfloat16", contenders=contenders, absent=absent,
        error_ratio=lambda name: model_error_ratio(makers[OURS]()[0].to(device), *few) if name == OURS else None,
        extra=extra, clock=ReportedClock(), warmups=0, seconds=0.0, min_rounds=3, measure_memory=False,
    )  # fmt: skip


def _train(make, corpus, cfg: TrainConfig, T: int, target: float, device, extra: dict) -> Callable[[], float]:
    seeds = itertools.count(1)
    blocks = evaluation_blocks(corpus.val, T, EVAL_BATCHES * cfg.batch_size)

    def train() -> float:
        seed = next(seeds)
        torch.manual_seed(seed)
        model, loss = make()
        model.to(device)
        optimizer, precision = make_optimizer(model, cfg), peers.measured_precision(device)
        seconds, step = 0.0, 0
        while True:
            _synchronize(device)
            start = time.perf_counter()
            for step in range(step, min(step + EVAL_INTERVAL, cfg.max_steps)):  # noqa: B020
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, cfg)
                x, y = (t.to(device) for t in random_batch(corpus.train, T, cfg.batch_size, seed, step))
                training_step(model, loss, optimizer, [(x, y)], precision, cfg.grad_clip)
            _synchronize(device)
            seconds += time.perf_counter() - start
            step += 1
            model.eval()
            val_loss = mean_loss(loss, *blocks, cfg.batch_size, precision)
            model.train()
            if val_loss <= target:
                extra.update(val_loss=round(val_loss, 4), steps=step)
                return seconds
            if step >= cfg.max_steps:
                raise RuntimeError(f"the loss is {val_loss:.3f} after {step} steps, and {target} was to be reached")

    return train


def _synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
