"""The cases: calls of every op, with the shapes, layouts and options in which kernels go wrong.

Each op has a section: a function that makes a case, and the list of its cases. A new op needs such a section, its list
in `CASES`, and an entry in `YARDSTICKS` (yardsticks.py). The functions take the sizes of a case by the names that the
op's documentation gives them, the `layout` of its tensors, and the op's own options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor


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
class ParityCase:
    """A call of an op: `arguments` makes its tensors, which may be strided views; `options` are the other arguments."""

    op: str
    name: str
    arguments: Callable[[Draw], dict[str, Tensor | None]]
    options: dict[str, Any] = field(default_factory=dict)
    expanded_grad: bool = False  # the gradient of the output has stride 0, as out.sum().backward() gives it


def _laid_out(draw: Draw, layout: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Random numbers of `shape` that lie in memory as `layout` says, in a view of a tensor of another shape."""
    *outer, last = shape
    if layout == "transposed":
        return draw.normal(*outer[:-1], last, outer[-1], dtype=dtype).transpose(-1, -2)
    if layout == "expanded":  # the same numbers for the whole first dimension
        return draw.normal(1, *shape[1:], dtype=dtype).expand(shape)
    if layout == "every second":
        return draw.normal(*outer, 2 * last, dtype=dtype)[..., ::2]
    if layout == "padded":  # each row is followed by numbers that do not belong to it
        return draw.normal(*outer, last + 3, dtype=dtype)[..., :-3]
    return draw.normal(*shape, dtype=dtype)


# ---- attention ----


def _attention(name, *, B=2, H=2, Hkv=None, Tq=17, Tk=None, D=16, layout="contiguous", **options) -> ParityCase:
    heads, keys = Hkv or H, Tq if Tk is None else Tk

    def arguments(draw: Draw) -> dict[str, Tensor | None]:
        if layout == "packed":  # as in the model: views of one (B, T, 3 C) projection
            q, k, v = (t.view(B, Tq, H, D).transpose(1, 2) for t in draw.normal(B, Tq, 3 * H * D).split(H * D, dim=2))
        elif layout == "sliced":  # every second feature of q; k and v are the filled part of a longer cache
            q = _laid_out(draw, "every second", B, H, Tq, D)
            k, v = (draw.normal(B, heads, keys + 5, D)[:, :, :keys] for _ in range(2))
        else:  # where k and v are expanded, the whole batch shares the keys of one prompt
            q = draw.normal(B, H, Tq, D)
            k, v = (_laid_out(draw, layout, B, heads, keys, D) for _ in range(2))
        return {"q": q, "k": k, "v": v}

    return ParityCase("attention", name, arguments, options)


_ATTENTION_CASES = (
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
    replace(_attention("expanded gradient"), expanded_grad=True),
)


# ---- layer_norm, add_layer_norm ----


def _norm(op, name, *shape, bias=True, layout="contiguous", offset=0.0, wide_residual=False, **options) -> ParityCase:
    """x and the residual have `shape`; `offset` is the mean of their numbers."""

    def arguments(draw: Draw) -> dict[str, Tensor | None]:
        wide = torch.promote_types(draw.dtype, torch.float32) if wide_residual else draw.dtype
        x = _laid_out(draw, layout, *shape)
        made: dict[str, Tensor | None] = {"x": x + offset if offset else x}
        if op == "add_layer_norm":
            residual = _laid_out(draw, layout, *shape, dtype=wide)
            made["residual"] = residual + offset if offset else residual
        made["weight"] = draw.normal(shape[-1], dtype=wide)
        made["bias"] = draw.normal(shape[-1], dtype=wide) if bias else None
        return made

    return ParityCase(op, name, arguments, options)


_NORM_CASES = (
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
            _norm(op, "sliced", 2, 9, 20, layout="every second"),
            _norm(op, "expanded", 4, 3, 20, layout="expanded"),
            replace(_norm(op, "expanded gradient", 6, 40), expanded_grad=True),
        )
    ),
    _norm("add_layer_norm", "residual at least float32", 4, 40, wide_residual=True),
    _norm("add_layer_norm", "dropout", 3, 5, 48, dropout_p=0.2, seed=99),
    _norm("add_layer_norm", "dropout, odd width, no bias", 7, 37, dropout_p=0.5, seed=2**40 + 1, bias=False),
    _norm("add_layer_norm", "dropout, transposed", 2, 9, 20, layout="transposed", dropout_p=0.1, seed=3),
    _norm("add_layer_norm", "dropout, residual at least float32", 4, 40, wide_residual=True, dropout_p=0.3, seed=4),
)


