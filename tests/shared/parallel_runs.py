"""Runs of several processes, for tests/training/test_parallel.py and others."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from fastgpt import GPTConfig
from fastgpt.config import TrainConfig
from fastgpt.data.corpus import Corpus
from fastgpt.training import runs
from fastgpt.training.loop import Interrupted
from fastgpt.training.processes import Processes
from small_runs import MODEL

# What is trained: the layout, whose targets are uneven in names, and what differs from TRAIN.
CASES: dict[str, dict[str, Any]] = {
    "blocks": {},
    "names, uneven": {"layout": "names"},
    "blocks, accumulated": {"grad_accum": 2, "optimizer": "muon", "dropout": 0.2},
    "names, accumulated": {"layout": "names", "grad_accum": 2, "dropout": 0.2},
}
TRAIN = {"batch_size": 8, "max_steps": 30, "eval_interval": 15, "eval_batches": 2, "log_interval": 1, "warmup_steps": 2}


def losses(rank: int, n: int, files: dict[str, str], out: str, names: list[str]) -> dict[str, list[float]]:
    """The losses of the runs called `names`, in order, of training and of evaluation, as this process knows them."""
    found = {}
    for name in names:
        changes = dict(CASES[name])
        model = MODEL | {"dropout": changes.pop("dropout", 0.0)}
        cfg = TrainConfig(**TRAIN, device="cpu", **changes)
        corpus = Corpus.load(files[cfg.layout], "char", block_size=16, layout=cfg.layout)
        config = GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **model)
        folder = Path(out) / name
        trainer = runs.start(folder, config=config, train_config=cfg, corpus=corpus, processes=Processes(rank, n))
        trainer.run(lines=False)
        found[name] = [trainer.state["best_val"], trainer.evaluate("train")]
    return found


def written(out: Path, name: str) -> list[float]:
    """The losses in the metrics of a run."""
    rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


def signalled(rank: int, n: int, files: dict[str, str], out: str) -> tuple[str, int]:
    """What a run says when SIGTERM reaches its last process in step 5, and the step of its checkpoint."""
    corpus = Corpus.load(files["blocks"], "char", block_size=16)
    config = GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **MODEL)
    cfg, processes = TrainConfig(**TRAIN, device="cpu"), Processes(rank, n)
    trainer = runs.start(out, config=config, train_config=cfg, corpus=corpus, processes=processes)
    take = trainer._step

    def take_then_signal(micro_batches: Any) -> Any:
        if rank == n - 1 and trainer.state["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(micro_batches)

    trainer._step = take_then_signal  # type: ignore[method-assign]
    try:
        trainer.run(lines=False)
    except Interrupted as error:
        return str(error), runs.load_latest(out).state["step"]
    return "not interrupted", 0
