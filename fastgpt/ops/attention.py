"""Scaled dot product attention: softmax(q k^T * scale + causal mask), dropped out, times v.

The way of a call: `attention` checks the arguments; `backend.dispatch` chooses; `attention_on_torch` computes, or
`attention_on_triton` calls the registered op, whose `_forward` launches the kernel of triton_kernels/attention.py, or
`attention_on_native` calls the kernel of csrc/attention_rows.h. The other op files are built alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MAX_HEAD_SIZE
from . import native
from .arguments import as_dropout, as_number, autocast_dtype, check_bool, check_float, check_like
from .backend import Absent, Slower, choose, dispatch, register
from .dropout import dropout, first_sequence_of, philox_keep_mask, within_rows
from .library import define_op, inside_transform, refuse_forward_mode
from .reference import causal_mask
from .triton_backend import seed_tensor

_FEW_QUERIES = 4
_SMALLEST_SCALE = 2.0**-126  # of the normal numbers of float32
_LARGEST_SCALE = 2.0**32  # times a key, it is far from the largest number of float32


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every query over the keys it may see (Vaswani et al. 2017; FlashAttention, Dao et al. 2022).

    Args:
        q: (B, H, Tq, D), float16, bfloat16, float32 or float64; any strides; D at most 256.
        k, v: (B, Hkv, Tk, D), like q; Hkv divides H, and H / Hkv neighbouring query heads share one key head.
        is_causal: query i sees key j when j <= i + Tk - Tq (aligned to the bottom right). A query that sees no key,
            which happens for Tq > Tk, gives zeros.
        scale: factor of the scores; None is 1 / sqrt(D).
        dropout_p: probability, in [0, 1), of dropping an attention weight.
        seed: int, or 0-dim int64 tensor: the Philox key of the dropout mask (see `ops/dropout.py`, row
            (b * H + h) * Tq + i, column j). None draws from torch's generator.
        backend: "auto", "torch", "triton" or "native".

    Returns: (B, H, Tq, D), the dtype of q (under autocast: the autocast dtype).
    Raises: TypeError, ValueError naming the argument; BackendError where a named backend cannot serve.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_float(name, tensor, ndim=4)
    dtype = autocast_dtype(q)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)
    B, H, _, D = q.shape
    Hkv = k.shape[1]
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"k: expected shape ({B}, Hkv, Tk, {D}) to fit q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    if (H == 0) != (Hkv == 0) or (Hkv and H % Hkv):
        raise ValueError(f"k: its {Hkv} heads do not divide the {H} heads of q")
    if not 0 < D <= MAX_HEAD_SIZE:
        raise ValueError(f"q: head size {D} is outside 1..{MAX_HEAD_SIZE}")
    check_bool("is_causal", is_causal)
    if scale is not None:
        scale = as_number("scale", scale)
        if not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number or None, got {scale}")
    dropout_p, seed = as_dropout(dropout_p, seed)
    return dispatch("attention", backend, q, k, v, is_causal=is_causal, scale=scale, dropout_p=dropout_p, seed=seed)


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, ...]:
    """q, k and v, (B, H, T, D) each, as views of qkv (B, T, 3 C), where a linear layer wrote them side by side."""
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    return tuple(x.view(B, T, n_head, C // n_head).transpose(1, 2) for x in qkv.split(C, dim=2))


def self_attention(
    qkv: Tensor, n_head: int, *, is_causal: bool = True, dropout_p: float = 0.0, backend: str = "auto"
) -> Tensor:
    """`attention` of the heads in qkv: (B, T, 3 C) -> (B, T, C), the heads side by side again.

    Our kernels write the gradient of qkv itself; for Triton's this is a variant with a self-test of its own. Otherwise
    autograd copies those of q, k and v into one tensor.
    """
    dtype = autocast_dtype(qkv)
    if dtype is not None and qkv.dtype != torch.float64:
        qkv = qkv.to(dtype)
    q, k, v = split_heads(qkv, n_head)
    needs_gradient = torch.is_grad_enabled() and qkv.requires_grad
    if qkv.is_cpu or needs_gradient:
        options = {"is_causal": is_causal, "dropout_p": dropout_p, "route": "self_attention"}
        taken = choose("attention", backend, qkv.device.type, (q, k, v), options)[0]
        if taken == "native":
            return self_attention_on_native(qkv, n_head, is_causal, None, dropout_p, None)
        if taken == "triton" and needs_gradient:
            return self_attention_on_triton(qkv, n_head, is_causal, None, dropout_p, None)
    return attention(q, k, v, is_causal=is_causal, dropout_p=dropout_p, backend=backend).transpose(1, 2).flatten(2)


def attention_on_torch(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None, dropout_p: float, seed: int | Tensor | None
) -> Tensor:
    """PyTorch's fused kernel; on a CPU and for a seeded mask, whose dropout that kernel cannot do, the formula."""
    Tq, Tk = q.shape[2], k.shape[2]
    if q.shape[1] == 0:  # torch 2.11's kernel would divide by the number of heads, and end the process
        return q @ k.transpose(-2, -1) @ v
    if is_causal and Tq > Tk:  # the first rows see no key
        n_without_keys = Tq - Tk
        if dropout_p == 0.0 or seed is None:  # a seeded mask depends on the row's number, so no row is cut off
            rows = q[:, :, n_without_keys:]
            seen = attention_on_torch(rows, k, v, is_causal=True, scale=scale, dropout_p=dropout_p, seed=None)
            return F.pad(seen, (0, 0, n_without_keys, 0))
    if dropout_p > 0.0 and q.device.type != "cpu" and within_rows():  # that kernel cannot draw a part of a mask
        seed = seed_tensor(dropout_p, seed, q.device)
    if dropout_p > 0.0 and (seed is not None or q.device.type == "cpu"):
        if autocast_dtype(q) is None:
            return _with_explicit_dropout(q, k, v, is_causal, scale, dropout_p, seed)
        with torch.autocast(q.device.type, enabled=False):  # it would make the float32 products in half precision
            return _with_explicit_dropout(q, k, v, is_causal, scale, dropout_p, seed)
    if scale is not None and scale <= 0.0:  # PyTorch's CPU kernel multiplies the mask's -inf by the scale
        q, scale = (q * 0.0, 1.0) if scale == 0.0 else (-q, -scale)
    # `if` makes a bool of each comparison: a comparison of symbolic sizes gives a SymBool.
    mask, square = None, False
    if is_causal and Tq > 1:
        if Tq == Tk:
            square = True
        else:
            mask = causal_mask(Tq, Tk, q.device)
    grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=square, scale=scale, enable_gqa=grouped
    )


