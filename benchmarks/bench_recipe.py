"""The recipe of a preset, as `fastgpt train` runs it: how long it trains, and to which loss.

The preset for a CPU runs to its end. That for a GPU, which is nanoGPT's character recipe, runs until the validation
loss is the one that nanoGPT's README names.

The run takes place in this process. Its time is `elapsed_s` of its metrics.jsonl: the training steps and the drawing of
their batches, without start-up, evaluation, checkpoints and the picture of the loss. One run is one round: it has no
spread, and only the loss in nanoGPT's README to compare with.

It takes minutes, so it runs only where its text is asked for by name: --data tinyshakespeare, or a file of that name.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import pytest

from fastgpt.benchmarks.harness.accuracy import model_error_ratio
from fastgpt.benchmarks.harness.models import ModelShape, fastgpt_model
from fastgpt.benchmarks.harness.suite import OURS, Setting, Work
from fastgpt.config import GPTConfig, TrainConfig, preset
from fastgpt.data.corpus import Corpus
from fastgpt.training.run_folder import read_metrics
from fastgpt.training.runs import start


@dataclass(frozen=True)
class Recipe:
    """A preset, trained to its end, or until the validation loss is `loss`, in nats per token."""

    preset: str
    loss: float | None = None
    graphed: bool = False  # each step is a CUDA graph
    is_tiny: bool = False  # one thin block and two steps, for a rehearsal

    def __str__(self) -> str:
        goal = "" if self.loss is None else f" to {self.loss} nats"
        return self.preset + goal + (", CUDA graph" if self.graphed else "")

    def tiny(self) -> Self:
        return replace(self, is_tiny=True)

    def configs(self, vocab_size: int, device: str) -> tuple[GPTConfig, TrainConfig]:
        model, train = preset(self.preset)
        if self.is_tiny:
            model = model | {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16}
            train = train | {"max_steps": 2, "eval_batches": 1, "batch_size": 2}
        graph = self.graphed and not self.is_tiny
        return (
            GPTConfig(vocab_size=vocab_size, **model),
            TrainConfig(**train | {"device": device, "target_loss": self.loss, "cuda_graph": graph}),
        )


GPU_RECIPES = [Recipe("shakespeare-char", 1.4697, graphed=True), Recipe("shakespeare-char", 1.4697)]


@pytest.mark.shapes(cpu=[Recipe("shakespeare-char-cpu")], cuda=GPU_RECIPES)
def bench_recipe(run_work, setting, shape):
    if setting.quick or Path(setting.data).stem != "tinyshakespeare":
        pytest.skip("it takes minutes: ask for it by --data tinyshakespeare, without --quick")
    run_work(recipe_work(setting, shape, Corpus.load(setting.data)))


def recipe_work(setting: Setting, recipe: Recipe, corpus: Corpus) -> Work:
    config, train_config = recipe.configs(corpus.tokenizer.vocab_size, setting.device.type)
    extra: dict[str, float] = {}

    def train() -> float:
        """Seconds of training, as metrics.jsonl counts them: without evaluation."""
        with TemporaryDirectory() as out, warnings.catch_warnings():
            # A run whose steps no graph takes is not measured as one with a graph.
            warnings.filterwarnings("error", message="fastgpt: training goes on without a CUDA graph")
            start(out, config=config, train_config=train_config, corpus=corpus).run()
            last = [row for row in read_metrics(Path(out) / "metrics.jsonl") if row["split"] == "val"][-1]
        extra.update(val_loss=round(last["loss"], 4), steps=last["step"])
        return last["elapsed_s"]

    sizes = config.block_size, config.n_layer, config.n_head, config.n_embd, config.vocab_size
    shape = ModelShape(train_config.batch_size, *sizes, config.dropout)
    return Work(
        op="recipe", shape=str(recipe), direction="train", dtype=setting.dtype_name, contenders={OURS: train},
        error_ratio=lambda _: model_error_ratio(fastgpt_model(shape)[0].to(setting.device), shape),
        extra={OURS: extra}, reports_seconds=True, min_rounds=1,
    )  # fmt: skip
