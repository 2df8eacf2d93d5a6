"""What a run of `fastgpt train` takes beyond its steps: drawing batches, writing metrics, evaluating, saving.

FastGPT's row is the time of a step in a run of a preset, as `elapsed_s` in its metrics.jsonl has it. It is compared
with "steps alone": the same model and optimizer on the same batches, which were all cut beforehand, and nothing else.
What the run takes besides is told in shares of the whole time, at the preset's intervals.
"""

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest

from fastgpt.benchmarks.harness.accuracy import model_error_ratio
from fastgpt.benchmarks.harness.models import ModelShape, fastgpt_model
from fastgpt.benchmarks.harness.suite import OURS, Setting, Work
from fastgpt.config import GPTConfig, TrainConfig, preset
from fastgpt.data.corpus import Corpus
from fastgpt.data.prefetch import Prefetcher
from fastgpt.data.sources import DataError
from fastgpt.training import loop
from fastgpt.training.runs import start

ALONE = "steps alone"
# What is timed, by the method of `loop.Trainer` that does it.
PARTS = {"evaluate": "evaluation", "_save": "checkpoint", "_write": "metrics"}


@dataclass(frozen=True)
class ShortRun:
    """The first steps of a preset."""

    preset: str
    steps: int

    def __str__(self) -> str:
        return f"{self.preset}, {self.steps} steps"


@pytest.mark.shapes(cpu=[ShortRun("shakespeare-char-cpu", 250)], cuda=[])
def bench_training_loop(run_work, setting, suite, shape):
    run = replace(shape, steps=50) if setting.quick else shape
    try:
        corpus = Corpus.load(setting.data)
    except DataError as reason:
        suite.absent["training_loop"] = {OURS: str(reason)}
        pytest.skip(str(reason))
    run_work(training_loop_work(setting, run, corpus))


def training_loop_work(setting: Setting, run: ShortRun, corpus: Corpus) -> Work:
    model_settings, train_settings = preset(run.preset)
    config = GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **model_settings)
    whole = TrainConfig(**train_settings | {"device": setting.device.type})
    cfg = replace(whole, max_steps=run.steps, warmup_steps=min(whole.warmup_steps, run.steps))
    extra: dict[str, dict] = {OURS: {}}
    sizes = config.block_size, config.n_layer, config.n_head, config.n_embd, config.vocab_size

    def whole_run() -> float:
        with TemporaryDirectory() as out, timed_parts() as (seconds, calls):
            trainer = start(out, config=config, train_config=cfg, corpus=corpus)
            step_s = trainer.run()["elapsed_s"] / run.steps
        extra[OURS].update(shares(seconds, calls, step_s, whole))
        return step_s

    def steps_alone() -> float:
        with TemporaryDirectory() as out:
            trainer = start(out, config=config, train_config=cfg, corpus=corpus)
            examples = corpus.examples("train", config.block_size)
            n = cfg.grad_accum
            batches = [examples.batch(cfg.batch_size, cfg.seed, i) for i in range(run.steps * n)]
            begin = time.perf_counter()
            for step in range(run.steps):
                trainer.state["step"] = step  # from which the learning rate follows
                trainer._step(batches[step * n : (step + 1) * n])
            return (time.perf_counter() - begin) / run.steps

    return Work(
        op="training_loop", shape=f"{run} on {Path(setting.data).name}", direction="train", dtype=setting.dtype_name,
        contenders={OURS: whole_run, ALONE: steps_alone}, extra=extra, reports_seconds=True, min_rounds=3,
        error_ratio=lambda name: _error_ratio(ModelShape(cfg.batch_size, *sizes)) if name == OURS else None,
    )  # fmt: skip


def _error_ratio(shape: ModelShape) -> float:
    return model_error_ratio(fastgpt_model(shape)[0], shape)


@contextlib.contextmanager
def timed_parts() -> Iterator[tuple[Counter, Counter]]:
    """The seconds and the calls of PARTS and of waiting for a batch, in runs that are made within the context."""
    seconds: Counter = Counter()
    calls: Counter = Counter()

    def timed(method: Callable, part: str) -> Callable:
        @functools.wraps(method)
        def call(*args):
            begin = time.perf_counter()
            try:
                return method(*args)
            finally:
                seconds[part] += time.perf_counter() - begin
                calls[part] += 1

        return call

    with contextlib.ExitStack() as patched:
        for name, part in PARTS.items():
            patched.enter_context(patch.object(loop.Trainer, name, timed(getattr(loop.Trainer, name), part)))
        patched.enter_context(patch.object(Prefetcher, "__next__", timed(Prefetcher.__next__, "waiting")))
        yield seconds, calls


def shares(seconds: Counter, calls: Counter, step_s: float, cfg: TrainConfig) -> dict[str, float]:
    """Of the whole time of a run with the intervals of `cfg`. Each evaluation is of two parts of the data."""
    per_step = {
        "evaluation": 2 * seconds["evaluation"] / calls["evaluation"] / cfg.eval_interval,
        "checkpoint": seconds["checkpoint"] / calls["checkpoint"] / cfg.eval_interval,
        "metrics": seconds["metrics"] / calls["metrics"] / cfg.log_interval,
        "waiting": cfg.grad_accum * seconds["waiting"] / calls["waiting"],
    }
    whole = step_s + per_step["evaluation"] + per_step["checkpoint"]  # the others are within a step's time
    return {f"{part}_share": float(f"{value / whole:.2g}") for part, value in per_step.items()}
