"""Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal before they are subtracted from the weights.

The momentum of a weight matrix is dominated by a few directions. Its nearest orthogonal matrix, U V^T of the singular
value decomposition U S V^T, moves the weights equally far in all directions. A few Newton-Schulz iterations, which are
matrix products alone, come close enough to it: with Jordan's coefficients all singular values end between 0.7 and 1.2.

torch.optim.Muon computes them for one matrix after the other in bfloat16. Here matrices of one shape are stacked, and
on a CPU the products are float32's: see ops/orthogonal.py. Muon is for the matrices between the embeddings and the
head; AdamW trains the rest.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982, on weight decay.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.orthogonal import orthogonal


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, and `adamw`, an optimizer of its own, for all other parameters.

    A matrix W (rows, columns) with the momentum M changes by

        M <- momentum M + (1 - momentum) gradient
        W <- (1 - lr weight_decay) W - lr sqrt(max(1, rows / columns)) orthogonal(Nesterov's M)

    A matrix in `thirds` holds three maps, one above the other, such as those to queries, keys and values. Each of them
    is a W of its own, which takes fewer steps to the same loss than one W for all three.

    The groups of `adamw` follow that of the matrices in `param_groups`, and its state is in `state`. Muon's learning
    rate is `lr_ratio` times AdamW's, which whoever schedules the rates has to know.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        adamw: torch.optim.AdamW,
        lr: float,
        momentum: float,
        weight_decay: float,
        lr_ratio: float,
        thirds: Collection[nn.Parameter] = (),
    ) -> None:
        own = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "lr_ratio": lr_ratio}
        super().__init__([{"params": matrices, **own}, *adamw.param_groups], {})
        self.adamw = adamw
        self.thirds = set(thirds)

    def __getstate__(self) -> dict[str, Any]:
        """What copy and pickle keep: torch.optim.Optimizer's own keeps nothing that a subclass adds."""
        return {**super().__getstate__(), "adamw": self.adamw, "thirds": self.thirds}

    @property
    def matrices(self) -> list[nn.Parameter]:
        return self.param_groups[0]["params"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step from the gradients in `.grad`; a parameter without one stays as it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stacks = defaultdict(list)
        for matrix in self.matrices:
            if matrix.grad is not None:
                stacks[matrix.shape, matrix in self.thirds, matrix.dtype, matrix.device].append(matrix)
        for matrices in stacks.values():
            self._step_of(matrices, self.param_groups[0])
        # Given anew at each step, because load_state_dict replaces groups and state.
        self.adamw.param_groups, self.adamw.state = self.param_groups[1:], self.state
        self.adamw.step()
        return loss

    def _step_of(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> None:
        """One step of matrices of one shape."""
        momentum, lr = group["momentum"], group["lr"]  # lr may be a tensor, which a CUDA graph reads
        shape = torch.Size([len(matrices), *matrices[0].shape])
        updates = torch.empty(shape, dtype=matrices[0].dtype, device=matrices[0].device)  # (N, rows, columns)
        for matrix, update in zip(matrices, updates, strict=True):
            state = self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            assert matrix.grad is not None
            state["momentum_buffer"].lerp_(matrix.grad, 1.0 - momentum)
            # Nesterov: the gradient counts once more.
            update.copy_(_gathered(torch.lerp(matrix.grad, state["momentum_buffer"], momentum)))
        if matrices[0] in self.thirds:
            updates = updates.reshape(3 * shape[0], shape[1] // 3, shape[2])
        rows, columns = updates.shape[1:]
        updates = orthogonal(updates).mul_(lr * math.sqrt(max(1.0, rows / columns))).reshape(shape)
        for matrix, update in zip(matrices, updates, strict=True):
            matrix.mul_(1.0 - lr * group["weight_decay"]).sub_(_part_like(matrix, update))


def _gathered(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, of which each process holds a part; any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _part_like(matrix: Tensor, whole: Tensor) -> Tensor:
    """This process's part of `whole`, as `matrix` is shared out; all of it where that is no DTensor."""
    if not hasattr(matrix, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(matrix, DTensor)
    return distribute_tensor(whole, matrix.device_mesh, matrix.placements, src_data_rank=None)  # sends nothing


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices that Muon is for: all trained ones except the embeddings and the head."""
    others = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    others |= set(getattr(model, "lm_head", nn.Identity()).parameters())
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and p not in others]


def attention_inputs(model: nn.Module) -> list[nn.Parameter]:
    """The matrices that hold the maps to queries, keys and values, one above the other."""
    return [p for name, p in model.named_parameters() if name.endswith("qkv.weight")]


def who_trains(optimizer: torch.optim.Optimizer) -> str:
    """In words, which parameters Muon trains where it was asked for."""
    if not isinstance(optimizer, Muon):
        return "adamw for all parameters: none is a matrix between embeddings and head, which are what muon is for"
    n = sum(matrix.numel() for matrix in optimizer.matrices)
    return f"muon for {len(optimizer.matrices)} matrices ({n:,} parameters), adamw for the rest"
