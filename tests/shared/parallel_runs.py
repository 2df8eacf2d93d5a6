"""Runs of several processes, for tests/training/test_parallel.py and others."""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch

from fastgpt import GPTConfig
from fastgpt.baselines import build_model
from fastgpt.config import TrainConfig
from fastgpt.data.corpus import Corpus
from fastgpt.training import runs
from fastgpt.training.loop import Interrupted
from fastgpt.training.parallel import parallel_loss
from fastgpt.training.processes import Processes
from fastgpt.training.step import Precision, make_optimizer, training_step
from small_runs import MODEL

# What is trained: the layout, whose targets are uneven in names, and what differs from TRAIN.
CASES: dict[str, dict[str, Any]] = {
    "blocks": {},
    "names, uneven": {"layout": "names"},
    "blocks, accumulated": {"grad_accum": 2, "optimizer": "muon", "dropout": 0.2},
    "names, accumulated": {"layout": "names", "grad_accum": 2, "dropout": 0.2},
}
TRAIN = {"batch_size": 8, "max_steps": 30, "eval_interval": 15, "eval_batches": 2, "log_interval": 1, "warmup_steps": 2}


def losses(
    rank: int, n: int, files: dict[str, str], out: str, names: list[str], parallel: str = "auto"
) -> dict[str, list[float]]:
    """The losses of the runs called `names`, in order, of training and of evaluation, as this process knows them."""
    found = {}
    for name in names:
        changes = dict(CASES[name])
        model = MODEL | {"dropout": changes.pop("dropout", 0.0)}
        cfg = TrainConfig(**TRAIN, device="cpu", parallel=parallel, **changes)
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


def sharded(rank: int, n: int, dtype: str) -> dict[str, Any]:
    """What FSDP2 leaves in this process after one backward pass: what differs from the whole model's, and the parts."""
    cfg, precision = TrainConfig(device="cpu", dtype=dtype, parallel="fsdp"), Precision(torch.device("cpu"), dtype)
    processes, config = Processes(rank, n), GPTConfig(vocab_size=11, **(MODEL | {"dropout": 0.0}))
    tokens = torch.randint(11, (4, config.block_size + 1), generator=torch.Generator().manual_seed(1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    whole = build_model(config, 1)
    with precision.autocast():
        expected = whole.loss(x, y)
    expected.backward()
    model = build_model(config, 1)
    loss = parallel_loss(model, cfg, processes, precision)
    seen: dict[str, set[torch.dtype]] = {"stream": set(), "weight": set()}

    def see(block: Any, inputs: Any) -> None:
        seen["stream"].add(inputs[0].dtype)
        seen["weight"].add(block.attn.qkv.weight.dtype)

    for block in model.blocks:
        block.register_forward_pre_hook(see)
    with precision.autocast():
        value = loss(x[processes.rows(4)], y[processes.rows(4)])
    value.backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    error = max(float((grads[name] - p.grad).norm() / p.grad.norm()) for name, p in whole.named_parameters())
    return {
        "loss": abs(float(processes.sum(value.detach()) / n - expected)),
        "error": error,
        "share": sum(p.to_local().numel() for p in model.parameters()) / whole.num_parameters(),
        "same names": [name for name, _ in model.named_parameters()] == [name for name, _ in whole.named_parameters()],
        "seen": {name: [str(dtype) for dtype in dtypes] for name, dtypes in seen.items()},
    }


def between_micro_batches(rank: int, n: int) -> float:
    """The share of a model's gradients that this process holds when the second micro-batch of a step begins.

    The model's first block gives back its input, of which PyTorch warns.
    """
    cfg, precision, processes = TrainConfig(parallel="fsdp"), Precision(torch.device("cpu")), Processes(rank, n)
    model = build_model(GPTConfig(vocab_size=11, feed_forward=False, **MODEL), 1)
    warnings.filterwarnings("error", message="FSDP2")
    loss = parallel_loss(model, cfg, processes, precision)
    n_held = []

    def see(module: Any, inputs: Any) -> None:
        n_held.append(sum(p.grad.to_local().numel() for p in model.parameters() if p.grad is not None))

    loss.register_forward_pre_hook(see)
    x = torch.zeros(2, 4, dtype=torch.int64)
    training_step(model, loss, make_optimizer(model, cfg), [(x, x), (x, x)], precision, 1.0, processes=processes)
    return n_held[1] / model.num_parameters()
