"""nanoGPT's character recipe from beginning to end, as `fastgpt train` does it: how long it trains, and to which loss.

It takes minutes, so it runs only where it is asked for, by naming its text: --data tinyshakespeare, or a file of that
name. One run is one round: there is no spread, and nobody to compare with but the loss that nanoGPT's README gives.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from fastgpt.benchmarks.harness import peers
from fastgpt.benchmarks.harness.measure import ReportedClock
from fastgpt.benchmarks.harness.suite import OURS, Work, model_error_ratio
from fastgpt.config import preset
from fastgpt.training.run_folder import read_metrics

PRESETS = {"cpu": "shakespeare-char-cpu", "cuda": "shakespeare-char"}


def bench_recipe(bench, setting):
    if setting.quick or Path(setting.data or "").stem != "tinyshakespeare":
        pytest.skip("it takes minutes: ask for it by --data tinyshakespeare, without --quick")
    bench(work(PRESETS[setting.device.type], setting))


def work(name: str, setting) -> Work:
    model_settings, train_settings = preset(name)
    settings = {"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2} | model_settings
    B, T, V = train_settings["batch_size"], settings["block_size"], 65
    shape = peers.Shape(
        B=B, T=T, L=settings["n_layer"], H=settings["n_head"], C=settings["n_embd"], V=V, dropout=settings["dropout"]
    )
    few = tuple(torch.randint(V, (2, T), device=setting.device) for _ in range(2))
    extra: dict[str, float] = {}

    @functools.cache  # the suite calls every contender once before it is timed
    def train() -> float:
        with TemporaryDirectory() as out:
            options = ["--preset", name, "--data", setting.data, "--out", out, "--device", setting.device.type]
            subprocess.run([sys.executable, "-m", "fastgpt", "train", *options], check=True, capture_output=True)
            last = [row for row in read_metrics(Path(out) / "metrics.jsonl") if row["split"] == "val"][-1]
        extra.update(val_loss=round(last["loss"], 4), steps=last["step"])
        return last["elapsed_s"]

    return Work(
        op="recipe", shape=name, direction="train", dtype="float32" if setting.device.type == "cpu" else "bfloat16",
        contenders={OURS: train}, extra={OURS: extra}, clock=ReportedClock(),
        error_ratio=lambda _: model_error_ratio(peers.fastgpt_model(shape)[0].to(setting.device), *few),
        warmups=0, seconds=0.0, min_rounds=1, measure_memory=False,
    )  # fmt: skip
