"""How the model runs its modules: by FastGPT's ops on their tensors where the result is the same, else by calling them.

The model's parts are PyTorch's own: torch.nn.Linear, LayerNorm and Embedding. Users wrap, hook, parametrise, prune,
quantise and shard them, and tools find them by their types. A fused op needs a module's tensors instead of its result.
Taking the tensors without calling the module is right only where the call would do nothing but compute with them.
`why_called` decides this, here alone; where it finds a reason to call the module, the module is called, and a warning
says once what is not fused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .ops.arguments import autocast_dtype
from .ops.dropout import dropout
from .ops.layer_norm import add_layer_norm_for_reader, layer_norm_for_reader
from .ops.library import HOOKS, has_hooks_of_fsdp_alone, hooks_of, no_parameter
from .ops.linear import linear as fast_linear

# Kept as PyTorch defines them, because some tools replace the forward of a class.
LINEAR, _EMBEDDING, _LAYER_NORM = nn.Linear.forward, nn.Embedding.forward, nn.LayerNorm.forward

_said: set[str] = set()


def why_called(module: nn.Module, forward: Callable[..., Any], *tensors: str) -> str | None:
    """Why `module` must be called; None where `forward` with the parameters named `tensors` gives the same result.

    Generation asks this some thirty times a token, so it has to cost less than a call of the module.
    """
    if type(module).forward is not forward or "forward" in module.__dict__:
        return f"its forward is {_name(module.forward)}"
    if type(module).__call__ is not nn.Module.__call__:  # read here: torch.export replaces it while it traces
        return f"its __call__ is {_name(type(module).__call__)}"
    reason = hooks_of(module)
    for name in tensors:
        reason = reason or no_parameter(module, name)
    return reason


def is_sharded_alone(module: nn.Module, reason: str | None) -> bool:
    """Whether `reason`, of `why_called`, is only that `fully_shard` gathers the parameters of `module` at each call."""
    return reason == HOOKS and not torch.compiler.is_compiling() and has_hooks_of_fsdp_alone(module)


def call_sharded(module: Any, method: str, *args: Any) -> Any:
    """module.method(*args) as a forward of a `module` that `is_sharded_alone`: its parameters are gathered for it."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(module, method)  # in the instance, where copies and pickles would find it
    try:
        return getattr(module, method)(*args)
    finally:
        delattr(module, method)


def check_unchanged(model: nn.Module, plain: nn.Module) -> None:
    """Raise ValueError where `model` has other parameters or modules than `plain`, a new model with its settings.

    A saved folder holds settings and tensors only: a model that was changed would be another one when it is read.
    """
    remedy = "undo what was changed in it before it is saved (merge adapters, remove parametrizations), or save its "
    remedy += "state_dict()"
    for names, names_expected in (
        (dict(model.named_parameters()).keys(), dict(plain.named_parameters()).keys()),  # of tied ones the first
        (model.state_dict().keys(), plain.state_dict().keys()),
    ):
        for name in sorted(names ^ names_expected):
            what = "is not part of" if name in names else "is missing in this model, and part of"
            raise ValueError(f"model: parameter {name} {what} a GPT with its configuration; {remedy}")
    parts = dict(plain.named_modules())
    for name, module in model.named_modules():
        found, expected = _describe(module), _describe(parts.get(name))
        if name and found != expected:
            raise ValueError(f"model: {name} is {found}, and in a GPT with its configuration {expected}; {remedy}")


def _describe(module: nn.Module | None) -> str:
    """Its type and options, without the modules in it."""
    return "nothing" if module is None else f"{type(module).__name__}({module.extra_repr()})"


def _name(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)  # a partial, say
    return f"{named.__module__}.{named.__qualname__}"


def say_once(what: str, reason: str) -> None:
    text = f"fastgpt: {what}: {reason}"
    if torch.compiler.is_compiling() or text in _said:
        return
    _said.add(text)
    warnings.warn(text, stacklevel=4)


