"""What a model is (GPTConfig), how it is trained (TrainConfig), and named settings of both (presets)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu2")
NORMS = ("pre", "post", "none")
LR_DECAYS = ("cosine", "linear")
LAYOUTS = ("blocks", "windows", "names", "completions")  # data.layouts has a class for each
ORDERS = ("random", "epochs")  # of the examples in training; data.order has the second
SOURCES = ("shakespeare", "tinyshakespeare", "names")  # texts with a name; data.sources reads each
DEFAULT_TEXT = "shakespeare"  # of every command: whoever could install FastGPT can have it
DTYPES = ("auto", "float32", "bfloat16", "float16")  # of autocast in training
PARALLELS = ("auto", "ddp", "fsdp")  # how several processes train a model together
OPTIMIZERS = ("adamw", "muon")
LOGGERS = ("tensorboard", "wandb")  # training.loggers has a class for each, which needs the package of that name
BACKENDS = ("torch", "triton", "native")  # of the ops; here, because ops.backend imports PyTorch
MAX_HEAD_SIZE = 256  # of ops.attention, on every backend


class ConfigError(ValueError):
    """A setting with a value it cannot have. The message names the setting, the value and what was expected."""


def _expect(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


_KINDS_IN_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "tuple[str, ...]": "a list of texts",
    "str | tuple[str, ...]": "text, or a list of texts",
}


def check_types(config: Any) -> None:
    """Every field holds its annotated type: a typo in a TOML file must not surface as an error inside PyTorch.

    Numbers of other libraries, such as numpy.int64, are replaced by Python's own: the settings are written to files.
    """
    for item in dataclasses.fields(config):
        annotation = item.type if isinstance(item.type, str) else getattr(item.type, "__name__", str(item.type))
        name = annotation.removesuffix(" | None")
        value = getattr(config, item.name)
        if name != annotation and value is None:
            continue
        try:
            own = _as_kind(name, value)
        except TypeError:
            raise ConfigError(f"{item.name}: expected {_KINDS_IN_WORDS[name]}, got {value!r}") from None
        if name == "float":
            _expect(math.isfinite(own), item.name, value, "a finite number")
        object.__setattr__(config, item.name, own)  # GPTConfig and TrainConfig are frozen


def as_int(value: Any) -> int:
    """An integer of any library, which is what has `__index__`, as Python's int; TypeError for anything else.

    A bool has `__index__` too, but as a number it is a mistake: `n_layer=True`.
    """
    number = _unboxed(value)
    if isinstance(number, bool):
        raise TypeError(f"expected an integer, got {value!r}")
    return operator.index(number)


def as_int_argument(name: str, value: Any, least: int | None = None) -> int:
    """The argument called `name` as Python's int; ValueError where it is no integer, or less than `least`."""
    with contextlib.suppress(TypeError):
        number = as_int(value)
        if least is None or number >= least:
            return number
    bound = "" if least is None else f" of at least {least}"
    raise ValueError(f"{name}: expected an integer{bound}, got {value!r}")


def as_float(value: Any) -> float | None:
    """A real number, or an array or tensor of one, as Python's float; None for a bool and for what has no float."""
    number = _unboxed(value[0] if getattr(value, "shape", None) == (1,) else value)
    if isinstance(number, bool) or not isinstance(number, (Real, Decimal)):
        return None
    with contextlib.suppress(OverflowError, ValueError):
        return float(number)
    return None


