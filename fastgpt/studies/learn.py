"""`fastgpt learn`: from the bigram to the GPT, one idea at a time, each trained and measured with the same budget.

The text, the seed, the number of steps, the tokens in a step, the optimizer and its schedule are the same for all
stages. The learning rate is the same too, except in the last stage, because a larger model needs a smaller rate.
results.json holds the measurements; `learn_page` makes the report from them and from the source.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import ConfigError, GPTConfig, TrainConfig
from ..data.corpus import Corpus
from ..data.shards import Tokens, pieces
from ..files import make_output_folder
from ..plots import need_matplotlib
from ..report import markdown_table
from ..settings import absolute
from ..training import TrainingError
from ..training.loop import Trainer
from ..training.run_folder import HOW_TO_GO_ON, RunFolder, read_metrics
from ..training.runs import load_latest, resume, start
from . import write_results
from .experiment import at_least, recorded, study_facts
from .learn_page import HEADERS, findings, learn_report, preview_note, table_rows
from .page import duration, filled, terminal_width
from .settings import LearnSettings
from .stages import STAGES, Stage, code_of, config_of

TOKENS_PER_STEP = 1024
LARGEST_LR_SCALED_UP = 3e-3
SAMPLE_TOKENS = 240


def run(settings: LearnSettings) -> Path:
    """Train all stages, write results.json, report.html and the pictures; returns the report's path."""
    # These two fail where the report could not be written; better now than after minutes of training.
    need_matplotlib()
    code = {stage.name: code_of(stage) for stage in STAGES}
    out = Path(settings.out)
    if not settings.resume and ((out / "results.json").exists() or RunFolder(out).has_begun()):
        raise TrainingError(f"{out}: already holds a run; {HOW_TO_GO_ON}")
    began = time.perf_counter()
    results = {**study_facts(settings.device), **measure(settings, out)}
    results["seconds"] = round(time.perf_counter() - began, 1)
    write_results(out, results)
    said = [preview_note(results)] if settings.quick else []
    said += [markdown_table(HEADERS, table_rows(results)), *findings(results)]
    width = terminal_width() or 120
    print("\n" + "\n\n".join(part if part.startswith("|") else filled(part, width) for part in said))
    report = learn_report(results, code).write(out)
    print(f"\n{report}: {duration(results['seconds'])} in all")
    return report


def measure(settings: LearnSettings, out: Path) -> dict[str, Any]:
    """Train every stage into a folder of `out`; returns plain data, which results.json keeps."""
    at_least(settings, steps=1)
    if settings.lr <= 0.0:
        raise ConfigError(f"lr: expected a number above 0, got {settings.lr}")
    configs = [config_of(stage, 1) for stage in STAGES]
    train_configs = [train_config_of(settings, stage, cfg) for stage, cfg in zip(STAGES, configs, strict=True)]
    corpus = Corpus.load(settings.data, block_size=max(cfg.block_size for cfg in configs))
    stored = {name: value for name, value in dataclasses.asdict(settings).items() if name not in ("config", "resume")}
    make_output_folder(out)
    RunFolder(out).write_settings(stored | {"data": absolute(settings.data)})
    results: dict[str, Any] = {
        "settings": recorded(settings),
        "tokens_per_step": TOKENS_PER_STEP,
        "characters": corpus.tokenizer.vocab_size,
        "training_tokens": len(corpus.train),
        "counted_bigram": counted_bigram(corpus),
        "stages": [],
    }
    for number, (stage, train_config) in enumerate(zip(STAGES, train_configs, strict=True), 1):
        print(f"stage {number} of {len(STAGES)}: {stage.name}", flush=True)
        row = _train_stage(stage, train_config, corpus, out)
        print(f"validation loss {row['loss']:.3f} after {duration(row['seconds'])} of training", flush=True)
        results["stages"].append(row)
    return results


def train_config_of(settings: LearnSettings, stage: Stage, cfg: GPTConfig) -> TrainConfig:
    """How a stage is trained. Every stage has the same number of tokens in a step, however long its blocks are."""
    lr = min(settings.lr, LARGEST_LR_SCALED_UP) if stage.name == "scaled up" else settings.lr
    return TrainConfig(
        batch_size=TOKENS_PER_STEP // cfg.block_size,
        max_steps=settings.steps,
        lr=lr,
        min_lr=lr / 10,
        warmup_steps=min(100, settings.steps // 10),
        eval_interval=max(settings.steps // 10, 1),
        seed=settings.seed,
        device=settings.device,
        dtype="float32",
    )


def _folder_name(stage: Stage) -> str:
    return "-".join(stage.name.replace("+", "").replace(",", "").split())


def _train_stage(stage: Stage, train_config: TrainConfig, corpus: Corpus, out: Path) -> dict[str, Any]:
    """Train a stage in its folder in `out`, or go on where a run in it has stopped."""
    folder = out / "stages" / _folder_name(stage)
    cfg = config_of(stage, corpus.tokenizer.vocab_size)
    run: dict[str, Any] = {"config": cfg, "train_config": train_config, "corpus": corpus, "kind": stage.model}
    run["resume_command"] = f"fastgpt learn --out {shlex.quote(str(out))} --resume"
    has_begun = RunFolder(folder).latest.exists()
    trainer = resume(folder, load_latest(folder), **run) if has_begun else start(folder, **run)
    state = trainer.run(lines=False)
    metrics = read_metrics(trainer.folder.metrics_path)
    curve = [[row["step"], round(row["loss"], 4)] for row in metrics if row["split"] == "val"]
    return {
        "name": stage.name,
        "model": stage.model,
        "config": dataclasses.asdict(cfg),
        "batch_size": train_config.batch_size,
        "lr": train_config.lr,
        "parameters": trainer.model.num_parameters(),
        "loss": curve[-1][1],
        "seconds": round(state["elapsed_s"], 1),
        "curve": curve,
        "sample": _sample(trainer, corpus, train_config.seed),
    }


def _sample(trainer: Trainer, corpus: Corpus, seed: int) -> str:
    """Text that the trained model writes, from the start of a line on."""
    try:
        first = corpus.tokenizer.encode("\n")
    except ValueError:  # a text of one line has no line break among its characters
        first = [int(corpus.train[0])]
    idx = torch.tensor([first], device=trainer.device)
    generator = torch.Generator(trainer.device).manual_seed(seed)
    out = trainer.model.generate(idx, SAMPLE_TOKENS, temperature=0.8, generator=generator)
    return corpus.tokenizer.decode(out[0, 1:])


def counted_bigram(corpus: Corpus) -> float:
    """The validation loss of a bigram made by counting pairs in the training text, with one added to each count.

    A trained bigram cannot be much better than that.
    """
    V = corpus.tokenizer.vocab_size
    counts = np.ones((V, V))
    for before, after in _neighbours(corpus.train):
        np.add.at(counts, (before, after), 1)
    log_p = np.log(counts / counts.sum(axis=1, keepdims=True))
    nats = sum(-log_p[before, after].sum() for before, after in _neighbours(corpus.val))
    return round(float(nats / (len(corpus.val) - 1)), 4)


def _neighbours(tokens: Tokens) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each token and the one after it, about a million at a time."""
    return zip(pieces(tokens[:-1]), pieces(tokens[1:]), strict=True)
