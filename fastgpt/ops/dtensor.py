"""Ops on DTensors: the parameters that `fully_shard` and `distribute_tensor` leave in parts on several processes.

Every op of the package takes such parameters where its other arguments are plain tensors: each process's own rows. The
parameters are gathered for the call, which computes on plain tensors, on the backend that it would take anyway. Their
gradients come back in the parameters' own placements, as **the mean over the mesh**. This is what FSDP2 and DDP give:
where every process has equally many rows, a step is that of one process with all rows.

`cross_entropy`, `linear_cross_entropy` and `linear_log_probs` also take their rows as DTensors: replicated, or sharded
along a dimension that comes before that of the classes. All processes then compute one loss, that of all rows, as a
DTensor that is replicated, and the parameters get its gradient; losses and log-probabilities that are not added up stay
sharded as the rows are. The parameters then have to be DTensors, too, and weights of targets DTensors that are sharded
like these.

This module imports nothing of torch.distributed: a DTensor exists only where that is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MODULE = "torch.distributed.tensor"


def is_loaded() -> bool:
    """Whether there may be DTensors."""
    if torch.compiler.is_compiling():  # which would copy sys.modules, while other threads may import
        return hasattr(torch.distributed, "tensor")
    return _MODULE in sys.modules


def is_kind(kind: type) -> bool:
    """Whether `kind` is the class of DTensors."""
    return is_loaded() and kind is torch.distributed.tensor.DTensor


def has_local_tensors(op: str, args: tuple) -> bool:
    """Whether some of `args` are DTensors that `on_local_tensors` replaces; torch.distributed.tensor `is_loaded`.

    Rows that are a DTensor are left to PyTorch's own ops, except for the losses.
    """
    kind = torch.distributed.tensor.DTensor
    return kind in map(type, args) and (op in _ROWS or type(args[0]) is not kind)


def on_local_tensors(op: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """run(*args, **kwargs), the op's own arguments, with plain tensors in place of DTensors."""
    if op in _ROWS and any(is_kind(type(args[i])) for i in _ROWS[op][:2]):
        return _loss_of_all(op, run, args)
    return run(*(_gathered_for_mean(a) if is_kind(type(a)) else a for a in args), **kwargs)


def _gathered_for_mean(parameter: Any) -> Tensor:
    """The whole of a DTensor. Each process has a gradient of its own for it, and the parameter gets their mean."""
    from torch.distributed.tensor import Partial

    n_processes = parameter.device_mesh.size()
    whole = parameter.full_tensor(grad_placements=[Partial()] * parameter.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / n_processes)  # gloo has no mean
    return whole


# --- losses of rows that are DTensors --------------------------------------------------------------------------------

# The places of the rows, their targets and the targets' weights, and of the parameters, among an op's arguments.
_ROWS = {"cross_entropy": (0, 1, 8), "linear_cross_entropy": (0, 2, 9), "linear_log_probs": (0, 2)}
_WEIGHTS = {
    "cross_entropy": {"weight": 2},
    "linear_cross_entropy": {"weight": 1, "bias": 3},
    "linear_log_probs": {"weight": 1, "bias": 3},
}
# The places of the options that say how losses are added up.
_IGNORE_INDEX = {"cross_entropy": 3, "linear_cross_entropy": 4}
_REDUCTION = {"cross_entropy": 4, "linear_cross_entropy": 5}
_RETURN_ACCURACY = {"cross_entropy": 9, "linear_cross_entropy": 10}
# The rows' dimension of the classes, or of the channels. The dimensions before it are the first ones of the targets,
# too: where the rows are sharded along one of them, the targets are sharded alike.
_CLASSES = {"cross_entropy": 1, "linear_cross_entropy": -1, "linear_log_probs": -1}