def _with_explicit_dropout(q, k, v, is_causal, scale, dropout_p, seed):
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    out_dtype = q.dtype
    if out_dtype in (torch.float16, torch.bfloat16):  # scores in half precision overflow, or are too coarse for softmax
        q, k, v = q.float(), k.float(), v.float()
    if k.shape[1] != H:
        k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(D) if scale is None else scale)  # (B, H, Tq, Tk)
    if is_causal:
        mask = causal_mask(Tq, Tk, q.device)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # a row of -inf would give NaN
    weights = torch.softmax(scores, dim=-1)
    if is_causal and Tq > Tk:
        weights = weights.masked_fill(~mask, 0.0)
    if seed is None:
        weights = dropout(weights, dropout_p)
    else:
        first_row = first_sequence_of(q, dropout_p) * H * Tq
        keep = philox_keep_mask(seed, dropout_p, B * H * Tq, Tk, q.device, first_row).view(B, H, Tq, Tk)
        weights = weights * keep.to(weights.dtype) * (1.0 / (1.0 - dropout_p))
    return (weights @ v).to(out_dtype)


# --- the triton backend: triton_kernels/attention.py ------------------------------------------------------------------


def _forward(q, k, v, seed, is_causal, scale, dropout_p, first_sequence):
    from ..triton_kernels import attention

    return attention.forward(q, k, v, is_causal, scale, dropout_p, seed, first_sequence)


