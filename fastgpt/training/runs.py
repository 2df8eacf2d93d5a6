"""Starting a run and resuming it: what `fastgpt train` and `learn` share.

trainer = start("runs/first", config=GPTConfig(vocab_size=65), train_config=TrainConfig(), corpus=corpus)
trainer.run()
model, tokenizer = fastgpt.load("runs/first")
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ..baselines import build_model
from ..checkpoint import Checkpoint, CheckpointError, newest
from ..config import GPTConfig, TrainConfig
from ..data.corpus import Corpus
from ..language_model import LanguageModel
from ..settings import flag
from .loop import Trainer
from .processes import ALONE, Processes
from .run_folder import RunFolder


def start(
    out: str | Path,
    *,
    config: GPTConfig,
    train_config: TrainConfig,
    corpus: Corpus,
    kind: str = "gpt",
    settings: dict[str, Any] | None = None,
    resume_command: str = "",
    initial: LanguageModel | None = None,
    processes: Processes = ALONE,
    again: bool = False,
) -> Trainer:
    """Create the folder `out` and a trainer of a new model, or of `initial`, ready to `run()`.

    `kind` is a name in `baselines.MODELS`; the weights follow from train_config.seed. `settings` is what config.toml
    records; without it, the kind and both configurations. `resume_command` is shown where the run is interrupted.
    `initial` is a model that is trained further (see `initial.py`): `config` and `kind` are then its own.
    Of several `processes` each calls this; the first creates the folder. `again` says that they have begun this run
    before and left no checkpoint: what they have written is dropped.
    Raises TrainingError where the folder already holds a run, and FileError where it cannot be written.
    """
    folder = RunFolder(Path(out))
    processes.rows(train_config.batch_size)  # refused before anything is written
    if processes.is_first:
        if again:
            folder.rewind(0)
        folder.create(_recorded(kind, config, train_config) if settings is None else settings)
    if initial is None:
        initial = build_model(config, train_config.seed, kind)
    else:
        torch.manual_seed(train_config.seed)  # of dropout, as `build_model` does
    return Trainer(initial, corpus, train_config, folder, resume_command, processes)


def resume(
    out: str | Path,
    saved: Checkpoint,
    *,
    config: GPTConfig,
    train_config: TrainConfig,
    corpus: Corpus,
    kind: str = "gpt",
    settings: dict[str, Any] | None = None,
    resume_command: str = "",
    processes: Processes = ALONE,
) -> Trainer:
    """A trainer that goes on with the run in `out` from `saved`, which `load_latest(out)` gave, ready to `run()`.

    The other arguments are those of `start`. The model, its settings, the layout, the order of the data and the
    optimizer must be those of the run, and in the order "epochs" also the seed and the size of a batch; what else
    differs from the run so far is printed and recorded in config.toml. Raises CheckpointError, and changes nothing,
    where the checkpoint does not fit.
    """
    _check_unchanged(saved, kind, config, train_config)
    folder = RunFolder(Path(out))
    model = build_model(config, train_config.seed, kind)
    trainer = Trainer(model, corpus, train_config, folder, resume_command, processes)
    trainer.restore(saved)
    step = trainer.state["step"]
    settings = _recorded(kind, config, train_config) if settings is None else settings
    if processes.is_first:
        for line in _changes(folder.read_settings() | saved.train_config, settings, step):
            print(line)
        folder.rewind(step)
        folder.write_settings(settings)
    return trainer


def can_resume(out: str | Path) -> bool:
    """Whether the folder `out` holds a checkpoint to resume from."""
    return RunFolder(Path(out)).last_checkpoint() is not None


def load_latest(out: str | Path) -> Checkpoint:
    """The checkpoint from which the run in the folder `out` is resumed."""
    folder = RunFolder(Path(out))
    last = folder.last_checkpoint()
    if last is None:
        remedy = "give another --out" if folder.has_begun() else "leave --resume out"
        raise CheckpointError(f"{folder.latest}: no such checkpoint to resume from; {remedy} to start")
    newest(folder.checkpoints, "best")  # a damaged one is named now, and not when the run next saves
    return Checkpoint.load(last)


def _recorded(kind: str, config: GPTConfig, train_config: TrainConfig) -> dict[str, Any]:
    return {"model": kind, **dataclasses.asdict(config), **dataclasses.asdict(train_config)}


def _check_unchanged(saved: Checkpoint, kind: str, config: GPTConfig, train_config: TrainConfig) -> None:
    """A resumed run keeps its model, layout, order and optimizer. An older checkpoint lacks some: it has the defaults.

    In the order of epochs, the step says which examples come next for one seed and one size of a batch. With another,
    some examples of the epoch would come twice, and others not at all.
    """
    kept: tuple[str, ...] = ("layout", "optimizer", "order")
    if train_config.order == "epochs":
        kept += ("seed", "batch_size", "grad_accum")
    was = {"model": saved.model} | {name: saved.train_config.get(name, getattr(TrainConfig, name)) for name in kept}
    was |= dataclasses.asdict(saved.config())
    now = {"model": kind} | {name: getattr(train_config, name) for name in kept} | dataclasses.asdict(config)
    for name, value in now.items():
        if was[name] != value:
            raise CheckpointError(
                f"{saved.path}: field {name!r} is {was[name]!r}, not {value!r}: a resumed run keeps it; "
                f"leave {flag(name)} out, or start another run"
            )


def _changes(before: dict[str, Any], now: dict[str, Any], step: int) -> list[str]:
    """A line for each setting that a run resumed at `step` has changed."""
    lines = []
    for name, value in now.items():
        if name not in before or before[name] == value or name == "out":  # the folder may have moved
            continue
        note = ""
        if name == "max_steps":
            note = ", which the learning rate's schedule follows"
            if value < step:
                note = f", but step {step} is reached already: there is nothing to do"
        lines.append(f"{name}: {before[name]} -> {value}{note}")
    return lines
