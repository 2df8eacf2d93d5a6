"""The training loop: AdamW, warm-up and cosine, evaluation, checkpoints, and a run's folder.

A run can be stopped anywhere and resumed to the same bits: the batch of step s follows from (seed, s) alone, and
weights, moments, counters and the random state of dropout are in every checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from .baselines import model_class
from .checkpoint import Checkpoint, CheckpointError, atomic_path, check_same, link_or_copy, load_parameters
from .config import GPTConfig, TrainConfig, readable
from .data import Corpus, Prefetcher
from .model import GPT, LanguageModel


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, and what the last good checkpoint is."""


class Interrupted(TrainingError):
    """A signal stopped the run, after it was saved."""


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Linear warm-up over warmup_steps, then half a cosine from lr down to min_lr at max_steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / (cfg.warmup_steps + 1)
    if step >= cfg.max_steps:
        return cfg.min_lr
    progress = (step - cfg.warmup_steps) / (cfg.max_steps - cfg.warmup_steps)
    return cfg.min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (cfg.lr - cfg.min_lr)


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TrainingError(f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def make_optimizer(model: LanguageModel, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (embeddings and linears, not biases and norms)."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=fused)


class RunFolder:
    """config.toml, metrics.jsonl, loss.png and checkpoint/ of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.latest = path / "checkpoint" / "latest.safetensors"
        self.best = path / "checkpoint" / "best.safetensors"

    def create(self, settings: dict[str, Any]) -> None:
        """Start a new run. A folder that already holds one is refused: resuming it, or another folder, is the way."""
        if self.latest.exists() or (self.metrics_path.exists() and self.metrics_path.stat().st_size > 0):
            raise TrainingError(f"{self.path}: already holds a run; add --resume to go on, or give another --out")
        try:
            self.latest.parent.mkdir(parents=True, exist_ok=True)
            self.metrics_path.touch()
        except OSError as error:
            raise TrainingError(
                f"{self.path}: the output folder cannot be written: {error.strerror or error}"
            ) from error
        self.write_settings(settings)

    def write_settings(self, settings: dict[str, Any]) -> None:
        import tomli_w

        with atomic_path(self.path / "config.toml") as temporary:
            text = tomli_w.dumps({k: v for k, v in settings.items() if v is not None})
            temporary.write_text(readable(text), encoding="utf-8")

    def rewind(self, step: int) -> None:
        """Drop the metrics of steps after `step`: the resumed run writes them again."""
        if not self.metrics_path.exists():
            return
        kept = [row for row in read_metrics(self.metrics_path) if row["step"] <= step]
        with atomic_path(self.metrics_path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. A last line cut off by a crash is left out; any other bad line is an error."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise TrainingError(f"{path}: line {number} is not JSON") from None
    return rows


def plot_loss(metrics_path: Path, out: Path) -> str | None:
    """Draw the loss curve. Returns why not, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return "no loss.png: matplotlib is not installed (pip install 'fastgpt-kernels[plot]')"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(metrics_path)
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for split, style in (("train", {"lw": 0.8, "alpha": 0.6}), ("val", {"lw": 1.8, "marker": "o", "ms": 3})):
        points = [(row["step"], row["loss"]) for row in rows if row["split"] == split]
        if points:
            axes.plot(*zip(*points, strict=True), label=split, **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=out.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return None


class Trainer:
    """Trains `model` on `corpus` as `cfg` says, into `folder`."""

    def __init__(
        self, model: LanguageModel, corpus: Corpus, cfg: TrainConfig, folder: RunFolder, resume_command: str = ""
    ) -> None:
        if corpus.layout != cfg.layout:
            raise TrainingError(f"layout: the corpus was loaded as {corpus.layout!r}, the settings say {cfg.layout!r}")
        self.device = resolve_device(cfg.device)
        self.model = model.to(self.device)
        self.corpus, self.cfg, self.folder, self.resume_command = corpus, cfg, folder, resume_command
        self.optimizer = make_optimizer(self.model, cfg)
        self.state: dict[str, Any] = {"step": 0, "tokens": 0, "elapsed_s": 0.0, "best_val": None}
        bf16 = cfg.dtype == "bfloat16" or (
            cfg.dtype == "auto" and self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        self.autocast_dtype = torch.bfloat16 if bf16 else None
        self.loss = torch.compile(self.model.loss) if cfg.compile else self.model.loss
        self._signal: int | None = None

    # --- state ----------------------------------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter
            for moment in ("exp_avg", "exp_avg_sq"):
                state = self.optimizer.state.get(parameter)
                tensors[f"{moment}.{name}"] = state[moment] if state else torch.zeros_like(parameter)
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return Checkpoint(
            dataclasses.asdict(self.model.cfg),
            dataclasses.asdict(self.cfg),
            {**self.state, "train_tokens": len(self.corpus.train)},
            self.corpus.tokenizer.to_json(),
            tensors,
            model=self.model.kind,
        )

    def restore(self, saved: Checkpoint) -> None:
        """Take up where `saved` left off. Everything is checked before anything is changed."""
        expected = dict(self.model.named_parameters())
        parts = {part: saved.part(part) for part in ("model", "exp_avg", "exp_avg_sq")}
        for part, found in parts.items():
            check_same(saved.path, part, found, expected)
        if saved.state.get("train_tokens") != len(self.corpus.train):
            raise CheckpointError(
                f"{saved.path}: field 'train_tokens' is {saved.state.get('train_tokens')}, but the data given has "
                f"{len(self.corpus.train)}: resume with the data the run was started with"
            )
        for key in self.state:
            if key not in saved.state:
                raise CheckpointError(f"{saved.path}: field 'state' has no {key!r}")
        self._restore_random_state(saved)
        load_parameters(self.model, parts.pop("model"), saved.path)
        self.state = {key: saved.state[key] for key in self.state}
        for name, parameter in expected.items():
            if self.state["step"] > 0:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.state["step"]), device=self.device),
                    **{m: found[name].to(self.device, copy=True) for m, found in parts.items()},
                }

    def _restore_random_state(self, saved: Checkpoint) -> None:
        """The generators' states; one that was written on another kind of device is left out."""
        if "rng.cpu" not in saved.tensors:
            raise CheckpointError(f"{saved.path}: tensor rng.cpu is missing")
        try:
            torch.set_rng_state(saved.tensors["rng.cpu"])
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"{saved.path}: tensor rng.cpu is not a random state ({error})") from None
        if self.device.type == "cuda" and "rng.cuda" in saved.tensors:
            torch.cuda.set_rng_state(saved.tensors["rng.cuda"], self.device)

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to max_steps or target_loss; returns the final counters. Raises Interrupted or TrainingError."""
        from tqdm import tqdm

        cfg, state = self.cfg, self.state
        with self._signals(), open(self.folder.metrics_path, "a", encoding="utf-8") as self._metrics:
            bar = tqdm(total=cfg.max_steps, initial=state["step"], unit="step", disable=None, dynamic_ncols=True)
            self._say = bar.write if not bar.disable else lambda text: print(text, flush=True)
            batches = Prefetcher(
                self.corpus.examples("train", self.model.cfg.block_size),
                cfg.batch_size,
                cfg.seed,
                state["step"] * cfg.grad_accum,
                device=str(self.device),
            )
            with bar, batches:
                done = self._evaluate_and_save() if state["step"] == 0 else False
                while state["step"] < cfg.max_steps and not done:
                    done = self._interval(iter(batches), bar)
                if state["step"] >= cfg.max_steps and not self.folder.latest.exists():
                    self._save()
        problem = plot_loss(self.folder.metrics_path, self.folder.path / "loss.png")
        if problem:
            print(problem)
        return dict(state)

    def _interval(self, batches: Iterator[tuple[Tensor, Tensor]], bar: Any) -> bool:
        """Steps up to the next point where the loss is looked at, which waits for a GPU; True when training is over."""
        cfg, state = self.cfg, self.state
        began = time.perf_counter()
        first = state["step"]
        end = min(
            first + cfg.log_interval - first % cfg.log_interval,
            first + cfg.eval_interval - first % cfg.eval_interval,
            cfg.max_steps,
        )
        losses = []
        while state["step"] < end and self._signal is None:
            losses.append(self._step(batches))
            state["step"] += 1
            bar.update(1)
        values = torch.stack(losses).tolist() if losses else []
        elapsed = time.perf_counter() - began
        for step, value in enumerate(values, first + 1):
            if not math.isfinite(value):
                saved = self.folder.latest if self.folder.latest.exists() else "none"
                raise TrainingError(
                    f"step {step}: the loss is {value}; last good checkpoint: {saved}. Try a lower --lr"
                )
        tokens = len(values) * cfg.batch_size * cfg.grad_accum * self.model.cfg.block_size
        state["tokens"] += tokens
        state["elapsed_s"] += elapsed
        if values:
            loss, rate = sum(values) / len(values), tokens / elapsed
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
            if state["step"] % cfg.log_interval == 0:
                self._write("train", loss, rate)
        done = False
        if state["step"] % cfg.eval_interval == 0 or state["step"] == cfg.max_steps:
            done = self._evaluate_and_save()
        elif self._signal is not None:
            self._save()
        if self._signal is not None and not done:
            name = signal.Signals(self._signal).name
            hint = f" Resume with: {self.resume_command}" if self.resume_command else ""
            raise Interrupted(f"{name}: stopped at step {state['step']} and saved {self.folder.latest}.{hint}")
        return done

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """One optimizer step; returns the loss, still on the device."""
        cfg = self.cfg
        lr = learning_rate(self.state["step"], cfg)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        total = torch.zeros((), device=self.device)
        for _ in range(cfg.grad_accum):
            x, y = next(batches)
            with self._autocast():
                loss = self.loss(x, y) / cfg.grad_accum
            loss.backward()
            total += loss.detach()
        if cfg.grad_clip > 0.0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    @torch.no_grad()
    def evaluate(self, split: str) -> float:
        """Mean loss in nats per target over `eval_batches` batches of evenly spaced examples: always the same ones."""
        self.model.eval()
        examples = self.corpus.examples(split, self.model.cfg.block_size)
        x, y = examples.evenly_spaced(self.cfg.eval_batches * self.cfg.batch_size)
        total, n_targets = 0.0, 0
        for rows in zip(x.split(self.cfg.batch_size), y.split(self.cfg.batch_size), strict=True):
            n = int((rows[1] >= 0).sum())
            bx, by = (t.to(self.device) for t in rows)
            with self._autocast():
                total += float(self.model.loss(bx, by)) * n
            n_targets += n
        return total / n_targets

    def _evaluate_and_save(self) -> bool:
        state, target = self.state, self.cfg.target_loss
        train_loss, val_loss = self.evaluate("train"), self.evaluate("val")
        if not math.isfinite(val_loss):
            saved = self.folder.latest if self.folder.latest.exists() else "none"
            raise TrainingError(
                f"step {state['step']}: the validation loss is {val_loss}; last good checkpoint: {saved}"
            )
        rate = state["tokens"] / state["elapsed_s"] if state["elapsed_s"] else 0.0
        self._write("val", val_loss, rate)
        best = state["best_val"] is None or val_loss < state["best_val"]
        if best:
            state["best_val"] = val_loss
        self._save()
        if best:
            link_or_copy(self.folder.latest, self.folder.best)
        self._say(
            f"step {state['step']}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, {state['elapsed_s']:.1f} s"
        )
        return target is not None and val_loss <= target

    def _save(self) -> None:
        self.checkpoint().save(self.folder.latest)

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
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM finish the step, save and leave. A second one ends the process at once."""

        def note(number: int, frame: Any) -> None:
            if self._signal is not None:
                sys.exit(1)
            self._signal = number

        try:
            before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: signals are somebody else's
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@overload
def build_model(model_config: GPTConfig, seed: int) -> GPT: ...
@overload
def build_model(model_config: GPTConfig, seed: int, kind: str) -> LanguageModel: ...
def build_model(model_config: GPTConfig, seed: int, kind: str = "gpt") -> LanguageModel:
    """A freshly initialised model, one of `baselines.MODELS`, whose weights follow from `seed`."""
    torch.manual_seed(seed)
    return model_class(kind)(model_config)