def _forward_fake(q, k, v, seed, is_causal, scale, dropout_p, first_sequence):
    return _empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _gradients(grad_out, q, k, v, out, lse, seed, is_causal, scale, dropout_p, first_sequence, output_mask):
    from ..triton_kernels import attention

    options = (is_causal, scale, dropout_p, seed)
    return attention.backward(grad_out, q, k, v, out, lse, *options, output_mask, first_sequence)


def _gradients_fake(grad_out, q, k, v, out, lse, seed, is_causal, scale, dropout_p, first_sequence, output_mask):
    return tuple(_empty_heads(x) if asked else x.new_empty(0) for x, asked in zip((q, k, v), output_mask, strict=True))


def _empty_heads(like: Tensor) -> Tensor:
    """The shape of `like`, (B, H, T, D), in the layout the kernels write: (B, T, H, D)."""
    return like.new_empty(like.transpose(1, 2).shape).transpose(1, 2)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, seed, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, seed)


def _backward(gradients: Callable[..., tuple], ctx: Any, grad_out: Tensor | None, *unused: Tensor | None) -> tuple:
    if grad_out is None:
        return (None,) * 8
    q, k, v, out, lse, seed = ctx.saved_tensors
    asked = ctx.needs_input_grad[:3]
    grads = gradients(grad_out, q, k, v, out, lse, seed, *ctx.options, asked)
    return *(grad if needed else None for grad, needed in zip(grads, asked, strict=True)), *(None,) * 5


def _flops(q: Any, k: Any, *rest: Any, **options: Any) -> Any:
    B, H, Tq, D = q
    return 4 * B * H * Tq * k[2] * D


