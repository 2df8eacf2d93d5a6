"""What a run says: what will be trained, how long it will take, and how it goes.

On a terminal there is a bar. Elsewhere, as in a file or a notebook, each logged interval has a line. Both show the
loss, tokens per second, the time left, and the memory that this process takes.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from ..config import TrainConfig
from ..machine import memory_in_use
from ..ops import backend
from ..report import counted

if TYPE_CHECKING:
    from .loop import Trainer


class Progress:
    """Shows the steps of a run on `device` that is at `step`. `lines` off leaves out the line of each interval."""

    def __init__(self, cfg: TrainConfig, step: int, lines: bool = True, device: torch.device | None = None) -> None:
        from tqdm import tqdm

        on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        self.bar = tqdm(total=cfg.max_steps, initial=step, disable=not on_terminal, dynamic_ncols=True, bar_format=_BAR)
        self.cfg, self._device = cfg, device or torch.device("cpu")
        self._lines = lines and not on_terminal
        self._is_estimated = not lines
        self._step_s: float | None = None  # seconds of training that a step takes, mostly by the last intervals
        self._evaluation_s = 0.0  # and of the last evaluation

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def interval(self, step: int, n_steps: int, loss: float, tokens_per_s: float, elapsed_s: float) -> None:
        """Tell of the `n_steps` up to `step`, which took `elapsed_s` seconds, and once how long the rest will take."""
        seconds, left = elapsed_s / n_steps, self.cfg.max_steps - step
        self._step_s = seconds if self._step_s is None else 0.7 * self._step_s + 0.3 * seconds
        has_line = self._lines and step % self.cfg.log_interval == 0
        if has_line or not self.bar.disable:
            memory = memory_in_use(self._device)
            parts = [f"{tokens_per_s:,.0f} tokens/s", f"{self._time_left(step)} left" if left else "", size(memory)]
            rest = ", ".join(filter(None, parts))
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rest}", refresh=False)
        if has_line:
            self.say(f"step {step}: loss {loss:.4f}, {rest}")
        if not self._is_estimated and left:
            self._is_estimated = True
            pace = f"{1000 * seconds:,.0f} ms a step"
            self.say(f"{counted(left, 'step')} to go, {self._time_left(step)} at {pace}")

    def evaluated(self, seconds: float) -> None:
        """Take into account that an evaluation, and the checkpoint after it, took so long."""
        self._evaluation_s = seconds

    def _time_left(self, step: int) -> str:
        """How long the steps and the evaluations after `step` will take."""
        last, every = self.cfg.max_steps, self.cfg.eval_interval
        evaluations = last // every - step // every + (last % every != 0)
        return duration((last - step) * (self._step_s or 0.0) + evaluations * self._evaluation_s)


_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"  # tqdm's own time left counts evaluations as slow steps


def size(n_bytes: int | None) -> str:
    """Memory in MB or GB; nothing where it is not known."""
    if n_bytes is None:
        return ""
    return f"{n_bytes / 1e6:,.0f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:,.1f} GB"


def duration(seconds: float) -> str:
    """A time in the unit that a reader would choose: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"about {max(seconds, 1):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 90 * 60 else f"about {seconds / 3600:.1f} h"


def first_lines(trainer: Trainer, settings: str, source: str) -> list[str]:
    """What is trained, from which settings, on which text, on what, and how long. `source` is the name of the text."""
    model, cfg, corpus, device = trainer.model, trainer.cfg, trainer.corpus, trainer.device
    shape = model.cfg
    layers = "" if model.kind.endswith("bigram") else f"{counted(shape.n_layer, 'layer')}, width {shape.n_embd}, "
    several = trainer.processes.size > 1
    threads = f", {counted(torch.get_num_threads(), 'thread')}{' each' * several}" if device.type == "cpu" else ""
    way = "FSDP2" if cfg.parallel == "fsdp" else "DDP"
    processes = f", {trainer.processes.size} processes by {way}" if several else ""
    examples, rows = corpus.examples("train", shape.block_size), cfg.batch_size * cfg.grad_accum
    tokens = rows * examples.row_size
    epochs = f"; {examples.epoch_size / rows:,.1f} steps are an epoch" if cfg.order == "epochs" else ""
    return [
        f"model: {model.kind} of {model.num_parameters():,} parameters, {layers}block {shape.block_size} ({settings})",
        f"data: {source}, {len(corpus.train):,} tokens to train on, {len(corpus.val):,} to validate, "
        f"vocabulary of {corpus.tokenizer.vocab_size:,}",
        f"device: {device}{processes}{threads}, {trainer.precision.name}; {backends(device.type)}",
        f"steps: {cfg.max_steps:,}, each of {tokens:,} tokens, with an evaluation every {cfg.eval_interval:,}{epochs}",
    ]


def backends(device_type: str) -> str:
    """In a phrase, which backends most calls of the ops take on a kind of device."""
    taken = Counter(backend.usual(op, device_type) for op in backend.OPS)
    if set(taken) == {"torch"}:
        return "every op by PyTorch (fastgpt doctor says why)"
    return "ops: " + ", ".join(f"{n} by {'PyTorch' if name == 'torch' else name}" for name, n in taken.most_common())
