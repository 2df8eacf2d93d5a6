"""Which variant of a kernel a call takes, and a small call that takes the same one: what a self-test needs to know.

A variant is what a kernel is compiled or launched differently for: dtypes, sizes that are constants of the kernel,
options, which gradients are asked for, and the choice between several kernels. Each op has a section:

    the facts     a function of the op's arguments that gives a small tuple; it runs at every call on a GPU
    the class     made from that tuple: `variant` puts it into words, `asked_for` names the gradients that are asked
                  for, and `inputs` draws the tensors of such a call, as few as its kernel is taken for

Finer than needed is no fault: a variant more costs a self-test of milliseconds. What is taken for one variant, and
runs as two, is one that was never tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .arguments import autocast_dtype
from .library import has_address, is_static

Inputs: TypeAlias = tuple[dict[str, Tensor | None], dict[str, Any]]  # tensors, and the op's other arguments
Asked: TypeAlias = tuple[bool, ...]  # for each tensor, whether its gradient is asked for; empty where none is


_MOST_SCORES = 2**28  # of a small call of attention, all heads together: its kernels run for about a millisecond


class Draw:
    """Random numbers on one device, from a generator of its own: the caller's generators do not move."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)
        self.n_elements = 2**21 if device.type == "cuda" else 2**12  # of a norm: the interpreter takes time

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32).to(dtype)

    def index(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


def _asked(*tensors: Tensor | None) -> Asked:
    if not torch.is_grad_enabled():
        return ()
    asked = tuple([tensor is not None and tensor.requires_grad for tensor in tensors])
    return asked if True in asked else ()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _words(*parts: str | bool) -> str:
    return ", ".join(part for part in parts if isinstance(part, str))


def _gradients(call: Call) -> str:
    return "gradients of " + " ".join(call.asked_for()) if call.asked else "forward alone"


def _where(asked: Asked, *names: str) -> list[str]:
    return [name for name, is_asked in zip(names, asked, strict=bool(asked)) if is_asked]


def _at_most(limit: int, length: int) -> int:
    """`length`, or where that is more, `limit` or one less: divisible by 16 where `length` is."""
    return length if length <= limit else limit - (length % 16 != 0)


def _of_rows(n_rows: int) -> str:
    """Triton compiles a kernel anew for a size of 1, and for one that 16 divides."""
    return "one row" if n_rows == 1 else "rows in sixteens" if n_rows % 16 == 0 else "rows"


def _chip(device: torch.device) -> tuple[int, int]:
    """The compute capability and the number of multiprocessors, by which the Triton kernels' launches are chosen."""
    from ..triton_kernels.target import architecture, multiprocessors

    on_device = torch.empty(0, device=device)
    return architecture(on_device), multiprocessors(on_device)


# ---- attention ----


def attention_facts(q, k, v, is_causal=True, scale=None, dropout_p=0.0, seed=None, route="attention") -> tuple:
    B, H, Tq, D = q.shape
    _, Hkv, Tk, _ = k.shape
    layout: Any = None  # a tensor that is being traced has no address
    if has_address(q):
        layout = q.stride(), k.stride(), v.stride(), (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16
    dtype = autocast_dtype(q) or q.dtype  # `explain` is asked before the op casts
    asked = () if route == "attention_cached" else _asked(q, k, v)
    return dtype, B, H, Hkv, Tq, Tk, D, is_causal, dropout_p > 0.0, layout, asked, route


class Attention(NamedTuple):
    dtype: torch.dtype
    B: int
    H: int
    Hkv: int
    Tq: int
    Tk: int
    D: int
    is_causal: bool
    dropout: bool
    layout: tuple | None
    asked: Asked
    # The function that calls the kernels. "self_attention": q, k and v lie side by side in one tensor, qkv, and so do
    # their gradients. "attention_cached": k and v are caches, to which the keys and values of q are appended.
    route: str = "attention"

    def asked_for(self) -> list[str]:
        return ["qkv"] if self.packed else _where(self.asked, "q", "k", "v")

    @property
    def packed(self) -> bool:
        return self.route == "self_attention"

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.B, self.Tq, self.H * self.D) if self.packed else (self.B, self.H, self.Tq, self.D)

    @property
    def instead(self) -> str:
        return "kernels with separate gradients serve, else PyTorch" if self.packed else "PyTorch serves"

    @property
    def aligned(self) -> bool:
        """Whether addresses and strides allow tensor descriptors. Those of tensors that are traced usually do."""
        from ..triton_kernels.attention import is_aligned

        if self.layout is None:
            return True
        *strides, address = self.layout
        return all(is_aligned(address, of_one, self.dtype.itemsize) for of_one in strides)

    def variant(self, device: torch.device) -> str:
        from ..triton_kernels.attention import kernels_of_call

        sizes = (self.B, self.H, self.Hkv, self.Tq, self.Tk, self.D)
        forward, backward = kernels_of_call(*sizes, self.dtype.itemsize, self.dropout, self.aligned, *_chip(device))
        group = self.H // self.Hkv
        return _words(
            _name(self.dtype),
            f"heads of {self.D}",
            group > 1 and f"{group} to a key head",
            self.is_causal and "causal",
            self.dropout and "dropout",
            self.Tq % 16 == 0 and self.Tk % 16 == 0 and "lengths in sixteens",
            not self.aligned and "rows at any address",
            f"forward: {forward}",
            f"backward: {backward}" if self.asked else False,
            self.route == "attention_cached" and "a cache whose length is on the device",
            "gradient of qkv in one tensor" if self.packed else _gradients(self),
        )

    def smaller(self) -> Iterator[Attention]:
        """Shorter sequences and fewer heads, but longer ones and more where the kernels are taken only for these."""
        group, Hkv = self.H // self.Hkv, min(2, self.Hkv)
        longest = max(self.Tq, self.Tk)
        # 400, 768, 1280, 2304, ...: one in each bucket of a tuned table, of an even number of tiles.
        for length in (400, *(2**n + 256 for n in range(9, longest.bit_length()))):
            Tq = _at_most(length, self.Tq)
            Tk = self.Tk if Tq <= 8 else _at_most(length, self.Tk)  # a few queries read all keys in no time
            for B in (1, 2, 4, 8, 16, 32, 64, 128, 256):
                if B * Hkv * group * Tq * Tk <= _MOST_SCORES:
                    yield self._replace(B=B, H=group * Hkv, Hkv=Hkv, Tq=Tq, Tk=Tk)

    def inputs(self, draw: Draw) -> Inputs:
        pad = 0 if self.aligned else 1  # with a row of D + 1 elements, most rows begin at an odd address

        def heads(H: int, T: int) -> Tensor:
            return draw.normal(self.B, T, H, self.D + pad, dtype=self.dtype)[..., pad:].transpose(1, 2)

        options: dict[str, Any] = {"is_causal": self.is_causal}
        if self.dropout:
            options |= {"dropout_p": 0.2, "seed": 2**33 + 7}
        if self.packed:
            qkv = draw.normal(self.B, self.Tq, 3 * self.H * self.D + pad, dtype=self.dtype)[..., pad:]
            return {"qkv": qkv}, options | {"n_head": self.H}
        q, n_new = heads(self.H, self.Tq), self.Tk
        if self.route == "attention_cached":
            n_new, capacity = self.Tq, max(self.Tk, 2 * self.Tq)  # the new ones are appended twice
            length = torch.tensor((capacity - 2 * self.Tq) * 3 // 4, device=draw.device)
            caches = {"keys": heads(self.Hkv, capacity), "values": heads(self.Hkv, capacity), "length": length}
        else:
            caches = {}
        return {"q": q, "k": heads(self.Hkv, n_new), "v": heads(self.Hkv, n_new), **caches}, options


# ---- layer_norm, add_layer_norm ----


def layer_norm_facts(x, weight, bias=None, eps=1e-5, read_as=None) -> tuple:
    C = x.shape[-1]
    asked = _asked(x, None, weight, bias)
    return x.dtype, None, weight.dtype, C, x.numel() // C, bias is not None, False, autocast_dtype(x), read_as, asked


def add_layer_norm_facts(x, residual, weight, bias=None, eps=1e-5, dropout_p=0.0, seed=None, read_as=None) -> tuple:
    C = x.shape[-1]
    dtypes, asked = (x.dtype, residual.dtype, weight.dtype), _asked(x, residual, weight, bias)
    return *dtypes, C, x.numel() // C, bias is not None, dropout_p > 0.0, autocast_dtype(x), read_as, asked


class Norm(NamedTuple):
    dtype: torch.dtype  # of x
    residual: torch.dtype | None  # None: layer_norm
    weight: torch.dtype
    width: int
    n_rows: int
    has_bias: bool
    dropout: bool
    autocast: torch.dtype | None
    read_as: torch.dtype | None  # the dtype that the result is written in; None: PyTorch's
    asked: Asked

    def asked_for(self) -> list[str]:
        return _where(self.asked, "x", "residual", "weight", "bias")

    def variant(self, device: torch.device) -> str:
        from ..triton_kernels.layer_norm import forward_config_of_call

        config = forward_config_of_call(self.n_rows, self.width, *_chip(device))
        return _words(
            _name(self.dtype),
            self.residual is not None and f"residual {_name(self.residual or self.dtype)}",
            f"weight {_name(self.weight)}",
            f"width {self.width}",
            _of_rows(self.n_rows),
            f"{config['ROWS']} by {config['num_warps']} warps",
            "bias" if self.has_bias else "no bias",
            self.dropout and "dropout",
            self.autocast is not None and f"autocast {_name(self.autocast or self.dtype)}",
            self.read_as is not None and f"result {_name(self.read_as or self.dtype)}",
            _gradients(self),
        )

    def inputs(self, draw: Draw) -> Inputs:
        from ..triton_kernels.layer_norm import forward_config

        # So many rows that programs of the backward pass take several, and that no multiprocessor is without work.
        arch, n_multiprocessors = _chip(draw.device)
        at_once = n_multiprocessors * forward_config(self.width, arch)["ROWS"]
        many = max(64, draw.n_elements // self.width, at_once + 15) // 16 * 16 + (self.n_rows % 16 != 0)
        shape, weight = (min(self.n_rows, many), self.width), self.weight
        tensors: dict[str, Tensor | None] = {"x": draw.normal(*shape, dtype=self.dtype)}
        if self.residual is not None:
            tensors["residual"] = draw.normal(*shape, dtype=self.residual)
        tensors["weight"] = draw.normal(self.width, dtype=weight)
        tensors["bias"] = draw.normal(self.width, dtype=weight) if self.has_bias else None
        return tensors, {"dropout_p": 0.2, "seed": 2**33 + 7} if self.dropout else {}


# ---- embedding ----


def embedding_facts(tokens, token_table, position_table=None, position_offset=0) -> tuple:
    layout: Any = None
    if has_address(token_table):
        layout = token_table.stride(0), token_table.data_ptr() % 16
        if position_table is not None:
            layout += position_table.stride(0), position_table.data_ptr() % 16
    C, asked = token_table.shape[1], _asked(token_table, position_table)
    return token_table.dtype, C, position_table is not None, layout, asked


class Embedding(NamedTuple):
    dtype: torch.dtype
    width: int
    has_positions: bool
    layout: tuple | None
    asked: Asked

    def asked_for(self) -> list[str]:
        return _where(self.asked, "token_table", "position_table")

    @property
    def aligned(self) -> bool:
        """Whether every row of the tables begins at a multiple of 16 bytes."""
        if self.layout is None:
            return True
        strides, addresses = self.layout[::2], self.layout[1::2]
        return not any(addresses) and all(stride * self.dtype.itemsize % 16 == 0 for stride in strides)

    def variant(self, device: torch.device) -> str:
        return _words(
            _name(self.dtype),
            f"width {self.width}",
            "aligned rows" if self.aligned else "rows at any address",
            self.has_positions and "positions",
            _gradients(self),
        )

    def inputs(self, draw: Draw) -> Inputs:
        """One sequence has equal tokens, so that a run of them crosses the chunks in which gradients are summed."""
        pad = 0 if self.aligned else 1

        def table(n_rows: int) -> Tensor:
            return draw.normal(n_rows, self.width + pad, dtype=self.dtype)[:, pad:]

        tokens = draw.index(40, 3, 150)
        tokens[1] = 7
        positions = table(160) if self.has_positions else None
        return {"tokens": tokens, "token_table": table(50), "position_table": positions}, {"position_offset": 5}


# ---- cross_entropy, linear_cross_entropy, linear_log_probs ----


class HeadOptions(NamedTuple):
    """Which of the options that both losses have are asked for."""

    z_loss: bool = False
    softcap: bool = False
    token_weight: bool = False
    accuracy: bool = False

    def words(self) -> str:
        return _words(
            self.z_loss and "z-loss",
            self.softcap and "softcap",
            self.token_weight and "weights of targets",
            self.accuracy and "accuracy",
        )

    def inputs(self, draw: Draw, targets: Tensor, dtype: torch.dtype) -> Inputs:
        of_token = draw.normal(*targets.shape, dtype=dtype) + 1.5 if self.token_weight else None
        options: dict[str, Any] = {"z_loss": 1e-2} if self.z_loss else {}
        options |= {"softcap": 5.0} if self.softcap else {}
        return {"token_weight": of_token}, options | ({"return_accuracy": True} if self.accuracy else {})


_NO_OPTIONS = HeadOptions()


def _head_options(z_loss, softcap, token_weight, return_accuracy) -> HeadOptions:
    if z_loss == 0.0 and softcap is None and token_weight is None and not return_accuracy:
        return _NO_OPTIONS
    return HeadOptions(z_loss > 0.0, softcap is not None, token_weight is not None, return_accuracy)


def cross_entropy_facts(
    logits,
    targets,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    token_weight=None,
    return_accuracy=False,
) -> tuple:
    C = logits.shape[0 if logits.ndim == 1 else 1]
    options = _head_options(z_loss, softcap, token_weight, return_accuracy)
    return logits.dtype, C, weight is not None, reduction, label_smoothing > 0.0, _asked(logits), options


def _targets(draw: Draw, C: int, n_rows: int) -> Tensor:
    """Random classes, the first and the last one among them, and an ignored row."""
    targets = draw.index(C, n_rows)
    targets[0], targets[1], targets[2] = 0, C - 1, -100
    return targets


class CrossEntropy(NamedTuple):
    dtype: torch.dtype
    n_classes: int  # as it is: where a row is kept follows from its length
    has_weight: bool
    reduction: str
    smoothing: bool
    asked: Asked
    options: HeadOptions = _NO_OPTIONS

    def asked_for(self) -> list[str]:
        return _where(self.asked, "logits")

    def variant(self, device: torch.device) -> str:
        return _words(
            _name(self.dtype),
            f"{self.n_classes} classes",
            f"reduction {self.reduction}",
            self.has_weight and "class weights",
            self.smoothing and "label smoothing",
            self.options != _NO_OPTIONS and self.options.words(),
            _gradients(self),
        )

    def inputs(self, draw: Draw) -> Inputs:
        """Some classes are likely, at the ends of a row, too: errors in the tiny gradients of others do not show."""
        logits = draw.normal(24, self.n_classes, dtype=self.dtype) * 3
        logits[3, 0] = logits[4, -1] = logits[5].amax() + 2
        weight = draw.normal(self.n_classes, dtype=self.dtype).abs() + 0.1 if self.has_weight else None
        targets = _targets(draw, self.n_classes, 24)
        targets[6:12] = logits[6:12].argmax(1)
        tensors = {"logits": logits, "targets": targets, "weight": weight}
        more, options = self.options.inputs(draw, targets, self.dtype)
        options |= {"reduction": self.reduction, "label_smoothing": 0.1 if self.smoothing else 0.0}
        return tensors | more, options


def linear_cross_entropy_facts(
    x,
    weight,
    targets,
    bias=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    token_weight=None,
    return_accuracy=False,
) -> tuple:
    asked, options = _asked(x, weight, bias), _head_options(z_loss, softcap, token_weight, return_accuracy)
    return x.dtype, weight.shape[0], bias is not None, reduction, label_smoothing > 0.0, asked, options


class LinearCrossEntropy(NamedTuple):
    dtype: torch.dtype
    n_classes: int
    has_bias: bool
    reduction: str
    smoothing: bool
    asked: Asked
    options: HeadOptions = _NO_OPTIONS

    def asked_for(self) -> list[str]:
        return _where(self.asked, "x", "weight", "bias")

    def variant(self, device: torch.device) -> str:
        return _words(
            _name(self.dtype),
            f"{self.n_classes} classes",
            f"reduction {self.reduction}",
            self.has_bias and "bias",
            self.smoothing and "label smoothing",
            self.options != _NO_OPTIONS and self.options.words(),
            _gradients(self),
        )

    def inputs(self, draw: Draw) -> Inputs:
        """More rows than the fewest of a chunk, so that there are two chunks. The products are PyTorch's.

        Where the accuracy is asked for, all are whole numbers: their products are exact, and so is which is largest.
        """
        tensors = _head_inputs(draw, self.dtype, self.n_classes, self.has_bias, whole=self.options.accuracy)
        targets = _targets(draw, self.n_classes, _HEAD_ROWS)
        if self.options.accuracy:
            logits = tensors["x"][6:200].float() @ tensors["weight"].float().t()
            targets[6:200] = (logits + tensors["bias"].float() if self.has_bias else logits).argmax(1)
        more, options = self.options.inputs(draw, targets, self.dtype)
        options |= {"reduction": self.reduction, "label_smoothing": 0.1 if self.smoothing else 0.0}
        return tensors | {"targets": targets} | more, options


_HEAD_ROWS = 260


def _head_inputs(draw: Draw, dtype: torch.dtype, V: int, has_bias: bool, whole: bool = False) -> dict[str, Any]:
    """x, weight and bias, whose logits have a spread of 3, see CrossEntropy.inputs."""
    tensors = {
        "x": draw.normal(_HEAD_ROWS, 16, dtype=dtype),
        "weight": draw.normal(V, 16, dtype=dtype) * 0.75,
        "bias": draw.normal(V, dtype=dtype) if has_bias else None,
    }
    return {name: None if t is None else t.round().clamp(-2, 2) if whole else t for name, t in tensors.items()}


def linear_log_probs_facts(x, weight, targets, bias=None, softcap=None) -> tuple:
    return x.dtype, weight.shape[0], bias is not None, softcap is not None, _asked(x, weight, bias)


class LinearLogProbs(NamedTuple):
    dtype: torch.dtype
    n_classes: int
    has_bias: bool
    softcap: bool
    asked: Asked

    def asked_for(self) -> list[str]:
        return _where(self.asked, "x", "weight", "bias")

    def variant(self, device: torch.device) -> str:
        return _words(
            _name(self.dtype),
            f"{self.n_classes} classes",
            self.has_bias and "bias",
            self.softcap and "softcap",
            _gradients(self),
        )

    def inputs(self, draw: Draw) -> Inputs:
        tensors = _head_inputs(draw, self.dtype, self.n_classes, self.has_bias)
        targets = draw.index(self.n_classes, _HEAD_ROWS)
        return tensors | {"targets": targets}, {"softcap": 5.0} if self.softcap else {}


# ---- of a call ----

Call: TypeAlias = Attention | Norm | Embedding | CrossEntropy | LinearCrossEntropy | LinearLogProbs
FACTS: dict[str, Callable[..., tuple]] = {  # of each op that has kernels for GPUs
    "attention": attention_facts,
    "layer_norm": layer_norm_facts,
    "add_layer_norm": add_layer_norm_facts,
    "embedding": embedding_facts,
    "cross_entropy": cross_entropy_facts,
    "linear_cross_entropy": linear_cross_entropy_facts,
    "linear_log_probs": linear_log_probs_facts,
}
CALLS: dict[str, Callable[..., Any]] = {
    "attention": Attention,
    "layer_norm": Norm,
    "add_layer_norm": Norm,
    "embedding": Embedding,
    "cross_entropy": CrossEntropy,
    "linear_cross_entropy": LinearCrossEntropy,
    "linear_log_probs": LinearLogProbs,
}
UNKNOWN = -1  # a size that torch.compile leaves open
# What stands for sizes that are not known: one call for each kernel of attention, few rows and many of a norm.
_SIZES = {"B": 2, "H": 4, "Hkv": 4, "D": 64, "width": 768, "n_classes": 50304}
_LENGTHS_AND_ROWS = ((48, 64), (200, 2**16), (600, 2**16))


def with_unknown_sizes(facts: tuple) -> tuple:
    """The facts of a call that is being traced, in which sizes may be symbols: these are UNKNOWN then."""
    return tuple([fact if is_static(fact) else UNKNOWN for fact in facts])


def calls_of(op: str, facts: tuple) -> list[Call]:
    """The calls that these facts describe: one, or where sizes are unknown, calls of typical sizes.

    An empty call, which launches no kernel, is none.
    """
    if any(type(fact) is int and fact == 0 for fact in facts):
        return []
    call = CALLS[op](*facts)
    unknown = [name for name, fact in zip(call._fields, call, strict=True) if type(fact) is int and fact == UNKNOWN]
    if not unknown:
        return [call]
    sizes = [_SIZES | {"Tq": length, "Tk": length, "n_rows": n_rows} for length, n_rows in _LENGTHS_AND_ROWS]
    return list(dict.fromkeys(call._replace(**{name: size[name] for name in unknown}) for size in sizes))


def small_call(call: Call, device: torch.device) -> Call:
    """A call of the same variant that takes as little time as any."""
    variant = call.variant(device)
    smaller = call.smaller() if isinstance(call, Attention) else iter(())  # the others' `inputs` are small as they are
    return next((small for small in smaller if small.variant(device) == variant), call)


def typical_calls(op: str) -> list[Call]:
    """The calls of `op` in the training and the generation of common models: what `fastgpt doctor` asks about."""
    half, wide, everything = torch.bfloat16, torch.float32, (True,) * 4
    if op == "attention":
        step = Attention(half, 8, 12, 12, 64, 64, 64, True, False, None, everything[:3])
        steps = [
            step._replace(Tq=T, Tk=T, dropout=dropout, route=route)
            for route in ("self_attention", "attention")  # that of a model, and that of who calls the op
            for T in (64, 256, 1024)
            for dropout in (False, True)
        ]
        token = step._replace(Tq=1, Tk=600, asked=())
        return [*steps, token, token._replace(Tk=1024, route="attention_cached")]
    if op == "layer_norm":
        return [
            Norm(dtype, None, dtype, 768, 8192, True, False, None, None, (True, False, True, True))
            for dtype in (half, wide)
        ]
    if op == "add_layer_norm":  # the stream and the weights are float32, the branch has autocast's dtype
        return [Norm(half, wide, wide, 768, 8192, True, dropout, half, half, everything) for dropout in (False, True)]
    if op == "embedding":
        return [Embedding(wide, 768, has_positions, None, (True, has_positions)) for has_positions in (False, True)]
    if op == "cross_entropy":
        return [CrossEntropy(half, classes, False, "mean", False, (True,)) for classes in (65, 50304)]
    if op == "linear_cross_entropy":
        return [LinearCrossEntropy(half, V, False, "mean", False, (True, True, False)) for V in (65, 50304)]
    if op == "linear_log_probs":
        return [LinearLogProbs(half, 50304, False, False, asked) for asked in ((), (True, True, False))]
    return []
