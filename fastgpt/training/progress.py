"""What a run says: what will be trained, how long it will take, and how it goes.

On a terminal a bar shows the last step. Elsewhere, as in a file or a notebook, each logged interval has a line.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from ..config import TrainConfig
from ..ops import backend

if TYPE_CHECKING:
    from .loop import Trainer


class Progress:
    """Shows the steps of a run that is at step `step`. `lines` off leaves out the line of each interval."""

    def __init__(self, cfg: TrainConfig, step: int, lines: bool = True) -> None:
        from tqdm import tqdm

        on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        self.bar = tqdm(total=cfg.max_steps, initial=step, unit="step", disable=not on_terminal, dynamic_ncols=True)
        self.cfg = cfg
        self._lines = lines and not on_terminal
        self._is_estimated = not lines

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
        self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
        if self._lines and step % self.cfg.log_interval == 0:
            self.say(f"step {step}: loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s")
        left = self.cfg.max_steps - step
        if not self._is_estimated and left:
            self._is_estimated = True
            seconds = elapsed_s / n_steps
            self.say(f"{_counted(left, 'step')} to go, {duration(left * seconds)} at {1000 * seconds:,.0f} ms a step")


def duration(seconds: float) -> str:
    """A time in the unit that a reader would choose: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"about {max(seconds, 1):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 90 * 60 else f"about {seconds / 3600:.1f} h"


def _counted(n: int, noun: str) -> str:
    """ "1 layer", "4 layers"."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def first_lines(trainer: Trainer, settings: str, source: str) -> list[str]:
    """What is trained, from which settings, on which text, on what, and how long. `source` is the name of the text."""
    model, cfg, corpus, device = trainer.model, trainer.cfg, trainer.corpus, trainer.device
    shape = model.cfg
    layers = "" if model.kind.endswith("bigram") else f"{_counted(shape.n_layer, 'layer')}, width {shape.n_embd}, "
    several = trainer.processes.size > 1
    threads = f", {_counted(torch.get_num_threads(), 'thread')}{' each' * several}" if device.type == "cpu" else ""
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