def linear(module: Any, x: Tensor) -> Tensor:
    """module(x). A plain Linear on a CPU takes the kernels of `ops.linear` where they are faster."""
    if torch.compiler.is_compiling() or why_called(module, LINEAR, "weight", "bias"):
        return module(x)
    return fast_linear(x, module.weight, module.bias)


def read_dtype(x: Tensor, module: Any, forward: Callable[..., Any], reader: str) -> torch.dtype | None:
    """The dtype to which autocast casts `module`'s input, where its Linear `reader` is all that reads it; else None.

    A norm may then write its result in this dtype. It is the same to the Linear, and saves PyTorch a cast forward and
    one backward. A `module` or Linear that is not plain, whose hooks could see the difference, gets the norm's own.
    """
    dtype = autocast_dtype(x)
    if dtype is None or x.dtype == torch.float64 or why_called(module, forward):
        return None
    return None if why_called(getattr(module, reader), LINEAR, "weight", "bias") else dtype


def norm(module: Any, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """module(x), by `ops.layer_norm`; `dtype` is that of its only reader, see `read_dtype`."""
    if why_norm_called(module):
        return module(x)
    if dtype is not None:
        return layer_norm_for_reader(x, module.weight, module.bias, module.eps, dtype)
    return ops.layer_norm(x, module.weight, module.bias, module.eps)


def add_norm(
    module: Any, x: Tensor, branch: Tensor, dropout_p: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(module(h), h) with h = x + dropout(branch), by `ops.add_layer_norm`; `dtype` as for `norm`."""
    reason = why_norm_called(module)
    if reason is None and dtype is not None:
        return add_layer_norm_for_reader(branch, x, module.weight, module.bias, module.eps, dropout_p, dtype)
    if reason is None:
        return ops.add_layer_norm(branch, x, module.weight, module.bias, module.eps, dropout_p=dropout_p)
    say_once(f"a norm ({type(module).__name__}) is called as a module, not fused with the sum before it", reason)
    h = x + dropout(branch, dropout_p)
    return module(h), h


def why_norm_called(module: Any) -> str | None:
    reason = why_called(module, _LAYER_NORM, "weight", "bias")
    if reason is None and (module.weight is None or len(module.normalized_shape) != 1):
        return f"it is {_describe(module)}"
    return reason


def embed(idx: Tensor, token_embedding: Any, position_embedding: Any = None, start: int = 0) -> Tensor:
    """token_embedding(idx), plus position_embedding of start, start + 1, ... where there is one, by `ops.embedding`.

    idx (B, T) -> (B, T, C).
    """
    reason = why_embedding_called("token_embedding", token_embedding)
    if reason is None and position_embedding is not None:
        reason = why_embedding_called("position_embedding", position_embedding)
    if reason is None:
        positions = None if position_embedding is None else position_embedding.weight
        return ops.embedding(idx, token_embedding.weight, positions, position_offset=start)
    say_once("the embeddings are called as modules, not as one op", reason)
    x = token_embedding(idx)
    if position_embedding is None:
        return x
    return x + position_embedding(torch.arange(start, start + idx.shape[1], device=idx.device))


def why_embedding_called(name: str, module: Any) -> str | None:
    reason = why_called(module, _EMBEDDING, "weight")
    if reason is not None:
        return f"{name}: {reason}"
    for option, usual in (("padding_idx", None), ("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
        value = getattr(module, option)
        if value != usual:  # they change the gradient, or the table itself
            return f"{name}: it has {option}={value}"
    return None


def head_loss(lm_head: Any, x: Tensor, targets: Tensor) -> Tensor:
    """cross_entropy(lm_head(x), targets), by `ops.linear_cross_entropy`: x (..., C), targets (...)."""
    reason = why_called(lm_head, LINEAR, "weight", "bias")
    if reason is None:
        return ops.linear_cross_entropy(x, lm_head.weight, targets, bias=lm_head.bias)
    say_once("lm_head is called as a module, and the logits of all tokens are held at once", reason)
    return ops.cross_entropy(lm_head(x).flatten(0, -2), targets.flatten())
