"""Proof that the ops are right: every op, backend and dtype, forward and each gradient, against the float64 oracle.

The oracle is `ops/reference.py` in float64 on the same inputs, rounded to the dtype under test first: what is measured
is the arithmetic of the op, not the rounding of its inputs. PyTorch's own op in the same dtype is the yardstick
(the rule of flash-attention's tests): a value passes when

    max |ours - oracle|  <=  2 * max |torch - oracle| + atol

with atol = ATOL[dtype] * max(1, largest |oracle|), a few units in the last place, for the cases where PyTorch's error
is zero by luck. Another backend is measured by the same cases: ``run(backends=("native",))``, or one by one:

>>> for case in cases("layer_norm"):
...     for row in measure(case, "triton", torch.float16): assert row.passed, row
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..config import ConfigError
from ..ops import reference
from ..ops.backend import BACKENDS, OPS, BackendError, implements
from ..ops.dropout import philox_keep_mask

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# One unit in the last place of the half types; some for the sums that are taken in another order in the wide ones.
ATOL = {torch.float64: 2e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


# --- the cases -------------------------------------------------------------------------------------------------------


class Draw:
    """Random inputs of one dtype on one device, the same for every backend."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(self.dtype).to(self.device, dtype or self.dtype)

    def index(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)


@dataclass(frozen=True)
class Case:
    """One call of an op: `arguments` makes its tensors (leaves that may be strided views), `options` is the rest."""

    op: str
    name: str
    arguments: Callable[[Draw], dict[str, Tensor | None]]
    options: dict[str, Any] = field(default_factory=dict)
    expanded_grad: bool = False  # the output's gradient is one number with stride 0, as out.sum().backward() gives


def _attention(
    name: str,
    *,
    B: int = 2,
    H: int = 2,
    Hkv: int | None = None,
    Tq: int = 17,
    Tk: int | None = None,
    D: int = 16,
    layout: str = "contiguous",
    expanded_grad: bool = False,
    **options: Any,
) -> Case:
    heads, keys = Hkv or H, Tq if Tk is None else Tk

    def arguments(draw: Draw) -> dict[str, Tensor | None]:
        if layout == "packed":  # the model's: one (B, T, 3 C) projection, split and turned
            q, k, v = (t.view(B, Tq, H, D).transpose(1, 2) for t in draw.normal(B, Tq, 3 * H * D).split(H * D, dim=2))
        elif layout == "expanded":  # one prompt's keys shared by the batch
            q = draw.normal(B, H, Tq, D)
            k, v = (draw.normal(1, heads, keys, D).expand(B, -1, -1, -1) for _ in range(2))
        elif layout == "sliced":  # a cache longer than what is filled, and every second feature
            q = draw.normal(B, H, Tq, 2 * D)[..., ::2]
            k, v = (draw.normal(B, heads, keys + 5, D)[:, :, :keys] for _ in range(2))
        else:
            q = draw.normal(B, H, Tq, D)
            k, v = (draw.normal(B, heads, keys, D) for _ in range(2))
        return {"q": q, "k": k, "v": v}

    return Case("attention", name, arguments, options, expanded_grad)