def _unboxed(value: Any) -> Any:
    """The scalars of numpy, and arrays and tensors of no dimension, as the Python value that they hold."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _as_kind(name: str, value: Any) -> Any:
    """`value` as what the annotation `name` says; TypeError where it is something else."""
    if name == "int":
        return as_int(value)
    kinds: dict[str, Any] = {"float": float, "bool": bool, "str": str, "tuple[str, ...]": tuple}
    kinds["str | tuple[str, ...]"] = (str, tuple)
    own: Any = as_float(value) if name == "float" else _unboxed(value)
    if not isinstance(own, kinds[name]) or (isinstance(own, tuple) and not all(isinstance(part, str) for part in own)):
        raise TypeError(f"expected {_KINDS_IN_WORDS[name]}, got {value!r}")
    return own


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults are nanoGPT's character-level Shakespeare model, with biases.

    Args:
        vocab_size: number of tokens, V.
        block_size: the longest context, T tokens.
        n_layer: blocks, L.
        n_head: attention heads, H; divides n_embd.
        n_embd: width of the residual stream, C.
        dropout: probability, in [0, 1), on embeddings, attention weights and branch outputs.
        bias: biases in linears and norms.
        activation: gelu (erf), gelu_tanh, relu, or relu2 (relu squared).
        norm: pre (GPT-2), post (Vaswani et al. 2017), or none.
        residual: x + branch(x), or branch(x) alone.
        is_causal: a decoder; off, every token sees the whole block.
        tie_weights: the head is the token embedding.
        feed_forward: a feed-forward branch in every block, or attention alone.
    """

    vocab_size: int = 65
    block_size: int = 256
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.2
    bias: bool = True
    activation: str = "gelu"
    norm: str = "pre"
    residual: bool = True
    is_causal: bool = True
    tie_weights: bool = True
    feed_forward: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            _expect(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
            _expect(getattr(self, name) < 2**31, name, getattr(self, name), "an integer below 2**31")
        _expect(self.n_embd % self.n_head == 0, "n_embd", self.n_embd, f"a multiple of n_head={self.n_head}")
        most = f"at most {MAX_HEAD_SIZE} per head (n_head={self.n_head})"
        _expect(self.n_embd // self.n_head <= MAX_HEAD_SIZE, "n_embd", self.n_embd, most)
        _expect(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "a number in [0, 1)")
        _expect(self.activation in ACTIVATIONS, "activation", self.activation, f"one of {', '.join(ACTIVATIONS)}")
        _expect(self.norm in NORMS, "norm", self.norm, f"one of {', '.join(NORMS)}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPTConfig:
        """The configuration called `name`, with `changes` made to it. Unknown names and settings raise ConfigError."""
        return from_dict(cls, {**preset(name)[0], **changes})


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Learning rate: linear warm-up, then a decay down to min_lr at max_steps.

    Args:
        batch_size: blocks per micro-step, in all processes together.
        grad_accum: micro-steps per optimizer step.
        max_steps: optimizer steps; training ends here.
        optimizer: adamw, or muon for the matrices between embeddings and head, with adamw for all other parameters.
        lr: the largest learning rate of adamw, reached after the warm-up.
        min_lr: the learning rate of adamw at max_steps.
        muon_lr: the largest learning rate of muon; its schedule is adamw's, so it ends at muon_lr * min_lr / lr.
        muon_momentum: how much of muon's momentum is kept at each step.
        warmup_steps: steps of linear warm-up.
        lr_decay: how the learning rate falls after the warm-up, along half a cosine or linear.
        weight_decay: decoupled from the gradient, on matrices only.
        beta1: AdamW's first-moment decay.
        beta2: AdamW's second-moment decay.
        grad_clip: largest gradient norm; 0 does not clip.
        eval_interval: steps between evaluations, each of which writes a checkpoint.
        eval_batches: batches per evaluation.
        log_interval: steps between training rows in metrics.jsonl.
        target_loss: end once the validation loss is at most this.
        seed: of weights, data order and dropout.
        device: auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps, ...
        dtype: auto (on CUDA bfloat16, or float16 where that is emulated; else float32), float32, bfloat16 or float16.
        compile: run the loss through torch.compile.
        layout: blocks (every prefix is an example), windows (whole contexts only), names (each line by itself), or
            completions (of prompts, in JSON lines).
        order: random (examples are drawn anew for each step) or epochs (each example once, shuffled, before any again).
        cuda_graph: take steps by a CUDA graph, after a check against eager ones. Without a value: on a CUDA device,
            unless compile or activation_checkpointing is on.
        parallel: how the processes of torchrun --nproc-per-node N -m fastgpt train share the work: auto (ddp), ddp
            (each has the whole model), or fsdp (each has a part of every parameter, gradient and moment).
        activation_checkpointing: keep the input of each block alone, and compute the block again in backward: less
            memory, more time, the same numbers.
    """

    batch_size: int = 64
    grad_accum: int = 1
    max_steps: int = 5000
    optimizer: str = "adamw"
    lr: float = 1e-3
    min_lr: float = 1e-4
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    warmup_steps: int = 100
    lr_decay: str = "cosine"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0
    eval_interval: int = 250
    eval_batches: int = 20
    log_interval: int = 10
    target_loss: float | None = None
    seed: int = 1337
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    layout: str = "blocks"
    order: str = "random"
    cuda_graph: bool | None = None
    parallel: str = "auto"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("batch_size", "grad_accum", "eval_interval", "eval_batches", "log_interval"):
            _expect(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        for name in ("max_steps", "warmup_steps", "lr", "min_lr", "muon_lr", "weight_decay", "grad_clip"):
            _expect(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("beta1", "beta2", "muon_momentum"):
            _expect(0.0 <= getattr(self, name) < 1.0, name, getattr(self, name), "a number in [0, 1)")
        _expect(self.min_lr <= self.lr, "min_lr", self.min_lr, f"at most lr={self.lr}")
        _expect(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, f"one of {', '.join(OPTIMIZERS)}")
        if self.optimizer == "muon":  # the rate of muon is that of adamw, times muon_lr / lr
            _expect(self.lr > 0.0, "lr", self.lr, "more than 0 with optimizer=muon, whose rate follows its schedule")
        _expect(0 <= self.seed < 2**63, "seed", self.seed, "an integer in [0, 2**63)")
        _expect(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        _expect(self.lr_decay in LR_DECAYS, "lr_decay", self.lr_decay, f"one of {', '.join(LR_DECAYS)}")
        _expect(self.layout in LAYOUTS, "layout", self.layout, f"one of {', '.join(LAYOUTS)}")
        _expect(self.parallel in PARALLELS, "parallel", self.parallel, f"one of {', '.join(PARALLELS)}")
        if self.activation_checkpointing:  # which saves the random state, and a recording cannot
            _expect(not self.cuda_graph, "cuda_graph", self.cuda_graph, "false with activation_checkpointing")
        _expect(self.order in ORDERS, "order", self.order, f"one of {', '.join(ORDERS)}")


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """kind(**values), with an error that names an unknown setting."""
    known = {item.name for item in dataclasses.fields(kind)}
    for name in values:
        _expect(name in known, name, values[name], f"a setting of {kind.__name__} ({', '.join(sorted(known))})")
    return kind(**values)


Preset = tuple[dict[str, Any], dict[str, Any]]  # (settings of the model, settings of its training)


def _gpt2(n_layer: int, n_head: int, n_embd: int) -> Preset:
    model = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "vocab_size": 50257, "block_size": 1024}
    train = {"batch_size": 12, "lr": 6e-4, "min_lr": 6e-5, "beta2": 0.95, "warmup_steps": 2000, "max_steps": 600_000}
    return {**model, "dropout": 0.0, "bias": True, "activation": "gelu_tanh"}, train


PRESETS: dict[str, Preset] = {
    "shakespeare-char": ({"dropout": 0.2, "bias": False}, {"max_steps": 5000}),
    "shakespeare-char-cpu": (
        {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "dropout": 0.0, "bias": False},
        {
            "batch_size": 12,
            "max_steps": 400,
            "eval_interval": 100,
            "optimizer": "muon",
            "muon_lr": 0.04,
            "muon_momentum": 0.9,
            "lr": 0.016,
            "min_lr": 0.0,
            "lr_decay": "linear",
            "warmup_steps": 0,
        },  # among the fastest to the loss of nanoGPT's recipe in `fastgpt study recipe`
    ),
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
}


# How a trained model is trained further where no preset is named. Small steps keep most of what it has learned.
FINE_TUNING = {
    "batch_size": 16,
    "max_steps": 300,
    "min_lr": 0.0,
    "lr_decay": "linear",
    "warmup_steps": 20,
    "eval_interval": 50,
}


def fine_tuning_rate(n_embd: int) -> float:
    """The learning rate of AdamW that goes with FINE_TUNING: inverse to the width, as Yang et al. 2022 scale it.

    1e-3 was a good rate for a width of 128; for GPT-2's 768 it becomes 1.7e-4.
    """
    return 0.128 / n_embd


def preset(name: str) -> Preset:
    """The preset called `name`, as new dictionaries."""
    _expect(name in PRESETS, "preset", name, f"one of {', '.join(PRESETS)}")
    model, train = PRESETS[name]
    return dict(model), dict(train)