# ---- activation ----


def _activation(name, *shape, kind="gelu", bias=True, layout="contiguous", scale=1.0) -> ParityCase:
    """x has `shape`; where it is contiguous, it is multiplied by `scale`."""

    def arguments(draw: Draw) -> dict[str, Tensor | None]:
        x = _laid_out(draw, layout, *shape)
        x = x * scale if layout == "contiguous" else x
        return {"x": x, "bias": draw.normal(shape[-1]) if bias else None}

    return ParityCase("activation", name, arguments, {"kind": kind})


_ACTIVATION_CASES = (
    *(
        case
        for kind in ("gelu", "gelu_tanh", "relu", "relu2")
        for case in (
            _activation(f"{kind}", 3, 5, 48, kind=kind),
            _activation(f"{kind}, no bias, odd width", 7, 37, kind=kind, bias=False),
            _activation(f"{kind}, large values", 9, 65, kind=kind, scale=6.0),
            replace(_activation(f"{kind}, expanded gradient", 6, 40, kind=kind), expanded_grad=True),
        )
    ),
    _activation("width 1", 5, 1),
    _activation("one row, no batch", 33),
    _activation("many rows", 301, 8),
    _activation("values past a piece", 3, 4099, bias=False),
    _activation("transposed", 2, 9, 20, layout="transposed"),
    _activation("sliced, no bias", 2, 9, 20, layout="every second", bias=False),
    _activation("expanded", 4, 3, 20, layout="expanded"),
)


# ---- embedding ----


def _embedding(name, *, B=2, T=7, V=11, C=16, P=16, layout="contiguous", int32=False, **options) -> ParityCase:
    def arguments(draw: Draw) -> dict[str, Tensor | None]:
        tokens = draw.index(V, T, B).t() if layout == "strided" else draw.index(V, B, T)
        if layout == "expanded":
            tokens = tokens[:1].expand(B, T)
        of_tables = "every second" if layout == "strided" else "contiguous"
        return {
            "tokens": tokens.int() if int32 else tokens,
            "token_table": _laid_out(draw, of_tables, V, C),
            "position_table": None if P is None else _laid_out(draw, of_tables, P, C),
        }

    return ParityCase("embedding", name, arguments, options)


_EMBEDDING_CASES = (
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
    _embedding("int32 tokens", int32=True),
    _embedding("strided", layout="strided"),
    _embedding("expanded tokens", layout="expanded", B=5),
    replace(_embedding("expanded gradient"), expanded_grad=True),
)


# ---- cross_entropy, linear_cross_entropy, linear_log_probs ----


def _targets(draw: Draw, C: int, shape: Sequence[int], ignored: int, int32: bool, options: dict[str, Any]) -> Tensor:
    """Random classes below C, of which the first `ignored` are ignore_index."""
    targets = draw.index(C, *shape)
    targets.view(-1)[:ignored] = options.get("ignore_index", -100)
    return targets.int() if int32 else targets


def _token_weight(draw: Draw, targets: Tensor) -> Tensor:
    """Of both signs; their sum is far from 0, so that the mean over it has the error of its terms."""
    return draw.normal(*targets.shape) + 1.5


def _make_some_correct(targets: Tensor, likeliest: Tensor, options: dict[str, Any]) -> None:
    """Half of the targets that count become the likeliest class."""
    half = (targets != options.get("ignore_index", -100)) & (
        torch.arange(targets.numel(), device=targets.device).view(targets.shape) % 2 == 0
    )
    targets[half] = likeliest.to(targets)[half]


