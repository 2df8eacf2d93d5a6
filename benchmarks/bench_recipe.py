"""nanoGPT's character recipe from beginning to end, as `fastgpt train` runs it: how long it trains, and to which loss.

The run takes place in this process. Its time is `elapsed_s` of its metrics.jsonl: the training steps and the drawing of
their batches, without start-up, evaluation, checkpoints and the picture of the loss. One run is one round: it has no
spread, and only the loss in nanoGPT's README to compare with.

It takes minutes, so it runs only where its text is asked for by name: --data tinyshakespeare, or a file of that name.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from fastgpt.benchmarks.harness.accuracy import model_error_ratio
from fastgpt.benchmarks.harness.models import ModelShape, fastgpt_model
from fastgpt.benchmarks.harness.suite import OURS, Setting, Work
from fastgpt.config import GPTConfig, TrainConfig, preset
from fastgpt.data.corpus import Corpus
from fastgpt.training.run_folder import read_metrics
from fastgpt.training.runs import start


@pytest.mark.shapes(cpu=["shakespeare-char-cpu"], cuda=["shakespeare-char"])
def bench_recipe(run_work, setting, shape):
    if setting.quick or Path(setting.data).stem != "tinyshakespeare":
        pytest.skip("it takes minutes: ask for it by --data tinyshakespeare, without --quick")
    run_work(recipe_work(setting, shape, Corpus.load(setting.data)))


def recipe_work(setting: Setting, name: str, corpus: Corpus) -> Work:
    model_settings, train_settings = preset(name)
    extra: dict[str, float] = {}

    def train() -> float:
        """Seconds of training, as metrics.jsonl counts them: without evaluation."""
        config = GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **model_settings)
        train_config = TrainConfig(**train_settings, device=setting.device.type)
        with TemporaryDirectory() as out:
            start(out, config=config, train_config=train_config, corpus=corpus).run()
            last = [row for row in read_metrics(Path(out) / "metrics.jsonl") if row["split"] == "val"][-1]
        extra.update(val_loss=round(last["loss"], 4), steps=last["step"])
        return last["elapsed_s"]

    shape = ModelShape.of_preset(name, corpus.tokenizer.vocab_size)
    return Work(
        op="recipe", shape=name, direction="train", dtype=setting.dtype_name, contenders={OURS: train},
        error_ratio=lambda _: model_error_ratio(fastgpt_model(shape)[0].to(setting.device), shape),
        extra={OURS: extra}, reports_seconds=True, min_rounds=1,
    )  # fmt: skip