def _loss_of_all(op: str, run: Callable[..., Any], args: tuple) -> Any:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    x, targets, *token_weight = [args[i] for i in _ROWS[op]]
    _check_rows(op, x, targets, *token_weight)
    mesh, placements = x.device_mesh, x.placements
    # A process whose rows are a part of all has a part of each sum: of the loss, and of the parameters' gradients.
    sums = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    local = list(args)
    for i in _ROWS[op]:
        local[i] = None if args[i] is None else args[i].to_local(grad_placements=placements)
    for name, i in _WEIGHTS[op].items():
        local[i] = None if args[i] is None else _gathered_for_sum(name, args[i], mesh, sums)

    def for_each_target(values: Tensor) -> Any:
        return DTensor.from_local(values, mesh, placements, run_check=False)

    def total(part: Tensor) -> Any:
        return DTensor.from_local(part, mesh, sums, run_check=False)

    if op not in _REDUCTION or args[_REDUCTION[op]] == "none":
        results = run(*local)
        return tuple(map(for_each_target, results)) if isinstance(results, tuple) else for_each_target(results)
    counted = local[_ROWS[op][1]] != args[_IGNORE_INDEX[op]]
    # What is correct has no sum, and the loss of float16 is summed in float32 by linear_cross_entropy alone.
    each = op == "cross_entropy" or args[_RETURN_ACCURACY[op]]
    local[_REDUCTION[op]] = "none" if each else "sum"
    results = run(*local)
    losses, correct = results if isinstance(results, tuple) else (results, None)
    loss = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))
    if args[_REDUCTION[op]] == "mean":
        loss = loss / total(_weights(op, local, counted).to(loss.dtype)).full_tensor()
    replicated = [Replicate()] * mesh.ndim
    whole = total(loss.to(losses.dtype)).redistribute(placements=replicated)
    if correct is None:
        return whole
    n_counted = total(counted.sum()).full_tensor()
    return whole, total(correct.sum() / n_counted).redistribute(placements=replicated)


def _weights(op: str, local: list, counted: Tensor) -> Tensor:
    """The sum of the weights of this process's targets that count."""
    class_weight = local[2] if op == "cross_entropy" else None
    token_weight = local[_ROWS[op][2]]
    if class_weight is None and token_weight is None:
        return counted.sum()
    weights = counted.to(torch.float64 if local[0].dtype == torch.float64 else torch.float32)
    if class_weight is not None:
        weights = class_weight.to(weights.dtype)[local[1].where(counted, 0)].where(counted, 0.0)
    if token_weight is not None:
        weights = weights * token_weight.where(counted, 0.0)
    return weights.sum()


def _check_rows(op: str, x: Any, targets: Any, token_weight: Any = None) -> None:
    name = "logits" if op == "cross_entropy" else "x"
    for argument, tensor in ((name, x), ("targets", targets), ("token_weight", token_weight)):
        if tensor is not None and not is_kind(type(tensor)):
            other = "targets" if argument == name else name
            raise TypeError(f"{argument}: expected a DTensor, as {other} is one, got a plain tensor")
    classes = _CLASSES[op] % x.ndim
    for placement in x.placements:
        if not placement.is_replicate() and not (placement.is_shard() and placement.dim % x.ndim < classes):
            raise ValueError(
                f"{name}: expected a DTensor that is replicated or sharded along its rows, got {x.placements}; "
                f"{name}.redistribute(...) makes it one"
            )
    for argument, tensor in (("targets", targets), ("token_weight", token_weight)):
        if tensor is not None and (x.device_mesh != tensor.device_mesh or x.placements != tensor.placements):
            where = f"{x.placements} on {x.device_mesh}"
            got = f"{tensor.placements} on {tensor.device_mesh}"
            raise ValueError(f"{argument}: expected the placements of {name}, {where}, got {got}")


def _gathered_for_sum(name: str, parameter: Any, mesh: Any, sums: list) -> Tensor:
    if not is_kind(type(parameter)) or parameter.device_mesh != mesh:
        got = parameter.device_mesh if is_kind(type(parameter)) else "a plain tensor"
        raise TypeError(
            f"{name}: expected a DTensor on {mesh}, as the rows are, got {got}; distribute_tensor(...) makes one"
        )
    return parameter.full_tensor(grad_placements=sums)
