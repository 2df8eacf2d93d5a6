"""The loss of a model that several processes train together, whose backward pass leaves the same gradients in all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..language_model import LanguageModel
from .processes import Processes
from .step import Loss, Precision


def parallel_loss(model: LanguageModel, cfg: TrainConfig, processes: Processes, precision: Precision) -> Loss:
    """`loss(x, y)` of this process's rows, as `cfg.parallel` says; that of the model itself in one process.

    After a backward pass every gradient is the mean over the processes. That of the step's last micro-batch exchanges
    them: the others belong inside `loss.no_sync()`, forward and backward, and their gradients are kept for it.
    """
    loss: Loss = torch.compile(model.loss) if cfg.compile else model.loss
    if processes.size == 1:
        return loss
    # Gradients are views of the buffers that are exchanged, which spares a copy of them all.
    return nn.parallel.DistributedDataParallel(_LossModule(model, loss), gradient_as_bucket_view=True)


class _LossModule(nn.Module):
    """A loss as the forward pass of a module that has the model's parameters."""

    def __init__(self, model: LanguageModel, loss: Loss) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self._loss(x, y)
