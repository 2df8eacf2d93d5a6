"""A training step as a CUDA graph: forward, backward, clipping and AdamW of all micro-batches in one launch.

The shapes of a trainer's steps are fixed, so the graph of one step serves all others. What changes from step to step is
read from tensors that stay where they are: the batches and the learning rate are copied into them, and the gradient
scaler and AdamW's count of steps are on the device already. Seeds of dropout are drawn on the device, from a generator
that a graph advances as an eager step does.

The first step is taken eagerly. `CHECKED_STEPS` more are taken twice from the same state, by the graph and eagerly; the
run goes on from the eager result. With deterministic kernels both give the same bits. Where a graph cannot be recorded,
or gives something else, all steps are eager, and `GraphedStep.reason` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import cuda_graph
from ..config import GPTConfig, TrainConfig
from ..model import GPT
from . import TrainingError
from .processes import ALONE, Processes
from .step import Batch, Precision, make_optimizer, training_step

CHECKED_STEPS = 3
# How far a tensor's change by the graph may be from its eager change, relative to that one, in the Euclidean norm. For
# PyTorch's kernels whose sums have no fixed order; what a wrong graph changes is off by something like 1.
TOLERANCE = 0.05


def is_graphed(cfg: TrainConfig, device_type: str, processes: Processes = ALONE) -> bool:
    """Whether steps are to be taken by a graph: as `cuda_graph` says, else on CUDA, where nothing stands against it.

    Never in several processes: TrainingError where it is asked for.
    """
    if processes.size > 1:
        if cfg.cuda_graph:
            raise TrainingError(
                f"cuda_graph: steps of {processes.size} processes, which exchange gradients, are not recorded: "
                f"leave --cuda-graph out"
            )
        return False
    if cfg.cuda_graph is not None:
        return cfg.cuda_graph
    return device_type == "cuda" and not cfg.compile and not cfg.activation_checkpointing


class GraphedStep:
    """`step(micro_batches, lr)`, which updates `model` by `optimizer`, taken by a graph once that was checked.

    `step` is `training_step` with all other arguments given, and takes the learning rate as a tensor, too.
    """

    def __init__(
        self,
        step: Callable[[Sequence[Batch], float | Tensor], Tensor],
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        recorder: cuda_graph.Recorder,
    ) -> None:
        self._step, self._model, self._optimizer, self._precision = step, model, optimizer, precision
        self._recorder = recorder
        self._lr = torch.zeros((), device=precision.device)
        self._inputs: list[Batch] = []  # what the graph reads
        self._replay: Callable[[], Tensor] | None = None
        self._steps_to_check = CHECKED_STEPS
        self.reason: str | None = None  # why steps are taken eagerly

    def __call__(self, micro_batches: Sequence[Batch], lr: float) -> Tensor:
        """One optimizer step; returns the loss, on the device."""
        if self.reason is not None:
            return self._step(micro_batches, lr)
        self._lr.fill_(lr)
        if not self._inputs:
            self._inputs = [(x.clone(), y.clone()) for x, y in micro_batches]
            return self._recorder.warm_up(self._eagerly)
        if [x.shape for x, _ in micro_batches] != [x.shape for x, _ in self._inputs]:
            return self._step(micro_batches, self._lr)
        for ours, theirs in zip(self._inputs, micro_batches, strict=True):
            for buffer, tensor in zip(ours, theirs, strict=True):
                buffer.copy_(tensor)
        if self._replay is None:
            self._replay = self._recorded()
        if self._replay is None:
            return self._step(micro_batches, lr)
        if self._steps_to_check > 0:
            return self._checked(self._replay)
        return self._replay().clone()  # the next replay writes into the same tensor

    def _eagerly(self) -> Tensor:
        return self._step(self._inputs, self._lr)

    def _recorded(self) -> Callable[[], Tensor] | None:
        reason = cuda_graph.why_not_recorded(self._model)
        if reason is not None:
            self._give_up(reason)
            return None
        try:
            for group in self._optimizer.param_groups:
                group["capturable"] = True  # the optimizer asks for this while it is recorded, and warns elsewhere
            return self._recorder.record(self._eagerly)
        except Exception as error:  # a driver or a compiler may raise anything
            self._undo_half_a_step()
            self._give_up(cuda_graph.words(error))
            return None
        finally:
            for group in self._optimizer.param_groups:
                group["capturable"] = False

    def _undo_half_a_step(self) -> None:
        """No kernel has run, but gradients, scaler and optimizer may hold tensors in the memory of the failed graph."""
        self._optimizer.zero_grad(set_to_none=True)
        scaler = self._precision.scaler
        if scaler.is_enabled():
            scaler.update(scaler.get_scale())  # forgets what was found in this step's gradients
            for name in ("grad_scale", "found_inf"):
                self._optimizer.__dict__.pop(name, None)

    def _checked(self, replay: Callable[[], Tensor]) -> Tensor:
        """The step twice from the same state: by the graph, and eagerly, which is what counts."""
        before, scale_before = self._state(), self._precision.scaler.state_dict()
        device = self._precision.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            loss_by_graph = replay().clone()
        by_graph, scale_by_graph = self._state(), self._precision.scaler.state_dict()
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(before[name])
        if scale_before:
            self._precision.scaler.load_state_dict(scale_before)
        loss = self._eagerly()
        before["the loss"], by_graph["the loss"] = torch.zeros_like(loss), loss_by_graph
        problem = _difference(before, by_graph, self._tensors() | {"the loss": loss})
        if problem is None and self._precision.scaler.state_dict() != scale_by_graph:
            problem = "its scale of the gradients is another one"
        self._steps_to_check -= 1
        if problem is not None:
            self._replay = None
            self._give_up(f"it does not do what an eager step does: {problem}")
        return loss

    def _tensors(self) -> dict[str, Tensor]:
        """What a step changes, by name."""
        parameters = dict(self._model.named_parameters())
        tensors: dict[str, Tensor] = {**parameters, **dict(self._model.named_buffers())}
        for name, parameter in parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{key} of {name}"] = value
        return tensors

    def _state(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()}

    def _give_up(self, reason: str) -> None:
        self.reason = cuda_graph.said("training", reason)


@torch.no_grad()
def _difference(before: dict[str, Tensor], by_graph: dict[str, Tensor], eager: dict[str, Tensor]) -> str | None:
    """Which tensor the graph has changed otherwise than the eager step did, and by how much; None if none."""
    errors = torch.stack([(by_graph[name].double() - tensor.double()).norm() for name, tensor in eager.items()])
    changes = torch.stack([(before[name].double() - tensor.double()).norm() for name, tensor in eager.items()])
    for name, error, change in zip(eager, errors.tolist(), changes.tolist(), strict=True):
        if not error <= TOLERANCE * change:  # NaN, too
            return f"{name} changes by {change:.3g}, and by the graph to something {error:.3g} away"
    return None


def try_out(device: torch.device) -> str | None:
    """Why a small model's training on `device` goes on without a graph; None where graph and eager steps agree."""
    precision = Precision(device)
    model = GPT(GPTConfig(vocab_size=65, block_size=64, n_layer=2, n_head=2, n_embd=64)).to(device)
    optimizer = make_optimizer(model, TrainConfig())
    tokens = torch.randint(65, (CHECKED_STEPS + 2, 4, 65), device=device)

    def step(micro_batches: Sequence[Batch], lr: float | Tensor) -> Tensor:
        return training_step(model, model.loss, optimizer, micro_batches, precision, 1.0, lr)

    graphed = GraphedStep(step, model, optimizer, precision, cuda_graph.recorder(device))
    for batch in tokens:
        graphed([(batch[:, :-1], batch[:, 1:])], 1e-3)
    return graphed.reason
