"""AdamW as PyTorch has it, and on a CPU in one pass over the gradients, which clips them as well.

Clipping reads all gradients for their norm, and then multiplies each by the same factor. Here AdamW's pass, which reads
them anyway, multiplies them by it. State and groups are those of torch.optim.AdamW.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..ops.adamw import adamw_, is_plain, one_pass_choice, total_norm

# Without the wrapper that calls an optimizer's hooks, because it is around the step below already.
_unhooked_step = inspect.unwrap(torch.optim.Adam.step)


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, whose step on a CPU is the extension's where PyTorch's fused one would do the same."""

    clip_factor = 1.0  # of the gradients, at the next step alone

    def clip_at_step(self, parameters: Iterable[Tensor], max_norm: float) -> bool:
        """Have the next step clip the gradients of `parameters`; False if it cannot.

        The result is that of torch.nn.utils.clip_grad_norm_ before the step. The gradients stay as they are.
        """
        clipped = {p: p.grad for p in parameters if p.grad is not None}
        ours = {p for group in self.param_groups for p in group["params"] if p.grad is not None}
        if not clipped or clipped.keys() != ours or not self._takes_one_pass():
            return False
        factor = max_norm / (float(total_norm(clipped.values())) + 1e-6)
        self.clip_factor = 1.0 if factor > 1.0 else factor  # NaN stays NaN
        return True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        if closure is not None or not self._takes_one_pass():
            return self._step_of_pytorch(closure)
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            states = [self._state_of(p) for p in weights]
            adamw_(
                weights,
                [p.grad for p in weights],
                *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")),
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                betas=group["betas"],
                eps=group["eps"],
                grad_scale=self.clip_factor,
            )
        self.clip_factor = 1.0
        return None

    def _step_of_pytorch(self, closure: Callable[[], Any] | None) -> Any:
        if self.clip_factor != 1.0:  # there is a gradient scaler, of which clip_at_step did not know
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(self.clip_factor)
            self.clip_factor = 1.0
        return _unhooked_step(self, closure)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            zeros = torch.zeros_like(parameter)
            step = torch.zeros((), dtype=torch.float32, device="cpu")  # whatever torch's defaults are
            state.update(step=step, exp_avg=zeros, exp_avg_sq=zeros.clone())
        return state

    def _takes_one_pass(self) -> bool:
        """Not with a gradient scaler, nor with a learning rate in a tensor, as a CUDA graph has it."""
        if hasattr(self, "found_inf") or torch.compiler.is_compiling() or not one_pass_choice()[0]:
            return False
        return all(
            group["fused"]
            and isinstance(group["lr"], float)
            and not (group["amsgrad"] or group["maximize"] or group["differentiable"])
            and all(is_plain(p) and is_plain(p.grad) for p in group["params"] if p.grad is not None)
            for group in self.param_groups
        )
