"""The training loop: AdamW, warm-up and cosine, evaluation, checkpoints, and a run's folder.

A run can be stopped anywhere and resumed to the same bits: the batch of step s follows from (seed, s) alone, and
weights, moments, counters, the gradient scaler and the random state of dropout are in every checkpoint.

`training_step` and `mean_loss` are for every caller that trains: the trainer, the studies and the benchmarks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ..baselines import model_class
from ..checkpoint import (
    Checkpoint,
    CheckpointError,
    atomic_path,
    check_same,
    link_or_copy,
    load_parameters,
    model_tensors,
)
from ..config import GPTConfig, TrainConfig, readable
from ..data import IGNORED, Corpus, Prefetcher
from ..model import GPT, LanguageModel

Loss = Callable[[Tensor, Tensor], Tensor]  # x (B, T), y (B, T) -> the mean in nats per counted target, 0-dim
Batch = tuple[Tensor, Tensor]
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, by AdamW's own names


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
    """The device called `name`, once it has held a number; "auto" is a CUDA or ROCm GPU, else Apple's, else the CPU."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it knows shapes, and computes nothing")
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        # A name that PyTorch knows, and this build has no code for, ends in an account of its dispatcher.
        unknown = isinstance(error, (NotImplementedError, ImportError)) or "INTERNAL ASSERT" in str(error)
        reason = "this PyTorch was built without it" if unknown else str(error).splitlines()[0]
        raise TrainingError(f"device: {name!r} cannot be used here: {reason}") from None
    return device


def training_dtype(device: torch.device, asked: str = "auto") -> tuple[torch.dtype, str]:
    """The dtype of the matrix products of training on `device`, and why.

    "auto" takes half precision on CUDA and ROCm alone: bfloat16 where the hardware has it, else float16. Elsewhere it
    takes float32, because nobody has measured half precision to be faster there.
    """
    emulated = False
    if device.type == "cuda":
        with torch.cuda.device(device):
            emulated = not torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "auto":
        if device.type != "cuda":
            return torch.float32, "half precision is the default on CUDA alone"
        return (torch.float16, "this GPU emulates bfloat16") if emulated else (torch.bfloat16, "this GPU has it")
    if asked == "bfloat16" and emulated:
        return torch.bfloat16, "asked for, but this GPU emulates it: float16 is faster"
    return getattr(torch, asked), "asked for"


class Precision:
    """What a training step computes in: the dtype of autocast and, where that is float16, a scaler of the gradients.

    float16 has no numbers below 6e-8, where many gradients lie. So the loss is multiplied by a scale before backward,
    and the gradients are divided by it before they are used; a step whose gradients overflow is left out, and the
    scale halved. In any other dtype the scaler does nothing.
    """

    def __init__(self, device: torch.device, asked: str = "auto") -> None:
        self.device = device
        self.dtype, self.why = training_dtype(device, asked)
        if self.dtype != torch.float32 and not torch.amp.is_autocast_available(device.type):
            raise TrainingError(f"dtype: {self.name} needs autocast, which PyTorch does not have on {device.type!r}")
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def make_optimizer(model: torch.nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW of what is not frozen, with weight decay on matrices only: embeddings and linears, not biases and norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise TrainingError("model: every parameter is frozen (requires_grad is False): there is nothing to train")
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=fused)


def count_targets(y: Tensor) -> Tensor:
    """How many targets count, 0-dim: on a GPU nothing waits for it."""
    return (y != IGNORED).sum()


def target_shares(micro_batches: Sequence[Batch]) -> list[Tensor]:
    """Of all the counted targets of a step, the share of each of its micro-batches, 0-dim and on the device.

    Their losses, each a mean over its own targets, add up with these weights to the mean over all. Processes that
    train together would add up `total` over all of them here, and their gradients after the step's last backward.
    """
    counts = torch.stack([count_targets(y) for _, y in micro_batches])
    total = counts.sum()
    return list((counts / total.clamp_min(1)).unbind())