def _norm(
    op: str,
    name: str,
    *shape: int,
    bias: bool = True,
    layout: str = "contiguous",
    offset: float = 0.0,
    wide_residual: bool = False,
    expanded_grad: bool = False,
    **options: Any,
) -> Case:
    def rows(draw: Draw, dtype: torch.dtype) -> Tensor:
        if layout == "transposed":
            return draw.normal(*shape[:-2], shape[-1], shape[-2], dtype=dtype).transpose(-1, -2)
        if layout == "sliced":
            return draw.normal(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
        if layout == "expanded":
            return draw.normal(1, *shape[1:], dtype=dtype).expand(shape)
        return draw.normal(*shape, dtype=dtype) + offset

    def arguments(draw: Draw) -> dict[str, Tensor | None]:
        wide = torch.promote_types(draw.dtype, torch.float32) if wide_residual else draw.dtype
        made: dict[str, Tensor | None] = {"x": rows(draw, draw.dtype)}
        if op == "add_layer_norm":
            made["residual"] = rows(draw, wide)
        made["weight"] = draw.normal(shape[-1], dtype=wide)
        made["bias"] = draw.normal(shape[-1], dtype=wide) if bias else None
        return made

    return Case(op, name, arguments, options, expanded_grad)


def _embedding(
    name: str,
    *,
    B: int = 2,
    T: int = 7,
    V: int = 11,
    C: int = 16,
    P: int | None = 16,
    layout: str = "contiguous",
    index_dtype: torch.dtype = torch.int64,
    expanded_grad: bool = False,
    **options: Any,
) -> Case:
    def arguments(draw: Draw) -> dict[str, Tensor | None]:
        tokens = draw.index(V, T, B).t() if layout == "strided" else draw.index(V, B, T)
        if layout == "expanded":
            tokens = tokens[:1].expand(B, T)
        columns = slice(None, None, 2) if layout == "strided" else slice(None)
        width = 2 * C if layout == "strided" else C
        return {
            "tokens": tokens.to(index_dtype),
            "token_table": draw.normal(V, width)[:, columns],
            "position_table": None if P is None else draw.normal(P, width)[:, columns],
        }

    return Case("embedding", name, arguments, options, expanded_grad)


def _cross_entropy(
    name: str,
    *shape: int,
    weight: bool = False,
    ignored: int = 0,
    layout: str = "contiguous",
    scale: float = 2.0,
    index_dtype: torch.dtype = torch.int64,
    expanded_grad: bool = False,
    **options: Any,
) -> Case:
    """`shape` is that of the logits; the first `ignored` targets are ignore_index."""

    def arguments(draw: Draw) -> dict[str, Tensor | None]:
        if layout == "channels last":  # (N, d1, C) in memory, as a model writes it
            logits = draw.normal(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        elif layout == "expanded":
            logits = draw.normal(1, *shape[1:]).expand(shape)
        elif layout == "sliced":
            logits = draw.normal(shape[0], shape[1] + 3)[:, :-3]
        else:
            logits = draw.normal(*shape)
        class_dim = 0 if len(shape) == 1 else 1
        targets = draw.index(shape[class_dim], *shape[:class_dim], *shape[class_dim + 1 :])
        targets.view(-1)[:ignored] = options.get("ignore_index", -100)
        return {
            "logits": logits * scale if layout == "contiguous" else logits,
            "targets": targets.to(index_dtype),
            "weight": draw.normal(shape[class_dim]).abs() + 0.1 if weight else None,
        }

    return Case("cross_entropy", name, arguments, options, expanded_grad)


def _linear_cross_entropy(
    name: str,
    *shape: int,
    V: int = 37,
    bias: bool = False,
    ignored: int = 0,
    layout: str = "contiguous",
    scale: float = 1.0,
    index_dtype: torch.dtype = torch.int64,
    expanded_grad: bool = False,
    **options: Any,
) -> Case:
    """`shape` is that of x, (..., C)."""

    def arguments(draw: Draw) -> dict[str, Tensor | None]:
        C = shape[-1]
        if layout == "transposed":
            x, weight = draw.normal(C, shape[0]).t(), draw.normal(C, V).t()
        elif layout == "sliced":
            x, weight = draw.normal(*shape[:-1], 2 * C)[..., ::2], draw.normal(V, C + 3)[:, :-3]
        elif layout == "expanded":
            x, weight = draw.normal(1, *shape[1:]).expand(shape), draw.normal(V, C)
        else:
            x, weight = draw.normal(*shape) * scale, draw.normal(V, C)
        targets = draw.index(V, *shape[:-1])
        targets.view(-1)[:ignored] = options.get("ignore_index", -100)
        return {
            "x": x,
            "weight": weight,
            "targets": targets.to(index_dtype),
            "bias": draw.normal(V) if bias else None,
        }

    return Case("linear_cross_entropy", name, arguments, options, expanded_grad)


CASES: tuple[Case, ...] = (
    _attention("odd T"),
    _attention("T=1", Tq=1),
    _attention("T=2", Tq=2),
    _attention("T past two blocks, D=64", B=1, Tq=150, D=64),
    _attention("D=80", B=1, Tq=33, D=80),
    _attention("D=1", D=1),
    _attention("D=256", B=1, Tq=19, D=256),
    _attention("grouped heads", H=6, Hkv=2),
    _attention("one key head", H=3, Hkv=1, is_causal=False),
    _attention("Tq < Tk", Tq=5, Tk=70),
    _attention("one query", Tq=1, Tk=70),
    _attention("Tq > Tk", Tq=21, Tk=9),
    _attention("not causal", is_causal=False),
    _attention("not causal, Tq != Tk", Tq=13, Tk=40, is_causal=False),
    _attention("scale", scale=0.7),
    _attention("large scores", scale=8.0),
    _attention("large scores, dropout", scale=8.0, dropout_p=0.2, seed=2),
    _attention("dropout", dropout_p=0.2, seed=1234),
    _attention("dropout, seed past 2^32", dropout_p=0.5, seed=-(2**61) + 7, is_causal=False, Tk=40),
    _attention("dropout, grouped heads, Tq < Tk", dropout_p=0.1, seed=5, H=4, Hkv=2, Tq=9, Tk=35),
    _attention("dropout, Tq > Tk", dropout_p=0.3, seed=6, Tq=21, Tk=9),
    _attention("packed q, k, v", Tq=33, layout="packed"),
    _attention("packed q, k, v, dropout", Tq=33, layout="packed", dropout_p=0.2, seed=8),
    _attention("expanded k, v", layout="expanded", Tk=20),
    _attention("sliced", layout="sliced", Tk=20),
    _attention("expanded gradient", expanded_grad=True),
    *(
        case
        for op in ("layer_norm", "add_layer_norm")
        for case in (
            _norm(op, "(3, 5, 48)", 3, 5, 48),
            _norm(op, "width 1", 4, 1),
            _norm(op, "odd width", 5, 37),
            _norm(op, "width 768", 9, 768),
            _norm(op, "width past a block", 3, 1025),
            _norm(op, "one row, no batch", 64),
            _norm(op, "many rows", 301, 8),
            _norm(op, "no bias", 2, 7, 33, bias=False),
            _norm(op, "mean far from 0", 4, 96, offset=30.0),
            _norm(op, "large eps", 4, 32, eps=0.5),
            _norm(op, "transposed", 2, 9, 20, layout="transposed"),
            _norm(op, "sliced", 2, 9, 20, layout="sliced"),
            _norm(op, "expanded", 4, 3, 20, layout="expanded"),
            _norm(op, "expanded gradient", 6, 40, expanded_grad=True),
        )
    ),
    _norm("add_layer_norm", "residual at least float32", 4, 40, wide_residual=True),
    _norm("add_layer_norm", "dropout", 3, 5, 48, dropout_p=0.2, seed=99),
    _norm("add_layer_norm", "dropout, odd width, no bias", 7, 37, dropout_p=0.5, seed=2**40 + 1, bias=False),
    _norm("add_layer_norm", "dropout, transposed", 2, 9, 20, layout="transposed", dropout_p=0.1, seed=3),
    _norm("add_layer_norm", "dropout, residual at least float32", 4, 40, wide_residual=True, dropout_p=0.3, seed=4),
    _embedding("tokens and positions"),
    _embedding("no positions", P=None),
    _embedding("position offset", position_offset=5),
    _embedding("positions fit exactly", P=12, position_offset=5),
    _embedding("one token", B=1, T=1),
    _embedding("width 1", C=1),
    _embedding("odd width", C=33),
    _embedding("wide", C=768, V=5),
    _embedding("one token many times", B=4, T=60, V=1, P=60),
    _embedding("duplicates", B=8, T=40, V=3, P=64),
    _embedding("int32 tokens", index_dtype=torch.int32),
    _embedding("strided", layout="strided"),
    _embedding("expanded tokens", layout="expanded", B=5),
    _embedding("expanded gradient", expanded_grad=True),
    _cross_entropy("(N, C)", 13, 29),
    _cross_entropy("(C,)", 29),
    _cross_entropy("(N, C, d1)", 3, 17, 5),
    _cross_entropy("(N, C, d1, d2), none", 2, 9, 3, 4, reduction="none"),
    _cross_entropy("one class", 5, 1),
    _cross_entropy("many classes", 4, 5003),
    _cross_entropy("sum", 13, 29, reduction="sum"),
    _cross_entropy("none", 13, 29, reduction="none"),
    _cross_entropy("ignored", 13, 29, ignored=4),
    _cross_entropy("ignore_index 3", 13, 29, ignored=4, ignore_index=3),
    _cross_entropy("ignored, none", 13, 29, ignored=4, reduction="none"),
    _cross_entropy("weight", 13, 29, weight=True),
    _cross_entropy("weight, ignored, sum", 13, 29, weight=True, ignored=5, reduction="sum"),
    _cross_entropy("label smoothing", 13, 29, label_smoothing=0.1),
    _cross_entropy("label smoothing 1", 13, 29, label_smoothing=1.0),
    _cross_entropy("label smoothing, weight, ignored", 13, 29, label_smoothing=0.2, weight=True, ignored=3),
    _cross_entropy(
        "label smoothing, weight, (N, C, d1), none", 3, 17, 5, label_smoothing=0.2, weight=True, reduction="none"
    ),
    _cross_entropy("large logits", 13, 29, scale=60.0),
    _cross_entropy("int32 targets", 13, 29, index_dtype=torch.int32),
    _cross_entropy("channels last", 3, 17, 5, layout="channels last"),
    _cross_entropy("sliced", 13, 29, layout="sliced"),
    _cross_entropy("expanded", 13, 29, layout="expanded"),
    _cross_entropy("expanded gradient", 13, 29, reduction="none", expanded_grad=True),
    _linear_cross_entropy("(N, C)", 13, 24),
    _linear_cross_entropy("(B, T, C)", 2, 9, 24),
    _linear_cross_entropy("(C,)", 24),
    _linear_cross_entropy("one class", 6, 8, V=1),
    _linear_cross_entropy("width 1", 6, 1),
    _linear_cross_entropy("many classes", 70, 16, V=5003),
    _linear_cross_entropy("large logits", 13, 24, scale=30.0),
    _linear_cross_entropy("bias", 13, 24, bias=True),
    _linear_cross_entropy("sum", 13, 24, reduction="sum"),
    _linear_cross_entropy("none", 2, 9, 24, reduction="none"),
    _linear_cross_entropy("ignored", 13, 24, ignored=4),
    _linear_cross_entropy("ignore_index 3, bias, sum", 13, 24, ignored=4, ignore_index=3, bias=True, reduction="sum"),
    _linear_cross_entropy("ignored, bias, none", 13, 24, ignored=4, bias=True, reduction="none"),
    _linear_cross_entropy("label smoothing", 13, 24, label_smoothing=0.1, bias=True),
    _linear_cross_entropy("label smoothing, ignored, none", 13, 24, label_smoothing=0.3, ignored=2, reduction="none"),
    _linear_cross_entropy("int32 targets", 13, 24, index_dtype=torch.int32),
    _linear_cross_entropy("transposed", 13, 24, layout="transposed", bias=True),
    _linear_cross_entropy("sliced", 2, 9, 24, layout="sliced"),
    _linear_cross_entropy("expanded", 9, 24, layout="expanded"),
    _linear_cross_entropy("expanded gradient", 13, 24, reduction="none", expanded_grad=True),
)


def cases(*names: str) -> list[Case]:
    """The cases of the ops called `names`; without names all of them."""
    return [case for case in CASES if not names or case.op in names]


# --- PyTorch's own op, the yardstick ---------------------------------------------------------------------------------


def _sdpa(q, k, v, *, is_causal=True, scale=None, dropout_p=0.0, seed=None):
    """scaled_dot_product_attention; with dropout, whose mask it cannot be given, its steps with float32 scores."""
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    mask = reference.causal_mask(Tq, Tk, q.device) if is_causal else None
    blind = max(Tq - Tk, 0) if is_causal else 0  # queries that see no key: PyTorch leaves open what they give
    if dropout_p == 0.0:
        seen = None if mask is None else mask[blind:]
        gqa = k.shape[1] != H
        out = F.scaled_dot_product_attention(q[:, :, blind:], k, v, attn_mask=seen, scale=scale, enable_gqa=gqa)
        return F.pad(out, (0, 0, blind, 0))
    k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.transpose(-2, -1).to(wide) * (D**-0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores[:, :, blind:], dim=-1).to(q.dtype)
    keep = philox_keep_mask(seed, dropout_p, B * H * Tq, Tk, q.device).view(B, H, Tq, Tk)
    weights = weights * keep[:, :, blind:] / (1.0 - dropout_p)
    return F.pad(weights @ v, (0, 0, blind, 0))


class _FlashSteps(torch.autograd.Function):
    """The steps of PyTorch's flash kernel, with what it rounds to the dtype of q rounded: weights, output, dS. Of the
    weights it keeps each row's logsumexp, in float32, from which backward makes them again.

    (FlashAttention-2, Dao 2023, algorithms 1 and 2; sums are float32.) It stands for that kernel where the kernel
    itself cannot be measured: on a CPU, and with a dropout mask that is given.
    """

    @staticmethod
    def forward(ctx, q, k, v, keep, mask, scale):
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(wide) @ k.transpose(-2, -1).to(wide) * scale).masked_fill(~mask, -math.inf)
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # NaN: sees no key
        out = ((weights * keep).to(q.dtype).to(wide) @ v.to(wide)).to(q.dtype)
        logsumexp = torch.logsumexp(scores, dim=-1, keepdim=True)
        weights = torch.exp(scores - logsumexp).nan_to_num(0.0)
        ctx.save_for_backward(q, k, v, keep, weights, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, keep, weights, out = ctx.saved_tensors
        dtype, wide = q.dtype, weights.dtype
        q, k, v, grad, out = (t.to(wide) for t in (q, k, v, grad, out))
        grad_v = (weights * keep).to(dtype).to(wide).transpose(-2, -1) @ grad
        grad_weights = grad @ v.transpose(-2, -1) * keep
        delta = (grad * out).sum(-1, keepdim=True)
        grad_scores = (weights * (grad_weights - delta)).to(dtype).to(wide)
        grad_q, grad_k = grad_scores @ k * ctx.scale, grad_scores.transpose(-2, -1) @ q * ctx.scale
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype), None, None, None


def _flash(q, k, v, *, is_causal=True, scale=None, dropout_p=0.0, seed=None):
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))
    mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device)
    if is_causal:
        mask = reference.causal_mask(Tq, Tk, q.device)
    keep = torch.ones((), device=q.device)
    if dropout_p > 0.0:
        keep = philox_keep_mask(seed, dropout_p, B * H * Tq, Tk, q.device).view(B, H, Tq, Tk) / (1.0 - dropout_p)
    return _FlashSteps.apply(q, k, v, keep, mask, D**-0.5 if scale is None else scale)