def _backward_flops(grad_out: Any, q: Any, k: Any, *rest: Any, **options: Any) -> Any:
    """Up to five products: the scores again, and the gradients of the weights, q, k and v that are asked for."""
    needs_q, needs_k, needs_v = rest[-1]
    return (1 + needs_v + (needs_q or needs_k) + needs_q + needs_k) * (_flops(q, k) // 2)


_attention_triton_backward = define_op(
    "attention_triton_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? seed, "
    "bool is_causal, float scale, float dropout_p, int first_sequence, bool[3] output_mask) "
    "-> (Tensor, Tensor, Tensor)",
    forward=_gradients,
    fake=_gradients_fake,
    is_gradient=True,
    flops=_backward_flops,
)
_attention_triton = define_op(
    "attention_triton(Tensor q, Tensor k, Tensor v, Tensor? seed, bool is_causal, float scale, float dropout_p, "
    "int first_sequence) -> (Tensor, Tensor)",
    forward=_forward,
    fake=_forward_fake,
    save=_save,
    backward=partial(_backward, _attention_triton_backward),
    flops=_flops,
)


def attention_on_triton(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None, dropout_p: float, seed: int | Tensor | None
) -> Tensor:
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    key, first = seed_tensor(dropout_p, seed, q.device), first_sequence_of(q, dropout_p)
    refuse_forward_mode("attention", q, k, v)
    return _attention_triton(q, k, v, key, is_causal, scale, dropout_p, first)[0]


# q, k and v side by side: the same kernels, whose gradients are one tensor


def _heads_side_by_side(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, C), a view of what the kernels write."""
    return x.transpose(1, 2).flatten(2)


def _packed_forward(qkv, n_head, seed, is_causal, scale, dropout_p, first_sequence):
    out, lse = _forward(*split_heads(qkv, n_head), seed, is_causal, scale, dropout_p, first_sequence)
    return _heads_side_by_side(out), lse


def _packed_forward_fake(qkv, n_head, seed, is_causal, scale, dropout_p, first_sequence):
    B, T, width = qkv.shape
    return qkv.new_empty((B, T, width // 3)), qkv.new_empty((B, n_head, T), dtype=torch.float32)


def _packed_gradient(grad_out, qkv, out, lse, n_head, seed, is_causal, scale, dropout_p, first_sequence):
    from ..triton_kernels import attention

    grad_out, out = (x.unflatten(2, (n_head, -1)).transpose(1, 2) for x in (grad_out, out))
    packed = qkv.unflatten(2, (3, n_head, -1))
    options = (is_causal, scale, dropout_p, seed, first_sequence)
    return attention.packed_backward(grad_out, packed, out, lse, *options).flatten(2)


def _packed_gradient_fake(grad_out, qkv, out, lse, n_head, seed, is_causal, scale, dropout_p, first_sequence):
    return qkv.new_empty(qkv.shape)


def _packed_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, ctx.n_head, seed, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, out, lse, seed)


def _packed_backward(
    gradient: Callable[..., Tensor], ctx: Any, grad_out: Tensor | None, *unused: Tensor | None
) -> tuple:
    if grad_out is None or not ctx.needs_input_grad[0]:
        return (None,) * 7
    qkv, out, lse, seed = ctx.saved_tensors
    grad = gradient(grad_out, qkv, out, lse, ctx.n_head, seed, *ctx.options)
    return grad, *(None,) * 6


def _packed_flops(qkv: Any, *rest: Any, **options: Any) -> Any:
    B, T, width = qkv
    return 4 * B * T * T * (width // 3)


def _packed_backward_flops(grad_out: Any, qkv: Any, *rest: Any, **options: Any) -> Any:
    return 5 * (_packed_flops(qkv) // 2)


_attention_packed_backward = define_op(
    "attention_packed_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int n_head, Tensor? seed, "
    "bool is_causal, float scale, float dropout_p, int first_sequence) -> Tensor",
    forward=_packed_gradient,
    fake=_packed_gradient_fake,
    is_gradient=True,
    flops=_packed_backward_flops,
)
_attention_packed = define_op(
    "attention_packed(Tensor qkv, int n_head, Tensor? seed, bool is_causal, float scale, float dropout_p, "
    "int first_sequence) -> (Tensor, Tensor)",
    forward=_packed_forward,
    fake=_packed_forward_fake,
    save=_packed_save,
    backward=partial(_packed_backward, _attention_packed_backward),
    flops=_packed_flops,
)


def self_attention_on_triton(
    qkv: Tensor, n_head: int, is_causal: bool, scale: float | None, dropout_p: float, seed: int | Tensor | None
) -> Tensor:
    scale = 1.0 / math.sqrt(qkv.shape[2] // 3 // n_head) if scale is None else float(scale)
    key, first = seed_tensor(dropout_p, seed, qkv.device), first_sequence_of(qkv, dropout_p)
    refuse_forward_mode("attention", qkv)
    return _attention_packed(qkv, n_head, key, is_causal, scale, dropout_p, first)[0]


def _triton_serves(q: Tensor, *rest: Any, scale: float | None = None, **options: Any) -> str | None:
    if q.dtype == torch.float64:
        return "float64 is not supported: the kernels keep their statistics in float32"
    if scale is not None and scale <= 0.0:
        return "scale must be positive: the kernels find the largest score before they multiply by the scale"
    if scale is not None and scale < _SMALLEST_SCALE:
        return f"scale must be at least {_SMALLEST_SCALE:.1e}: the kernels take it in float32, where it would be 0"
    return inside_transform()


def _triton_unproved(q: Tensor, *rest: Any, **options: Any) -> str | None:
    if (autocast_dtype(q) or q.dtype) == torch.float32:
        return Slower("in float32, also with TF32, PyTorch's kernel is faster on a GPU, but for the smallest calls")
    return None


# --- the native backend: csrc/attention_rows.h ------------------------------------------------------------------------


def _native_gradients_fake(*args):
    return _gradients_fake(*args[:11], args[11:])


def _native_backward_flops(*args, **options):
    return _backward_flops(*args[:11], args[11:])


_attention_native_backward = define_op(
    "attention_native_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? seed, "
    "bool is_causal, float scale, float dropout_p, int first_sequence, bool needs_q, bool needs_k, bool needs_v) "
    "-> (Tensor, Tensor, Tensor)",
    forward=native.load_at_first_call("attention_native_backward"),
    fake=_native_gradients_fake,
    is_gradient=True,
    flops=_native_backward_flops,
)
_attention_native = define_op(
    "attention_native(Tensor q, Tensor k, Tensor v, Tensor? seed, bool is_causal, float scale, float dropout_p, "
    "int first_sequence) -> (Tensor, Tensor)",
    forward=native.load_at_first_call("attention_native"),
    fake=_forward_fake,
    save=_save,
    backward=partial(_backward, lambda *args: _attention_native_backward(*args[:-1], *args[-1])),
    flops=_flops,
)
_attention_packed_native_backward = define_op(
    "attention_packed_native_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int n_head, Tensor? seed, "
    "bool is_causal, float scale, float dropout_p, int first_sequence) -> Tensor",
    forward=native.load_at_first_call("attention_packed_native_backward"),
    fake=_packed_gradient_fake,
    is_gradient=True,
    flops=_packed_backward_flops,
)
_attention_packed_native = define_op(
    "attention_packed_native(Tensor qkv, int n_head, Tensor? seed, bool is_causal, float scale, float dropout_p, "
    "int first_sequence) -> (Tensor, Tensor)",
    forward=native.load_at_first_call("attention_packed_native"),
    fake=_packed_forward_fake,
    save=_packed_save,
    backward=partial(_packed_backward, _attention_packed_native_backward),
    flops=_packed_flops,
)


def attention_on_native(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None, dropout_p: float, seed: int | Tensor | None
) -> Tensor:
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    key, first = seed_tensor(dropout_p, seed, q.device), first_sequence_of(q, dropout_p)
    refuse_forward_mode("attention", q, k, v)
    return _attention_native(q, k, v, key, is_causal, scale, dropout_p, first)[0]


def self_attention_on_native(
    qkv: Tensor, n_head: int, is_causal: bool, scale: float | None, dropout_p: float, seed: int | Tensor | None
) -> Tensor:
    scale = 1.0 / math.sqrt(qkv.shape[2] // 3 // n_head) if scale is None else float(scale)
    key, first = seed_tensor(dropout_p, seed, qkv.device), first_sequence_of(qkv, dropout_p)
    refuse_forward_mode("attention", qkv)
    return _attention_packed_native(qkv, n_head, key, is_causal, scale, dropout_p, first)[0]


def _native_serves(q: Tensor, *rest: Any, scale: float | None = None, **options: Any) -> str | None:
    if not q.is_cpu:
        return Absent("its kernels for attention run on CPUs")
    if q.dtype == torch.float64:
        return "float64 is not supported: the kernels keep their statistics in float32"
    if scale is not None and abs(scale) > _LARGEST_SCALE:
        return f"scale must be at most {_LARGEST_SCALE:.1e}: the kernels multiply the keys by it, in float32"
    return inside_transform()


def _native_unproved(q: Tensor, *rest: Any, **options: Any) -> str | None:
    if not torch.compiler.is_compiling() and q.shape[-2] < _FEW_QUERIES:
        return Slower(f"for fewer than {_FEW_QUERIES} queries PyTorch's kernel is faster")
    return native.slower_without_avx()


register("attention", "torch", attention_on_torch)
register("attention", "native", attention_on_native, _native_serves, _native_unproved)
register("attention", "triton", attention_on_triton, _triton_serves, _triton_unproved)
register("self_attention", "triton", self_attention_on_triton)  # "attention" is what is chosen; this is its self-test's
