"""The state of a run as a checkpoint, and back: weights, moments, counters, gradient scaler, dropout's random state."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, CheckpointError, check_same, model_tensors
from ..data.corpus import Corpus
from .muon import Muon

if TYPE_CHECKING:
    from .loop import Trainer

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, by AdamW's own names
MUON_MOMENTS = ("momentum_buffer",)  # Muon's, of a matrix
COUNTERS: dict[str, Any] = {"step": int, "tokens": int, "elapsed_s": (int, float), "best_val": (int, float, type(None))}
Moments = dict[str, dict[str, Tensor]]  # of each parameter, by their kind


def take(trainer: Trainer) -> Checkpoint:
    """The state of the run. The tensors are its own, not copies; of DTensors each process has its shard."""
    model, device, scaler = trainer.model, trainer.device, trainer.precision.scaler
    tensors = {f"model.{name}": tensor for name, tensor in model_tensors(model).items()}
    for name, parameter in _trained(model).items():
        moments = trainer.optimizer.state.get(parameter)
        for kind in _kinds_of(parameter, trainer.optimizer):
            zeros = torch.zeros((), dtype=torch.float32) if kind == "step" else torch.zeros_like(parameter)
            tensors[f"{kind}.{name}"] = moments[kind] if moments else zeros
    tensors["rng.cpu"] = torch.get_rng_state()
    if device.type != "cpu":
        tensors[f"rng.{device.type}"] = torch.get_device_module(device).get_rng_state(device)
    state = {**trainer.state, "train_tokens": len(trainer.corpus.train), "data": trainer.corpus.fingerprint}
    if scaler.is_enabled():
        state["scaler"] = scaler.state_dict()
    return Checkpoint(
        dataclasses.asdict(model.cfg),
        dataclasses.asdict(trainer.cfg),
        state,
        trainer.corpus.tokenizer.to_json(),
        tensors,
        model=model.kind,
    )


def restore(trainer: Trainer, saved: Checkpoint) -> None:
    """Give the run the state of `saved`. Raises CheckpointError, and changes nothing, where it does not fit."""
    weights = model_tensors(trainer.model)
    check_same(saved.path, "model", saved.part("model"), weights)
    _check_data(saved, trainer.corpus)
    _check_counters(saved)
    moments = _empty_moments(trainer)
    frozen = {name for name, _ in trainer.model.named_parameters()} - moments.keys()
    saved = _with_checked_moments(saved, moments, frozen)
    scaler = _checked_scaler(saved, trainer.precision.scaler.state_dict())
    _restore_random_state(saved, trainer.device)
    targets = {f"model.{name}": tensor for name, tensor in weights.items()}
    if saved.state["step"] > 0:  # else the optimizer makes its zeros itself
        targets |= {f"{kind}.{name}": t for name, kinds in moments.items() for kind, t in kinds.items()}
    saved.read_into(targets)
    trainer.precision.scaler.load_state_dict(scaler)
    trainer.state = {key: saved.state[key] for key in trainer.state}
    if trainer.state["step"] > 0:
        trainer.optimizer.state.update({p: moments[name] for name, p in _trained(trainer.model).items()})


def _trained(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters that are not frozen, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _kinds_of(parameter: Tensor, optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The kinds of moments that the optimizer keeps of a parameter."""
    by_muon = optimizer.matrices if isinstance(optimizer, Muon) else ()
    return MUON_MOMENTS if any(parameter is matrix for matrix in by_muon) else MOMENTS


def _check_data(saved: Checkpoint, corpus: Corpus) -> None:
    n = saved.state.get("train_tokens")
    if n != len(corpus.train):
        raise CheckpointError(
            f"{saved.path}: field 'train_tokens' is {n}, but the data given has {len(corpus.train)}: resume with the "
            f"data the run was started with"
        )
    if "data" in saved.state and not corpus.has_fingerprint(saved.state["data"]):  # older ones do not say
        raise CheckpointError(
            f"{saved.path}: field 'data' is not the fingerprint of the data given, which is as long, but not the same: "
            f"resume with the data the run was started with"
        )


def _check_counters(saved: Checkpoint) -> None:
    """Raise CheckpointError for the first counter of a run that is missing in `saved` or cannot be one."""
    for name, kinds in COUNTERS.items():
        if name not in saved.state:
            raise CheckpointError(f"{saved.path}: field 'state' has no {name!r}")
        value = saved.state[name]
        if not isinstance(value, kinds) or (isinstance(value, (int, float)) and not value >= 0):
            raise CheckpointError(f"{saved.path}: field {name!r} of 'state' is {value!r}, which a run cannot have")


def _empty_moments(trainer: Trainer) -> Moments:
    """Memory for the optimizer's state."""
    fused = trainer.optimizer.param_groups[-1]["fused"]
    step_device = trainer.device if fused else torch.device("cpu")  # AdamW's rule
    return {
        name: {
            kind: torch.empty((), dtype=torch.float32, device=step_device)
            if kind == "step"
            else torch.empty_like(parameter.detach())
            for kind in _kinds_of(parameter, trainer.optimizer)
        }
        for name, parameter in _trained(trainer.model).items()
    }


def _with_checked_moments(saved: Checkpoint, moments: Moments, frozen: set[str]) -> Checkpoint:
    """`saved`, whose optimizer state fits `moments`. What older checkpoints have of `frozen` parameters may stay."""
    if not saved.part("step"):  # an older checkpoint, whose parameters all took every step
        step = torch.tensor(saved.state["step"], dtype=torch.float32)
        steps = {f"step.{name}": step for name, kinds in moments.items() if "step" in kinds}
        saved = dataclasses.replace(saved, tensors=saved.tensors | steps)
    for kind in MOMENTS + MUON_MOMENTS:
        expected = {name: kinds[kind] for name, kinds in moments.items() if kind in kinds}
        found = {name: tensor for name, tensor in saved.part(kind).items() if name not in frozen}
        check_same(saved.path, kind, found, expected)
    return saved


def _checked_scaler(saved: Checkpoint, now: dict[str, Any]) -> dict[str, Any]:
    """The saved state of the gradient scaler, or its present state where the checkpoint has none."""
    found = saved.state.get("scaler", now)
    if not isinstance(found, dict) or not all(isinstance(found.get(key), (int, float)) for key in now):
        raise CheckpointError(f"{saved.path}: field 'scaler' of 'state' is no state of a gradient scaler")
    return found


def _restore_random_state(saved: Checkpoint, device: torch.device) -> None:
    """Set the random generators' states. A state from another kind of device is left out."""
    states, name = saved.read("rng"), "cpu"
    if name not in states:
        raise CheckpointError(f"{saved.path}: tensor rng.cpu is missing")
    try:
        torch.set_rng_state(states[name])
        if device.type != "cpu" and (name := device.type) in states:
            torch.get_device_module(device).set_rng_state(states[name], device)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{saved.path}: tensor rng.{name} is not a random state ({error})") from None