def _layer_norm(x, weight, bias=None, eps=1e-5):
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _add_layer_norm(x, residual, weight, bias=None, eps=1e-5, *, dropout_p=0.0, seed=None):
    if dropout_p > 0.0:
        C = x.shape[-1]
        x = x * philox_keep_mask(seed, dropout_p, x.numel() // C, C, x.device).view(x.shape) / (1.0 - dropout_p)
    h = residual + x
    return F.layer_norm(h, (h.shape[-1],), weight, bias, eps), h


def _two_embeddings(tokens, token_table, position_table=None, *, position_offset=0):
    x = F.embedding(tokens, token_table)
    if position_table is None:
        return x
    positions = torch.arange(position_offset, position_offset + tokens.shape[1], device=tokens.device)
    return x + F.embedding(positions, position_table)


def _torch_cross_entropy(logits, targets, **options):
    return F.cross_entropy(logits, targets.long(), **options)


def _linear_then_cross_entropy(x, weight, targets, *, bias=None, **options):
    loss = F.cross_entropy(
        F.linear(x, weight, bias).reshape(-1, weight.shape[0]), targets.reshape(-1).long(), **options
    )
    return loss.view(targets.shape) if options.get("reduction") == "none" else loss


PEERS: dict[str, Callable[..., Any]] = {
    "attention": _sdpa,
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "embedding": _two_embeddings,
    "cross_entropy": _torch_cross_entropy,
    "linear_cross_entropy": _linear_then_cross_entropy,
}


def _peer(case: Case, backend: str, device: str) -> Callable[..., Any]:
    """PyTorch's own op for `case`, of the kind that `backend` is to be compared with."""
    if case.op == "attention" and backend == "triton" and (device == "cpu" or "dropout_p" in case.options):
        return _flash
    return PEERS[case.op]


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One value of one case: "out" (and "h"), or the gradient "d <argument>". Errors are the largest absolute ones."""

    op: str
    backend: str
    dtype: str
    case: str
    value: str
    ours: float
    torch: float
    atol: float
    passed: bool
    reason: str = ""  # where what is wrong is not the error

    @property
    def ratio(self) -> float | None:
        """Our error over PyTorch's; None where PyTorch's is 0."""
        return self.ours / self.torch if self.torch > 0.0 else None


@dataclass(frozen=True)
class Skip:
    """A case a backend does not serve, and why."""

    op: str
    backend: str
    dtype: str
    case: str
    reason: str


def evaluate(
    function: Callable[..., Any], case: Case, arguments: dict[str, Tensor], options: dict[str, Any]
) -> dict[str, Tensor]:
    """The outputs of function(**arguments, **options) and the gradient of every argument that has one, by name."""
    # The class weights of cross_entropy have no gradient in PyTorch.
    inputs = {
        name: tensor.detach().requires_grad_()
        for name, tensor in arguments.items()
        if tensor.is_floating_point() and (case.op, name) != ("cross_entropy", "weight")
    }
    result = function(**{**arguments, **inputs}, **options)
    outputs = dict(zip(("out", "h"), result, strict=True)) if isinstance(result, tuple) else {"out": result}
    draw = Draw(next(iter(inputs.values())).dtype, "cpu", seed=1)
    upstream = []
    for out in outputs.values():
        # Numbers every dtype holds exactly, so that all who are compared get the same.
        grad = torch.full((), 0.5) if case.expanded_grad else draw.index(17, *out.shape) / 8.0 - 1.0
        upstream.append(grad.to(out.device, out.dtype).expand(out.shape))
    grads = torch.autograd.grad(list(outputs.values()), list(inputs.values()), upstream)
    values = {name: out.detach() for name, out in outputs.items()}
    return values | {f"d {name}": grad for name, grad in zip(inputs, grads, strict=True)}


def max_error(value: Tensor, oracle: Tensor) -> float:
    """The largest |value - oracle|; equal infinities and NaN where NaN is due count as equal, other NaN as infinite."""
    value = value.detach().to(oracle.device, torch.float64)
    same = (value == oracle) | (value.isnan() & oracle.isnan())
    error = torch.where(same, 0.0, (value - oracle).abs())
    return float(error.nan_to_num(nan=math.inf, posinf=math.inf).max()) if error.numel() else 0.0


def exact_copy(tensor: Tensor) -> Tensor:
    """A copy the oracle computes with."""
    return tensor.detach().to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def measure(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> list[Row]:
    """The errors of `case` on `backend`. Raises BackendError, with the reason, where the backend does not serve it."""
    drawn = case.arguments(Draw(dtype, device))
    arguments = {name: tensor for name, tensor in drawn.items() if tensor is not None}
    exact = {name: exact_copy(tensor) for name, tensor in arguments.items()}
    ours = evaluate(getattr(ops, case.op), case, arguments, {**case.options, "backend": backend})
    changed = [name for name, before in exact.items() if not torch.equal(exact_copy(arguments[name]), before)]
    theirs = evaluate(_peer(case, backend, device), case, arguments, case.options)
    oracle = evaluate(getattr(reference, case.op), case, exact, case.options)
    rows = []
    for name, expected in oracle.items():
        reason = f"{', '.join(changed)} was written to" if changed else ""
        if ours[name].shape != expected.shape:
            reason = f"shape {tuple(ours[name].shape)}, expected {tuple(expected.shape)}"
        elif ours[name].dtype != theirs[name].dtype:
            reason = f"dtype {ours[name].dtype}, PyTorch's has {theirs[name].dtype}"
        error = math.inf if reason else max_error(ours[name], expected)
        torch_error = max_error(theirs[name], expected)
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        atol = ATOL[dtype] * max(1.0, largest)
        passed = error <= 2.0 * torch_error + atol
        rows.append(Row(case.op, backend, _name(dtype), case.name, name, error, torch_error, atol, passed, reason))
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Report:
    """What was measured, on what, and what was skipped."""

    device: str
    rows: list[Row] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if not row.passed]

    def as_dict(self) -> dict[str, Any]:
        from .. import __version__

        versions = {"fastgpt": __version__, "torch": torch.__version__, "python": platform.python_version()}
        try:
            import triton

            versions["triton"] = triton.__version__
        except ImportError:
            pass
        on_gpu = self.device == "cuda"
        return {
            "device": self.device,
            "device_name": torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability(),
            "platform": platform.platform(),
            "versions": versions | ({"cuda": torch.version.cuda} if on_gpu else {}),
            "rule": "ours <= 2 * torch + atol; all errors are the largest absolute ones against the float64 oracle",
            "passed": not self.failures,
            "seconds": round(self.seconds, 2),
            "rows": [_finite(dataclasses.asdict(row) | {"ratio": row.ratio}) for row in self.rows],
            "skipped": [dataclasses.asdict(skip) for skip in self.skips],
        }

    def __str__(self) -> str:
        """A line per op, backend and dtype, then each failure, then what was skipped."""
        heading = f"{'op':21}{'backend':9}{'dtype':10}{'cases':>5}{'values':>7}{'error':>10}{'torch':>10}{'ratio':>7}"
        lines = [heading + "  worst ratio at"]
        for (op, backend, dtype), rows in _grouped(self.rows, lambda row: (row.op, row.backend, row.dtype)).items():
            # Under atol a ratio says which rounding was luckier, no more.
            apart = [row for row in rows if row.ours > row.atol]
            worst = max(apart, key=lambda row: row.ratio or math.inf, default=None)
            error, torch_error = max(row.ours for row in rows), max(row.torch for row in rows)
            n_cases, failed = len({row.case for row in rows}), sum(not row.passed for row in rows)
            ratio = f"{worst.ratio or math.inf:.2f}" if worst else "-"
            where = f"{worst.case}: {worst.value}" if worst else "all within atol"
            lines.append(
                f"{op:21}{backend:9}{dtype:10}{n_cases:5}{len(rows):7}{error:10.1e}{torch_error:10.1e}{ratio:>7}  "
                f"{where}{f'  {failed} FAILED' if failed else ''}"
            )
        for row in self.failures:
            what = row.reason or f"error {row.ours:.2e} > 2 * {row.torch:.2e} + {row.atol:.1e}"
            lines.append(f"FAILED {row.op}, {row.backend}, {row.dtype}, {row.case}, {row.value}: {what}")
        for (op, backend, reason), skips in _grouped(self.skips, lambda s: (s.op, s.backend, s.reason)).items():
            dtypes = ", ".join(dict.fromkeys(skip.dtype for skip in skips))
            lines.append(f"skipped {op}, {backend} ({len(skips)} calls, {dtypes}): {reason}")
        n_cases = len({(row.op, row.case) for row in self.rows})
        lines.append(
            f"{n_cases} cases, {len(self.rows)} values on {self.device}, {len(self.failures)} failed, "
            f"{len(self.skips)} calls skipped, {self.seconds:.1f} s"
        )
        return "\n".join(lines)


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: it is written as text."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def run(
    device: str = "cpu",
    *,
    backends: Sequence[str] = BACKENDS,
    names: Sequence[str] = OPS,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Report:
    """Measure the ops called `names` on `backends` in `dtypes`; what a backend does not serve becomes a `Skip`."""
    report, start = Report(device), time.perf_counter()
    for backend in backends:
        for dtype in dtypes:
            for case in (case for case in CASES if case.op in names and implements(backend, case.op)):
                try:
                    report.rows += measure(case, backend, dtype, device)
                except BackendError as error:
                    reason = str(error).partition(" here: ")[2] or str(error)  # the table names op and backend itself
                    report.skips.append(Skip(case.op, backend, _name(dtype), case.name, reason))
                except Exception as error:  # a kernel that crashes is a result too, and the other cases go on
                    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
                    row = Row(case.op, backend, _name(dtype), case.name, "call", math.inf, 0.0, 0.0, False, reason)
                    report.rows.append(row)
    report.seconds = time.perf_counter() - start
    return report


def main(device: str = "cpu", out: str | None = None) -> int:
    """The `fastgpt parity` command: print the report, write it as JSON to `out`; 0 if all passed, else 1."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device: expected cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: this PyTorch finds no CUDA device; `fastgpt doctor` shows what it finds")
    if out is not None and (Path(out).is_dir() or not Path(out).resolve().parent.is_dir()):  # said before the work
        raise ConfigError(f"--out {out}: expected a file in a folder that exists")
    if out is not None:
        open(out, "ab").close()  # a file that cannot be written is an error now, not after the work
    report = run(device)
    print(report)
    if out is not None:
        Path(out).write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    return 1 if report.failures else 0
