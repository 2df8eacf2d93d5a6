"""The training loop: steps, evaluation, checkpoints, and a stop that loses nothing.

A run can be stopped anywhere and resumed to the same bits: the batch of step s follows from (seed, s) alone, and all
other state is in every checkpoint (snapshot.py).
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cuda_graph
from ..checkpoint import Checkpoint
from ..config import TrainConfig
from ..data.corpus import Corpus
from ..data.layouts import IGNORED, layout_class
from ..data.prefetch import Prefetcher
from ..language_model import LanguageModel
from ..machine import resolve_device
from ..model import GPT
from . import TrainingError, snapshot
from .graph import GraphedStep, is_graphed
from .loggers import Loggers
from .parallel import parallel_loss
from .processes import ALONE, Processes
from .profile import StepProfile
from .progress import Progress
from .run_folder import RunFolder, plot_loss
from .saving import saver
from .step import (
    Batch,
    Precision,
    check_checkpointing,
    count_targets,
    learning_rate,
    make_optimizer,
    mean_loss,
    training_step,
)

STEPS_CUT_AT_ONCE = 16  # on a CPU: the code that cuts batches has left the caches after a step, and is slow then


class Interrupted(TrainingError):
    """A signal stopped the run, after it was saved."""


class Trainer:
    """Trains `model` on `corpus` as `cfg` says, into `folder`."""

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        cfg: TrainConfig,
        folder: RunFolder,
        resume_command: str = "",
        processes: Processes = ALONE,
    ) -> None:
        if corpus.layout != cfg.layout:
            raise TrainingError(f"layout: the corpus was loaded as {corpus.layout!r}, the settings say {cfg.layout!r}")
        self.processes, self._rows = processes, processes.rows(cfg.batch_size)
        check_checkpointing(model, cfg)
        self.device = resolve_device(cfg.device)
        self.model = model.to(self.device)
        self.model.tokenizer, self.model.layout = corpus.tokenizer, corpus.layout
        if isinstance(model, GPT):
            model.activation_checkpointing = cfg.activation_checkpointing
        self.corpus, self.cfg, self.folder, self.resume_command = corpus, cfg, folder, resume_command
        self.state: dict[str, Any] = {"step": 0, "tokens": 0, "elapsed_s": 0.0, "best_val": None}
        self.precision = Precision(self.device, cfg.dtype)
        self.loss = parallel_loss(self.model, cfg, processes, self.precision)
        self.optimizer = make_optimizer(self.model, cfg)  # of the parameters as they are now
        self._equal_targets = layout_class(cfg.layout).equal_targets
        self._saver = saver(folder, is_first=processes.is_first, is_alone=processes.size == 1)
        self._recorder = cuda_graph.recorder(self.device) if is_graphed(cfg, self.device.type, processes) else None
        self._take: Callable[[Sequence[Batch], float], Tensor] = self._take_eagerly
        self._signal = 0  # that this process has received; 0 for none
        self._stop = 0  # and that any process has received
        self.loggers = Loggers()  # these may be replaced before `run`
        self.profile: StepProfile | None = None

    def checkpoint(self) -> Checkpoint:
        """The state of the run as it is now; its tensors are the run's own."""
        return snapshot.take(self)

    def restore(self, saved: Checkpoint) -> None:
        """Take up where `saved` left off. Everything is checked before anything is changed: CheckpointError."""
        snapshot.restore(self, saved)

    def finished(self) -> str | None:
        """Where there is nothing left to do, what was reached and how to go on; else None."""
        step, best, cfg = self.state["step"], self.state["best_val"], self.cfg
        if 0 < step >= cfg.max_steps:
            return f"it has reached step {step} of --max-steps {cfg.max_steps}; a larger --max-steps goes on with it"
        if best is not None and cfg.target_loss is not None and best <= cfg.target_loss:
            return f"it has reached --target-loss {cfg.target_loss:g}; a lower --target-loss goes on with it"
        return None

    def run(self, *, lines: bool = True) -> dict[str, Any]:
        """Train to max_steps or target_loss; returns the final counters. Raises Interrupted or TrainingError.

        Where there is no terminal for a bar, `lines` prints a line for each interval of cfg.log_interval steps.
        """
        cfg, state = self.cfg, self.state
        if self._recorder is not None:  # a graph belongs to the tensors that it was recorded with
            self._take = GraphedStep(self._take_eagerly, self.model, self.optimizer, self.precision, self._recorder)
        with self._signals():
            self._progress = Progress(cfg, state["step"], lines, self.device)
            with self._progress, self._profile_closed(), self._batches() as batches:
                done = self._evaluate_and_save() if state["step"] == 0 else False
                while state["step"] < cfg.max_steps and not done:
                    done = self._interval(iter(batches))
                self._saver.wait()
                if state["step"] >= cfg.max_steps and self.processes.any(self.folder.last_checkpoint() is None):
                    self._save()
                    self._saver.wait()
        if self.processes.is_first:
            problem = plot_loss(self.folder.metrics_path, self.folder.path / "loss.png")
            if problem:
                print(problem)
        return dict(state)

    def _batches(self) -> Prefetcher:
        """The micro-batches from the present step on, of this process's rows."""
        cfg, on_cpu = self.cfg, self.device.type == "cpu"
        return Prefetcher(
            self.corpus.examples("train", self.model.cfg.block_size),
            cfg.batch_size,
            cfg.seed,
            self.state["step"] * cfg.grad_accum,
            device=self.device,
            # The micro-batches of a step and one more ahead, or those of several steps.
            depth=cfg.grad_accum * STEPS_CUT_AT_ONCE if on_cpu else cfg.grad_accum + 1,
            threaded=not on_cpu,
            order=cfg.order,
            rows=self._rows,
        )

    def _interval(self, batches: Iterator[tuple[Tensor, Tensor]]) -> bool:
        """Train up to the next step whose loss is read, which waits for a GPU. Returns True when training is over."""
        cfg, state, processes = self.cfg, self.state, self.processes
        began = time.perf_counter()
        first = state["step"]
        end = min(
            first + cfg.log_interval - first % cfg.log_interval,
            first + cfg.eval_interval - first % cfg.eval_interval,
            cfg.max_steps,
        )
        losses, counts, tokens = [], [], 0
        while state["step"] < end and not self._stopped():
            with self._profiled():
                micro_batches = [next(batches) for _ in range(cfg.grad_accum)]
                losses.append(self._step(micro_batches))
            tokens += processes.size * sum(x.numel() for x, _ in micro_batches)
            if not self._equal_targets:
                counts.append(torch.stack([count_targets(y) for _, y in micro_batches]).sum())
            state["step"] += 1
            self._progress.bar.update(1)
        values = (processes.sum(torch.stack(losses)) / processes.size).tolist() if losses else []
        elapsed = time.perf_counter() - began
        if self.profile is not None and self.profile.is_complete():
            self._close_profile()  # now, when no time is taken
        self._check_losses(values, first)
        state["tokens"] += tokens
        state["elapsed_s"] += elapsed
        if values:
            weights = processes.sum(torch.stack(counts)).tolist() if counts else [1] * len(values)
            loss = sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
            rate = _rate(tokens, elapsed)
            if state["step"] % cfg.log_interval == 0:
                self._write("train", loss, rate)
            self._progress.interval(state["step"], len(values), loss, rate, elapsed)
        has_moved = state["step"] > first  # else this step has been evaluated, if it was due, and saved
        is_due = has_moved and (state["step"] % cfg.eval_interval == 0 or state["step"] == cfg.max_steps)
        done = self._evaluate_and_save() if is_due else False
        if done or not self._stopped():
            return done
        if has_moved and not is_due:
            self._save()
        self._saver.wait()
        raise self._interrupted()

    def _profiled(self) -> contextlib.AbstractContextManager:
        """Around a step, whose batches belong to it."""
        if self.profile is None:
            return contextlib.nullcontext()
        return self.profile.step(self.state["step"] + 1)

    @contextlib.contextmanager
    def _profile_closed(self) -> Iterator[None]:
        """A run that is stopped amid the steps of its profile leaves a trace of those it has taken."""
        try:
            yield
        finally:
            self._close_profile()

    def _close_profile(self) -> None:
        for line in self.profile.close() if self.profile is not None else []:
            self._progress.say(line)

    def _stopped(self) -> bool:
        """Whether a signal has reached any of the processes, which then all stop at this step."""
        self._stop = self.processes.largest(self._signal)
        return self._stop != 0

    def _interrupted(self) -> Interrupted:
        name, saved = signal.Signals(self._stop).name, self.folder.last_checkpoint()
        hint = f" Resume with: {self.resume_command}" if self.resume_command else ""
        return Interrupted(f"{name}: stopped at step {self.state['step']} and saved {saved}.{hint}")

    def _check_losses(self, values: list[float], first: int) -> None:
        """Raise TrainingError for a loss that is not finite, or where float16 gradients overflow at any scale."""
        for step, value in enumerate(values, first + 1):
            if not math.isfinite(value):
                raise self._failure(f"step {step}: the loss is {value}", "Try a lower --lr")
        if self.precision.scaler.get_scale() < 1.0:
            problem = f"step {self.state['step']}: the gradients overflow float16 even unscaled"
            raise self._failure(problem, "Try a lower --lr, or --dtype float32")

    def _failure(self, problem: str, remedy: str = "") -> TrainingError:
        self._saver.wait()  # so that it can name the last checkpoint
        return self.folder.failure(problem, remedy)

    def _step(self, micro_batches: Sequence[Batch]) -> Tensor:
        """One optimizer step; returns the loss, still on the device."""
        self.model.train()
        return self._take(micro_batches, learning_rate(self.state["step"], self.cfg))

    def _take_eagerly(self, micro_batches: Sequence[Batch], lr: float | Tensor) -> Tensor:
        arguments = self.model, self.loss, self.optimizer, micro_batches, self.precision, self.cfg.grad_clip, lr
        return training_step(*arguments, self.processes, self._equal_targets)

    def skipped_steps(self) -> int:
        """Steps whose float16 gradients overflowed: their batches were taken, but the weights stayed as they were."""
        if not self.precision.scaler.is_enabled():
            return 0
        taken = [state["step"] for state in self.optimizer.state.values() if "step" in state]
        return self.state["step"] - (int(torch.stack(taken).max()) if taken else 0)

    def evaluate(self, split: str) -> float:
        """Mean loss in nats per target over `eval_batches` batches of evenly spaced examples: always the same ones."""
        self.model.eval()
        batch_size = self.cfg.batch_size
        examples = self.corpus.examples(split, self.model.cfg.block_size)
        n, processes = min(self.cfg.eval_batches * batch_size, len(examples)), self.processes
        if processes.size == 1:
            return mean_loss(self.model.loss, *examples.evenly_spaced(n), batch_size, self.precision)
        n_own = math.ceil(n / processes.size)
        x, y = examples.evenly_spaced(n, slice(processes.rank * n_own, (processes.rank + 1) * n_own))
        missing = (0, 0, 0, n_own - len(x))  # the last processes have fewer: all take as many, and make the same calls
        x, y = F.pad(x, missing), F.pad(y, missing, value=IGNORED)
        return mean_loss(self.loss, x, y, batch_size // processes.size, self.precision, processes)

    def _evaluate_and_save(self) -> bool:
        began, state, target = time.perf_counter(), self.state, self.cfg.target_loss
        train_loss, val_loss = self.evaluate("train"), self.evaluate("val")
        if not math.isfinite(val_loss):
            raise self._failure(f"step {state['step']}: the validation loss is {val_loss}")
        self._write("val", val_loss, _rate(state["tokens"], state["elapsed_s"]))
        best = state["best_val"] is None or val_loss < state["best_val"]
        if best:
            state["best_val"] = val_loss
        self._save(best)
        self._progress.evaluated(time.perf_counter() - began)
        skipped = self.skipped_steps()
        self._progress.say(
            f"step {state['step']}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, {state['elapsed_s']:.1f} s"
            + (f", {skipped} steps skipped, whose float16 gradients overflowed" if skipped else "")
        )
        return target is not None and val_loss <= target

    def _save(self, is_best: bool = False) -> None:
        self._saver.save(self.checkpoint(), is_best)

    def _write(self, split: str, loss: float, tokens_per_s: float) -> None:
        state = self.state
        row = {
            "step": state["step"],
            "split": split,
            "loss": loss,
            "elapsed_s": round(state["elapsed_s"], 3),
            "tokens": state["tokens"],
            "tokens_per_s": round(tokens_per_s, 1),
            "lr": learning_rate(max(state["step"] - 1, 0), self.cfg),
        }
        if self.processes.is_first:
            self.folder.append(row)
            for problem in self.loggers.row(row):
                self._progress.say(problem)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM finish the step, save and leave. A second one ends the process at once."""

        def note(number: int, frame: Any) -> None:
            if self._signal:
                sys.exit(1)
            self._signal = number

        try:
            before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # only the main thread may handle signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _rate(tokens: int, seconds: float) -> float:
    """Tokens a second; 0 where the clock is too coarse to have moved."""
    return tokens / seconds if seconds > 0.0 else 0.0
