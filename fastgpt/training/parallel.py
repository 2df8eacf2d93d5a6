"""The loss of a model that several processes train together, by what PyTorch has for it.

By DDP, DistributedDataParallel (Li et al. 2020), every process holds the whole model, and the backward pass leaves the
same gradients in all. By FSDP2, `fully_shard` (Zhao et al. 2023), each holds a part of every parameter, of its gradient
and of its moments; a block's parameters are gathered before it computes, and given back after.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ..config import ConfigError, TrainConfig
from ..language_model import LanguageModel
from .processes import Processes
from .step import Loss, Precision


def check_parallel(cfg: TrainConfig, processes: Processes, precision: Precision) -> None:
    """Raise ConfigError for what several processes cannot do as `cfg.parallel` says."""
    if processes.size == 1 or cfg.parallel != "fsdp":
        return
    if cfg.compile:
        raise ConfigError("compile: --parallel fsdp gathers parameters between the blocks: leave one of the two out")
    if precision.dtype == torch.float16:
        raise ConfigError(
            "dtype: with --parallel fsdp each process has a part of the gradients, and the scaler of float16 would see "
            "an overflow in its own part alone; give --dtype bfloat16 or float32, or --parallel ddp"
        )


def parallel_loss(model: LanguageModel, cfg: TrainConfig, processes: Processes, precision: Precision) -> Loss:
    """`loss(x, y)` of this process's rows, as `cfg.parallel` says; that of the model itself in one process.

    By FSDP the model's parameters become DTensors here: the optimizer is made after it. Raises ConfigError as
    `check_parallel` does.

    After a backward pass every gradient is the mean over the processes. By DDP that of the step's last micro-batch
    exchanges them: the others belong inside `loss.no_sync()`, forward and backward, and their gradients are kept for
    it. By FSDP each micro-batch exchanges its own: kept until the last one, they would be those of the whole model.
    """
    check_parallel(cfg, processes, precision)
    loss: Loss = torch.compile(model.loss) if cfg.compile else model.loss
    if processes.size == 1:
        return loss
    if cfg.parallel == "fsdp":
        return _sharded(_LossModule(model, loss), precision)
    # Gradients are views of the buffers that are exchanged, which spares a copy of them all.
    return nn.parallel.DistributedDataParallel(_LossModule(model, loss), gradient_as_bucket_view=True)


class _LossModule(nn.Module):
    """A loss as the forward pass of a module that has the model's parameters."""

    def __init__(self, model: LanguageModel, loss: Loss) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self._loss(x, y)


def _sharded(loss: _LossModule, precision: Precision) -> Loss:
    """`loss`, each block of whose model is gathered by itself, and all other parameters with the whole.

    The whole is the loss and not the model, so that embeddings, norms and the fused head see plain tensors. In half
    precision a block is gathered in it, which halves what is sent; its input stays what autocast makes of it, because
    the sums of the residual stream are in float32. What lies outside the blocks is gathered in float32: the embeddings
    begin that stream. Gradients are summed in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # A block may give back the stream as it is, and its last product may be a view. Nothing changes either in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    half = None if precision.dtype == torch.float32 else precision.dtype
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in getattr(loss.model, "blocks", ()):
        fully_shard(block, mp_policy=policy)
    fully_shard(loss, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    return loss
