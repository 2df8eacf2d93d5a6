"""How wrong a contender is: its error against the float64 oracle, over PyTorch's own error plus half the tolerance."""

import copy
import functools
import math

import torch
from torch import Tensor

import fastgpt
from fastgpt import parity
from fastgpt.ops import reference
from fastgpt.ops.yardsticks import yardstick_for

from .models import ModelShape
from .peers import Peer
from .suite import ParityError, Setting


def error_ratio(error: float, torch_error: float, atol: float) -> float:
    return error / (torch_error + atol / 2) if math.isfinite(error) else math.inf


def op_error_ratio(case: parity.ParityCase, backend: str, setting: Setting) -> float:
    """The largest error ratio of FastGPT's outputs and gradients. Up to 2 passes."""
    checked = parity.measure_case(case, backend, setting.dtype, setting.device.type)
    for row in checked:
        if row.reason:
            raise ParityError(f"{case.op} {case.name}, {row.value}: {row.reason}; no time is kept")
    return max(error_ratio(row.ours, row.torch, row.atol) for row in checked)


class PeerCheck:
    """The same for peers, which take the arguments by position. The oracle is computed once for all of them."""

    def __init__(self, case: parity.ParityCase, setting: Setting) -> None:
        self.case, self.setting = case, setting

    @functools.cached_property
    def known(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
        """The arguments, the oracle's values, and PyTorch's error in each of them plus half the tolerance."""
        case, setting = self.case, self.setting
        drawn = case.arguments(parity.Draw(setting.dtype, setting.device.type))
        exact = {name: parity.exact_copy(tensor) for name, tensor in drawn.items()}
        oracle = parity.outputs_and_gradients(getattr(reference, case.op), case, exact, case.options)
        yardstick = yardstick_for(case.op, "torch", setting.device.type, dropout=False)
        torchs = parity.outputs_and_gradients(yardstick, case, drawn, case.options)
        tolerances = {name: parity.tolerance(setting.dtype, value) for name, value in oracle.items()}
        errors = {name: parity.max_error(torchs[name], oracle[name]) + tol / 2 for name, tol in tolerances.items()}
        return drawn, oracle, errors

    def error_ratio(self, peer: Peer, direction: str) -> float:
        """The largest error ratio of the peer's outputs, and of its gradients where they are timed."""
        drawn, oracle, errors = self.known
        function = peer.uncompiled or peer.function
        if peer.overwrites:
            drawn = {name: tensor.clone() for name, tensor in drawn.items()}
        if direction == "forward":
            with torch.no_grad():
                out = function(*drawn.values())
            values = dict(zip(("out", "h"), out if isinstance(out, tuple) else (out,), strict=False))
        else:
            values = parity.outputs_and_gradients(lambda **named: function(*named.values()), self.case, drawn, {})
        return max(parity.max_error(value, oracle[name]) / errors[name] for name, value in values.items())


def model_error_ratio(model: fastgpt.GPT, shape: ModelShape, compiled: bool = False) -> float:
    """Our backends against the torch backend: the loss and every gradient, each relative to its largest value.

    The oracle is the model in float64; dropout is off, and two sequences are enough. On a GPU both run under bfloat16
    autocast, as in training. `compiled`: FastGPT's model goes through torch.compile.
    """
    device = next(model.parameters()).device
    x, y = (tokens[:2] for tokens in shape.random_batches(device, 1)[0])
    exact = copy.deepcopy(model).eval().double()
    with fastgpt.use_backend("torch"):
        exact_loss = exact(x, y)[1]
    exact_loss.backward()
    errors = {}
    for backend in ("auto", "torch"):
        copied = copy.deepcopy(model).eval()
        run = torch.compile(copied.loss) if compiled and backend == "auto" else copied.loss
        with fastgpt.use_backend(backend), torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            loss = run(x, y)
        loss.backward()
        pairs = [(loss.detach(), exact_loss.detach())]
        pairs += [(p.grad, q.grad) for p, q in zip(copied.parameters(), exact.parameters(), strict=True)]
        errors[backend] = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)
    return error_ratio(errors["auto"], errors["torch"], parity.ATOL[torch.bfloat16 if x.is_cuda else torch.float32])
