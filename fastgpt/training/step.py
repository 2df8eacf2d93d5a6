"""One step of training and one mean of a loss, for every caller that trains: the loop, the studies, the benchmarks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import ConfigError, TrainConfig
from ..data.layouts import IGNORED
from ..language_model import LanguageModel
from ..ops.dropout import rows_from
from . import TrainingError
from .adamw import AdamW
from .muon import Muon, attention_inputs, hidden_matrices
from .processes import ALONE, Processes

Loss = Callable[[Tensor, Tensor], Tensor]  # x (B, T), y (B, T) -> the mean in nats per counted target, 0-dim
Batch = tuple[Tensor, Tensor]


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Linear warm-up over warmup_steps, then from lr down to min_lr at max_steps, along half a cosine or linearly."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / (cfg.warmup_steps + 1)
    if step >= cfg.max_steps:
        return cfg.min_lr
    progress = (step - cfg.warmup_steps) / (cfg.max_steps - cfg.warmup_steps)
    height = 1.0 - progress if cfg.lr_decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return cfg.min_lr + height * (cfg.lr - cfg.min_lr)


def training_dtype(device: torch.device, asked: str = "auto") -> tuple[torch.dtype, str]:
    """The dtype of the matrix products of training on `device`, and why.

    "auto" takes half precision on CUDA and ROCm alone: bfloat16 where the hardware has it, else float16. Elsewhere it
    takes float32, because half precision was never measured to be faster there.
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


def check_checkpointing(model: LanguageModel | type[LanguageModel], cfg: TrainConfig) -> None:
    """Raise ConfigError where `cfg` asks for activation checkpointing, and `model`, or its class, has no blocks."""
    if cfg.activation_checkpointing and not hasattr(model, "activation_checkpointing"):
        raise ConfigError(
            f"activation_checkpointing: computes the blocks of a GPT again, and the model {model.kind} has none; "
            f"switch it off"
        )


def make_optimizer(model: torch.nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon and AdamW, of the parameters that are not frozen. Matrices decay; biases and norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise TrainingError("model: every parameter is frozen (requires_grad is False): there is nothing to train")
    by_muon = hidden_matrices(model) if cfg.optimizer == "muon" else []
    by_adamw = [p for p in parameters if p not in set(by_muon)]
    groups = [
        {"params": [p for p in by_adamw if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in by_adamw if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")
    adamw = AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=fused)
    if not by_muon:
        return adamw
    lr_ratio, thirds = cfg.muon_lr / cfg.lr, attention_inputs(model)
    return Muon(by_muon, adamw, cfg.muon_lr, cfg.muon_momentum, cfg.weight_decay, lr_ratio, thirds)


def count_targets(y: Tensor) -> Tensor:
    """How many targets count, 0-dim: on a GPU nothing waits for it."""
    return (y != IGNORED).sum()


def target_shares(
    micro_batches: Sequence[Batch], processes: Processes = ALONE, equal_targets: bool = False
) -> Sequence[Tensor | None]:
    """Of all the counted targets of a step, the share of each of its micro-batches, 0-dim and on the device.

    Their losses, each a mean over its own targets, add up with these weights to the mean over all. A share is that of
    this process's own targets where all have as many; else it is relative to the mean number that a process has, so
    that the mean over the processes is the mean over all targets. None is the share of what is alone.
    """
    if len(micro_batches) == 1 and (processes.size == 1 or equal_targets):
        return [None]
    counts = torch.stack([count_targets(y) for _, y in micro_batches])
    total = counts.sum()
    if processes.size > 1 and not equal_targets:
        return list((counts * processes.size / processes.sum(total).clamp_min(1)).unbind())
    return list((counts / total.clamp_min(1)).unbind())


def training_step(
    model: torch.nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    precision: Precision,
    grad_clip: float,
    lr: float | Tensor | None = None,
    processes: Processes = ALONE,
    equal_targets: bool = False,
) -> Tensor:
    """One optimizer step on the mean loss over the targets of all micro-batches; returns that loss, on the device.

    Of several `processes` each gives its own rows, and `loss` is that of `parallel_loss`; the loss of the step is then
    the mean over the processes of what this returns. `equal_targets` says that all have as many targets that count,
    which spares them an exchange.

    The gradients are those of one batch of all the rows, however the counted targets are spread. `lr` becomes the
    learning rate of every parameter group, times the group's `lr_ratio` where it has one. It may be a tensor, which a
    CUDA graph reads; without it the optimizer keeps its own. Nothing here waits for a GPU. The caller has put the model
    into training mode.
    """
    if lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"] if "lr_ratio" in group else lr
    shares = target_shares(micro_batches, processes, equal_targets)
    total = torch.zeros((), device=precision.device)
    for number, ((x, y), share) in enumerate(zip(micro_batches, shares, strict=True), 1):
        with _part_of_batch(processes, len(x)), _exchange(loss, number == len(micro_batches)):
            with precision.autocast():
                value = loss(x, y)
            if share is not None:
                value = torch.where(share > 0, value * share, 0.0)  # the mean over no target is NaN
            precision.scaler.scale(value).backward()
        total += value.detach()
    if grad_clip > 0.0:
        precision.scaler.unscale_(optimizer)
        clip_gradients(model, optimizer, grad_clip)
    precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


def _part_of_batch(processes: Processes, n_rows: int) -> contextlib.AbstractContextManager:
    """Inside, dropout draws the masks that this process's rows have in the batch of all processes."""
    if processes.size == 1:
        return contextlib.nullcontext()
    return rows_from(processes.rank * n_rows, processes.size * n_rows)


def _exchange(loss: Loss, is_last: bool) -> contextlib.AbstractContextManager:
    """Inside, the gradients of `loss` stay in this process, but those of the last micro-batch are exchanged."""
    return contextlib.nullcontext() if is_last or not hasattr(loss, "no_sync") else loss.no_sync()


def clip_gradients(model: torch.nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Scale the gradients down to `max_norm` where their norm is larger: in the optimizer's own pass, if it can."""
    if not (isinstance(optimizer, AdamW) and optimizer.clip_at_step(model.parameters(), max_norm)):
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)


@torch.no_grad()
def mean_loss(
    loss: Loss, x: Tensor, y: Tensor, batch_size: int, precision: Precision, processes: Processes = ALONE
) -> float:
    """The mean loss in nats over the counted targets of x, y (N, T), taken `batch_size` rows at a time.

    Of several `processes` each gives as many rows of its own, and gets the mean over the targets of all.
    """
    total, n_targets = 0.0, 0
    for bx, by in zip(x.split(batch_size), y.split(batch_size), strict=True):
        n = int(count_targets(by))
        if n > 0 or processes.size > 1:  # all processes make the same calls
            with precision.autocast():
                value = float(loss(bx.to(precision.device), by.to(precision.device)))
            total += value * n if n > 0 else 0.0  # the mean over no target is NaN
            n_targets += n
    if processes.size > 1:
        total, n_targets = processes.sum(torch.tensor([total, n_targets], dtype=torch.float64)).tolist()
    return total / n_targets if n_targets else math.nan