def _cross_entropy(
    name, *shape, weight=False, ignored=0, layout="contiguous", scale=2.0, int32=False, tokens=False, **options
) -> ParityCase:
    """The logits have `shape`, (N, C, ...) or (C,); contiguous ones are multiplied by `scale`.

    `weight` and `tokens` ask for weights of the classes and of the targets.
    """

    def arguments(draw: Draw) -> dict[str, Tensor | None]:
        if layout == "channels last":  # (N, d1, C) in memory, as a model writes its logits
            logits = draw.normal(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        else:
            logits = _laid_out(draw, layout, *shape)
        class_dim = 0 if len(shape) == 1 else 1
        C = shape[class_dim]
        logits = logits * scale if layout == "contiguous" else logits
        targets = _targets(draw, C, shape[:class_dim] + shape[class_dim + 1 :], ignored, int32, options)
        if "return_accuracy" in options:
            _make_some_correct(targets, logits.argmax(class_dim), options)
        return {
            "logits": logits,
            "targets": targets,
            "weight": draw.normal(C).abs() + 0.1 if weight else None,
            "token_weight": _token_weight(draw, targets) if tokens else None,
        }

    return ParityCase("cross_entropy", name, arguments, options)


_CROSS_ENTROPY_CASES = (
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
    _cross_entropy("int32 targets", 13, 29, int32=True),
    _cross_entropy("channels last", 3, 17, 5, layout="channels last"),
    _cross_entropy("sliced", 13, 29, layout="padded"),
    _cross_entropy("expanded", 13, 29, layout="expanded"),
    _cross_entropy("z-loss", 13, 29, z_loss=1e-2),
    _cross_entropy("z-loss, many classes, accuracy", 4, 5003, z_loss=1e-2, return_accuracy=True),
    _cross_entropy("softcap", 13, 29, softcap=3.0),
    _cross_entropy("softcap, many rows", 70, 65, softcap=30.0, tokens=True),
    _cross_entropy("softcap, many classes, sum", 4, 5003, softcap=5.0, reduction="sum", ignored=1),
    _cross_entropy(
        "softcap, large logits, z-loss, none", 13, 29, scale=60.0, softcap=20.0, z_loss=1e-3, reduction="none"
    ),
    _cross_entropy("softcap, label smoothing, weight", 13, 29, softcap=4.0, label_smoothing=0.1, weight=True),
    _cross_entropy(
        "softcap, channels last, accuracy", 3, 17, 5, layout="channels last", softcap=2.0, return_accuracy=True
    ),
    _cross_entropy("token weight", 13, 29, tokens=True),
    _cross_entropy("token weight, weight, ignored, sum", 13, 29, tokens=True, weight=True, ignored=4, reduction="sum"),
    _cross_entropy(
        "token weight, (N, C, d1), none, accuracy", 3, 17, 5, tokens=True, reduction="none", return_accuracy=True
    ),
    _cross_entropy("accuracy, ignored", 13, 29, ignored=4, return_accuracy=True),
    _cross_entropy("(C,), all four", 29, z_loss=1e-2, softcap=3.0, tokens=True, return_accuracy=True),
    _cross_entropy(
        "all options",
        13,
        29,
        weight=True,
        ignored=3,
        label_smoothing=0.2,
        z_loss=1e-2,
        softcap=3.0,
        tokens=True,
        return_accuracy=True,
    ),
    replace(_cross_entropy("softcap, expanded gradient", 13, 29, reduction="none", softcap=3.0), expanded_grad=True),
    replace(_cross_entropy("expanded gradient", 13, 29, reduction="none"), expanded_grad=True),
)


def _linear_cross_entropy(
    name,
    *shape,
    V=37,
    bias=False,
    ignored=0,
    layout="contiguous",
    scale=1.0,
    int32=False,
    tokens=False,
    op="linear_cross_entropy",
    **options,
) -> ParityCase:
    """x has `shape`, (..., C); where it is contiguous, it is multiplied by `scale`.

    Where the accuracy is asked for, all are whole numbers, whose products are exact in every dtype.
    """
    views = {"sliced": ("every second", "padded"), "expanded": ("expanded", "contiguous")}
    of_x, of_weight = views.get(layout, (layout, layout))

    def arguments(draw: Draw) -> dict[str, Tensor | None]:
        x = _laid_out(draw, of_x, *shape)
        targets = _targets(draw, V, shape[:-1], ignored, int32, options)
        floats = {
            "x": x * scale if layout == "contiguous" else x,
            "weight": _laid_out(draw, of_weight, V, shape[-1]),
            **({"bias": draw.normal(V)} if bias else {}),
        }
        if "return_accuracy" in options:
            floats = {name: tensor.round().clamp(-2, 2) for name, tensor in floats.items()}
            logits = floats["x"].double() @ floats["weight"].double().t() + floats.get("bias", 0.0)
            _make_some_correct(targets, logits.argmax(-1), options)
        of_token = {"token_weight": _token_weight(draw, targets)} if tokens else {}
        return {**floats, "targets": targets, **of_token}

    return ParityCase(op, name, arguments, options)


_LINEAR_CROSS_ENTROPY_CASES = (
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
    _linear_cross_entropy("int32 targets", 13, 24, int32=True),
    _linear_cross_entropy("transposed", 13, 24, layout="transposed", bias=True),
    _linear_cross_entropy("sliced", 2, 9, 24, layout="sliced"),
    _linear_cross_entropy("expanded", 9, 24, layout="expanded"),
    _linear_cross_entropy("z-loss", 13, 24, z_loss=1e-2),
    _linear_cross_entropy("softcap, many classes", 70, 16, V=5003, softcap=5.0),
    _linear_cross_entropy(
        "softcap, bias, sum, accuracy", 13, 24, bias=True, softcap=8.0, reduction="sum", return_accuracy=True
    ),
    _linear_cross_entropy("softcap, large logits, z-loss", 13, 24, scale=30.0, softcap=20.0, z_loss=1e-3),
    _linear_cross_entropy("token weight, ignored", 13, 24, tokens=True, ignored=4),
    _linear_cross_entropy("token weight, z-loss, none", 2, 9, 24, tokens=True, z_loss=1e-2, reduction="none"),
    _linear_cross_entropy(
        "token weight, label smoothing, sum", 13, 24, tokens=True, label_smoothing=0.1, reduction="sum"
    ),
    _linear_cross_entropy("accuracy, (B, T, C), none", 2, 9, 24, ignored=2, reduction="none", return_accuracy=True),
    _linear_cross_entropy(
        "all options",
        2,
        9,
        24,
        bias=True,
        ignored=3,
        label_smoothing=0.2,
        z_loss=1e-2,
        softcap=9.0,
        tokens=True,
        return_accuracy=True,
    ),
    replace(_linear_cross_entropy("expanded gradient", 13, 24, reduction="none"), expanded_grad=True),
)


_linear_log_probs = partial(_linear_cross_entropy, op="linear_log_probs")

_LINEAR_LOG_PROBS_CASES = (
    _linear_log_probs("(N, C)", 13, 24),
    _linear_log_probs("(B, T, C), bias", 2, 9, 24, bias=True),
    _linear_log_probs("(C,)", 24),
    _linear_log_probs("one class", 6, 8, V=1),
    _linear_log_probs("many classes", 70, 16, V=5003),
    _linear_log_probs("large logits", 13, 24, scale=30.0),
    _linear_log_probs("softcap", 13, 24, softcap=5.0),
    _linear_log_probs("softcap, bias, many classes", 70, 16, V=5003, bias=True, softcap=5.0),
    _linear_log_probs("int32 targets", 13, 24, int32=True),
    _linear_log_probs("transposed", 13, 24, layout="transposed", bias=True),
    _linear_log_probs("sliced", 2, 9, 24, layout="sliced"),
    _linear_log_probs("expanded", 9, 24, layout="expanded"),
    replace(_linear_log_probs("expanded gradient", 13, 24), expanded_grad=True),
)


# ---- linear, an internal op ----


def _linear(name, *shape, N, bias=True, layout="contiguous") -> ParityCase:
    """x has `shape`, (..., K)."""
    of_x, of_weight = {"sliced": ("every second", "padded")}.get(layout, (layout, "contiguous"))

    def arguments(draw: Draw) -> dict[str, Tensor | None]:
        return {
            "x": _laid_out(draw, of_x, *shape),
            "weight": _laid_out(draw, of_weight, N, shape[-1]),
            "bias": draw.normal(N) if bias else None,
        }

    return ParityCase("linear", name, arguments)


_LINEAR_CASES = (
    _linear("(B, T, K), as in a small model", 2, 64, 128, N=384, bias=False),
    _linear("(B, T, K), bias, as in a small model", 2, 64, 128, N=512),
    _linear("back to the width of the model", 128, 512, N=128),
    _linear("one row, no batch", 48, N=33),
    _linear("8 rows", 8, 65, N=130),
    _linear("9 rows", 9, 65, N=130),
    _linear("no bias, odd sizes", 37, 101, N=67, bias=False),
    _linear("odd sizes past a tile", 61, 300, N=193),
    _linear("K=1", 13, 1, N=7),
    _linear("N=1", 13, 29, N=1),
    _linear("transposed", 2, 9, 40, N=21, layout="transposed"),
    _linear("sliced", 3, 11, 40, N=21, layout="sliced"),
    _linear("expanded", 4, 9, 40, N=21, layout="expanded"),
    replace(_linear("expanded gradient", 25, 40, N=21), expanded_grad=True),
)


CASES: tuple[ParityCase, ...] = (
    *_ATTENTION_CASES,
    *_NORM_CASES,
    *_ACTIVATION_CASES,
    *_EMBEDDING_CASES,
    *_CROSS_ENTROPY_CASES,
    *_LINEAR_CROSS_ENTROPY_CASES,
    *_LINEAR_LOG_PROBS_CASES,
    *_LINEAR_CASES,
)


def parity_cases(*ops: str) -> list[ParityCase]:
    """The cases of these ops; without `ops`, all cases."""
    return [case for case in CASES if not ops or case.op in ops]
