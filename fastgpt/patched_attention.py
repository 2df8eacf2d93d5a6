"""Attention in other people's models: two ways in which `ops.attention` is called where they call PyTorch's function.

Models of `transformers` look their attention function up in a registry, by a name in their config: `register` adds
"fastgpt" to it. Other modules call `torch.nn.functional.scaled_dot_product_attention` in their own forward: while the
forward of a `CallsAttention` runs, a TorchFunctionMode of PyTorch's hands these calls to `ops.attention`. Neither
changes a function that anyone else calls.

The op takes a call where it computes the same: a causal square, or every query sees every key. PyTorch's function
takes the others: a mask, as batches of unequal lengths have, and causal queries beside older keys, which PyTorch aligns
to the upper left and the op to the bottom right.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import ops
from .config import MAX_HEAD_SIZE
from .nn import is_dense_float

NAME = "fastgpt"  # in the registry of transformers
PYTORCHS = "sdpa"  # the registry's name of the function that it takes the place of


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, by `ops.attention` where that computes the same."""
    heads_fit = key.shape[-3:-2] == query.shape[-3:-2] or enable_gqa
    is_square = query.shape[-2:-1] == key.shape[-2:-1]
    if attn_mask is None and heads_fit and (is_square or not is_causal) and _op_takes(query, key, value, dropout_p):
        return ops.attention(query, key, value, is_causal=is_causal, scale=scale, dropout_p=dropout_p)
    options: dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
    return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=enable_gqa, **options)


def _op_takes(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> bool:
    return (
        all(is_dense_float(x) and x.ndim == 4 and x.dtype == q.dtype and x.device == q.device for x in (q, k, v))
        and q.shape[0] == k.shape[0]
        and k.shape == v.shape
        and 0 < q.shape[3] == k.shape[3] <= MAX_HEAD_SIZE
        and 0 < k.shape[1] <= q.shape[1]
        and q.shape[1] % k.shape[1] == 0
        and k.shape[2] > 0  # PyTorch's function has no rows to average over, and gives NaN
        and 0.0 <= dropout_p < 1.0
    )


# --- modules that call PyTorch's function -----------------------------------------------------------------------------


class _TakeCalls(TorchFunctionMode):
    """Inside of it, calls of PyTorch's function are those of the one above; all others are left as they are."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            func = scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


class CallsAttention(nn.Module):
    """A base for classes whose forward calls `torch.nn.functional.scaled_dot_product_attention`.

    Under torch.compile the calls are left alone: torch 2.13 cannot trace every method of a tensor inside of a mode.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        with _TakeCalls():
            return super().forward(*args, **kwargs)


def calls_attention(cls: type[nn.Module]) -> bool:
    """Whether a method of `cls` names PyTorch's function, which is found out by reading its code."""
    own = (base for base in cls.__mro__ if base not in nn.Module.__mro__ and not base.__module__.startswith("torch."))
    methods = (inspect.unwrap(value) for base in own for value in vars(base).values() if inspect.isfunction(value))
    return any(_names(method.__code__, "scaled_dot_product_attention") for method in methods)


def _names(code: Any, name: str) -> bool:
    return name in code.co_names or any(_names(inner, name) for inner in code.co_consts if inspect.iscode(inner))


# --- transformers' registry -------------------------------------------------------------------------------------------


def attention_of_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What the registry of transformers asks for: q (B, H, Tq, D), k, v (B, Hkv, Tk, D) -> (B, Tq, H, D), and None.

    The mask is the one that was made for "sdpa": None for causal attention, or one query that sees all keys.
    """
    Tq = query.shape[2]
    is_plain = attention_mask is None and all(kwargs.get(name) is None for name in _registered["unknown"])
    if not is_plain or not _op_takes(query, key, value, dropout):
        common: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return _registered["sdpa"](module, query, key, value, attention_mask, **common, **kwargs)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = True if Tq > 1 and is_causal else False  # noqa: SIM210 (a comparison of symbolic sizes gives a SymBool)
    if causal and key.shape[2] > Tq:  # a cache of fixed size, still empty behind the first Tq keys
        key, value = key[:, :, :Tq], value[:, :, :Tq]
    y = ops.attention(query, key, value, is_causal=causal, scale=scaling, dropout_p=dropout)
    return y.transpose(1, 2).contiguous(), None


_registered: dict[str, Any] = {}  # "sdpa": their function; "unknown": the names of options that are not known here
_KNOWN = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"}


def register() -> None:
    """Add "fastgpt" to the registries of attention functions and of masks; its masks are those of "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    arguments = inspect.signature(sdpa_attention_forward).parameters
    _registered["unknown"] = (*sorted(set(arguments) - _KNOWN), "softcap", "s_aux", "head_mask")
    _registered["sdpa"] = sdpa_attention_forward
    AttentionInterface.register(NAME, attention_of_transformers)
    AttentionMaskInterface.register(NAME, sdpa_mask)