def training_step(
    model: torch.nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    precision: Precision,
    grad_clip: float,
) -> Tensor:
    """One optimizer step on the mean loss over the targets of all micro-batches; returns that loss, on the device.

    The gradients are those of one batch of all the rows, however the counted targets are spread. Nothing here waits
    for a GPU. The model is in training mode already.
    """
    shares = target_shares(micro_batches) if len(micro_batches) > 1 else [None]
    total = torch.zeros((), device=precision.device)
    for (x, y), share in zip(micro_batches, shares, strict=True):
        with precision.autocast():
            value = loss(x, y)
        if share is not None:
            value = torch.where(share > 0, value * share, 0.0)  # the mean over no target is NaN
        precision.scaler.scale(value).backward()
        total += value.detach()
    if grad_clip > 0.0:
        precision.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


@torch.no_grad()
def mean_loss(loss: Loss, x: Tensor, y: Tensor, batch_size: int, precision: Precision) -> float:
    """The mean loss in nats over the counted targets of x, y (N, T), taken `batch_size` rows at a time."""
    total, n_targets = 0.0, 0
    for bx, by in zip(x.split(batch_size), y.split(batch_size), strict=True):
        n = int(count_targets(by))
        if n > 0:  # the mean over no target is NaN
            with precision.autocast():
                total += float(loss(bx.to(precision.device), by.to(precision.device))) * n
            n_targets += n
    return total / n_targets if n_targets else math.nan


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

    def append(self, row: dict[str, Any]) -> None:
        """Add a row to metrics.jsonl. The file is opened for each, so that a full disk is met here and nowhere else."""
        try:
            with open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise TrainingError(
                f"{self.metrics_path}: cannot be written: {error.strerror or error}; "
                f"last good checkpoint: {self.last_good()}"
            ) from error

    def last_good(self) -> str:
        return str(self.latest) if self.latest.exists() else "none"

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
    """Draw the loss curve. Returns why not, where matplotlib is not installed or the picture cannot be written."""
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
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(readable(out.parent.name), parse_math=False)  # a dollar sign in a folder's name is no formula
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        with atomic_path(out) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    except CheckpointError as error:
        return f"no loss.png: {error}"
    finally:
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
        self.precision = Precision(self.device, cfg.dtype)
        self.loss = torch.compile(self.model.loss) if cfg.compile else self.model.loss
        self._signal: int | None = None

    # --- state ----------------------------------------------------------------------------------------------------

    def _trained(self) -> dict[str, Tensor]:
        """The parameters that are not frozen, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def checkpoint(self) -> Checkpoint:
        tensors = {f"model.{name}": tensor for name, tensor in model_tensors(self.model).items()}
        for name, parameter in self._trained().items():
            moments = self.optimizer.state.get(parameter) or {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            tensors |= {f"{moment}.{name}": moments[moment] for moment in MOMENTS}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type != "cpu":
            tensors[f"rng.{self.device.type}"] = torch.get_device_module(self.device).get_rng_state(self.device)
        state = {**self.state, "train_tokens": len(self.corpus.train)}
        if self.precision.scaler.is_enabled():
            state["scaler"] = self.precision.scaler.state_dict()
        return Checkpoint(
            dataclasses.asdict(self.model.cfg),
            dataclasses.asdict(self.cfg),
            state,
            self.corpus.tokenizer.to_json(),
            tensors,
            model=self.model.kind,
        )

    def restore(self, saved: Checkpoint) -> None:
        """Take up where `saved` left off. Everything is checked before anything is changed."""
        weights = saved.part("model")
        check_same(saved.path, "model", weights, model_tensors(self.model))
        if saved.state.get("train_tokens") != len(self.corpus.train):
            raise CheckpointError(
                f"{saved.path}: field 'train_tokens' is {saved.state.get('train_tokens')}, but the data given has "
                f"{len(self.corpus.train)}: resume with the data the run was started with"
            )
        for key in self.state:
            if key not in saved.state:
                raise CheckpointError(f"{saved.path}: field 'state' has no {key!r}")
        moments = self._checked_moments(saved)
        scaler = self._checked_scaler(saved)
        self._restore_random_state(saved)
        load_parameters(self.model, weights, saved.path)
        self.precision.scaler.load_state_dict(scaler)
        self.state = {key: saved.state[key] for key in self.state}
        if self.state["step"] == 0:
            return  # AdamW makes its zeros itself
        fused = self.optimizer.defaults["fused"]
        for name, parameter in self._trained().items():
            self.optimizer.state[parameter] = {
                "step": moments["step"][name].to(self.device if fused else "cpu", torch.float32, copy=True),
                **{m: torch.empty_like(parameter.detach()).copy_(moments[m][name]) for m in ("exp_avg", "exp_avg_sq")},
            }

    def _checked_moments(self, saved: Checkpoint) -> dict[str, dict[str, Tensor]]:
        """AdamW's state of what is trained; of what is frozen an older checkpoint has some too, which is left out."""
        trained = self._trained()
        frozen = {name for name, _ in self.model.named_parameters()} - trained.keys()
        moments = {m: {n: t for n, t in saved.part(m).items() if n not in frozen} for m in MOMENTS}
        if not moments["step"]:  # an older checkpoint, whose parameters all took every step
            moments["step"] = dict.fromkeys(trained, torch.tensor(float(saved.state["step"])))
        for moment in MOMENTS:
            steps = dict.fromkeys(trained, torch.zeros(()))
            check_same(saved.path, moment, moments[moment], steps if moment == "step" else trained)
        return moments

    def _checked_scaler(self, saved: Checkpoint) -> dict[str, Any]:
        """The state of the gradient scaler; as it is now, where the run so far had none."""
        now = self.precision.scaler.state_dict()
        found = saved.state.get("scaler", now)
        if not isinstance(found, dict) or not all(isinstance(found.get(key), (int, float)) for key in now):
            raise CheckpointError(f"{saved.path}: field 'scaler' of 'state' is not that of a gradient scaler")
        return found

    def _restore_random_state(self, saved: Checkpoint) -> None:
        """The generators' states; one that was written on another kind of device is left out."""
        if "rng.cpu" not in saved.tensors:
            raise CheckpointError(f"{saved.path}: tensor rng.cpu is missing")
        name, device = "rng.cpu", self.device
        try:
            torch.set_rng_state(saved.tensors[name])
            if device.type != "cpu" and (name := f"rng.{device.type}") in saved.tensors:
                torch.get_device_module(device).set_rng_state(saved.tensors[name], device)
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"{saved.path}: tensor {name} is not a random state ({error})") from None

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to max_steps or target_loss; returns the final counters. Raises Interrupted or TrainingError."""
        from tqdm import tqdm

        cfg, state = self.cfg, self.state
        with self._signals():
            bar = tqdm(total=cfg.max_steps, initial=state["step"], unit="step", disable=None, dynamic_ncols=True)
            self._say = bar.write if not bar.disable else lambda text: print(text, flush=True)
            batches = Prefetcher(
                self.corpus.examples("train", self.model.cfg.block_size),
                cfg.batch_size,
                cfg.seed,
                state["step"] * cfg.grad_accum,
                device=self.device,
                depth=cfg.grad_accum + 1,  # a step takes its micro-batches at once, and then one more is ready
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
        losses, counts = [], []
        while state["step"] < end and self._signal is None:
            micro_batches = [next(batches) for _ in range(cfg.grad_accum)]
            losses.append(self._step(micro_batches))
            if cfg.layout == "names":  # in the other layouts every step has as many targets
                counts.append(torch.stack([count_targets(y) for _, y in micro_batches]).sum())
            state["step"] += 1
            bar.update(1)
        values = torch.stack(losses).tolist() if losses else []
        elapsed = time.perf_counter() - began
        self._check_losses(values, first)
        tokens = len(values) * cfg.batch_size * cfg.grad_accum * self.model.cfg.block_size
        state["tokens"] += tokens
        state["elapsed_s"] += elapsed
        if values:
            weights = torch.stack(counts).tolist() if counts else [1] * len(values)
            loss = sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
            rate = _rate(tokens, elapsed)
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

    def _check_losses(self, values: list[float], first: int) -> None:
        """Raise where training cannot go on: a loss of the steps after `first`, or every gradient, is not finite."""
        for step, value in enumerate(values, first + 1):
            if not math.isfinite(value):
                raise TrainingError(
                    f"step {step}: the loss is {value}; last good checkpoint: {self.folder.last_good()}. "
                    f"Try a lower --lr"
                )
        if self.precision.scaler.get_scale() < 1.0:
            raise TrainingError(
                f"step {self.state['step']}: the gradients overflow float16 even unscaled; last good checkpoint: "
                f"{self.folder.last_good()}. Try a lower --lr, or --dtype float32"
            )

    def _step(self, micro_batches: Sequence[Batch]) -> Tensor:
        """One optimizer step; returns the loss, still on the device."""
        lr = learning_rate(self.state["step"], self.cfg)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        return training_step(self.model, self.loss, self.optimizer, micro_batches, self.precision, self.cfg.grad_clip)

    def skipped_steps(self) -> int:
        """Steps whose float16 gradients overflowed: their batches were taken, but the weights stayed as they were."""
        if not self.precision.scaler.is_enabled():
            return 0
        taken = [state["step"] for state in self.optimizer.state.values()]
        return self.state["step"] - (int(torch.stack(taken).max()) if taken else 0)

    def evaluate(self, split: str) -> float:
        """Mean loss in nats per target over `eval_batches` batches of evenly spaced examples: always the same ones."""
        self.model.eval()
        batch_size = self.cfg.batch_size
        examples = self.corpus.examples(split, self.model.cfg.block_size)
        x, y = examples.evenly_spaced(min(self.cfg.eval_batches * batch_size, len(examples)))
        return mean_loss(self.model.loss, x, y, batch_size, self.precision)

    def _evaluate_and_save(self) -> bool:
        state, target = self.state, self.cfg.target_loss
        train_loss, val_loss = self.evaluate("train"), self.evaluate("val")
        if not math.isfinite(val_loss):
            raise TrainingError(
                f"step {state['step']}: the validation loss is {val_loss}; "
                f"last good checkpoint: {self.folder.last_good()}"
            )
        self._write("val", val_loss, _rate(state["tokens"], state["elapsed_s"]))
        best = state["best_val"] is None or val_loss < state["best_val"]
        if best:
            state["best_val"] = val_loss
        self._save()
        if best:
            link_or_copy(self.folder.latest, self.folder.best)
        skipped = self.skipped_steps()
        self._say(
            f"step {state['step']}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, {state['elapsed_s']:.1f} s"
            + (f", {skipped} steps skipped, whose float16 gradients overflowed" if skipped else "")
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
        self.folder.append(row)

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


def _rate(tokens: int, seconds: float) -> float:
    """Tokens a second; 0 where the clock is too coarse to have moved."""
    return tokens / seconds if seconds > 0.0 else 0.0


@overload
def build_model(model_config: GPTConfig, seed: int) -> GPT: ...
@overload
def build_model(model_config: GPTConfig, seed: int, kind: str) -> LanguageModel: ...
def build_model(model_config: GPTConfig, seed: int, kind: str = "gpt") -> LanguageModel:
    """A freshly initialised model, one of `baselines.MODELS`, whose weights follow from `seed`."""
    torch.manual_seed(seed)
    return model_class(kind)(model_config)
