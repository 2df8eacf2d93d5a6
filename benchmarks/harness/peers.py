"""Who FastGPT is compared with, each behind an adapter of a few lines: first the ops, then the models.

Every peer does the same work: same shapes, dtype and dropout; models also the same fused AdamW and clipping. A peer
that is not here (a package that is not installed, a checkout whose path was not given, a kernel for another device) is
listed as absent, and why. PyTorch's attention is called by the name of its kernel: "SDPA" alone may be any of four.

An op's table maps a peer's name to a function that makes the peer, or raises `Absent`; a peer takes the op's tensors
by position and returns what the op returns.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import GPT, GPTConfig
from fastgpt.config import TrainConfig
from fastgpt.training.step import Precision, make_optimizer
from fastgpt.training.step import training_step as one_step


class Absent(Exception):
    """Why a peer is not measured."""


@dataclass(frozen=True)
class Peer:
    """A peer's function; `overwrites`: it writes over its inputs, so it needs some of its own."""

    function: Callable[..., Any]
    overwrites: bool = False


Makers = Mapping[str, Callable[[], Peer]]


def _import(module: str, package: str) -> Any:
    """The module, where its package is installed and loads."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        what = (
            package
            if importlib.util.find_spec(module.split(".")[0]) is None
            else f"{package} needs {error.name}, which"
        )
        raise Absent(f"{what} is not installed") from None
    except Exception as error:  # a driver that is missing, an incompatible version: whatever it says is the reason
        raise Absent(f"{package} does not load: {str(error).splitlines()[0] if str(error) else error!r}") from None


def _only_on_gpus(device: torch.device) -> None:
    if device.type != "cuda":
        raise Absent("its kernels run on CUDA devices only")


def _compiled(function: Callable[..., Any]) -> Peer:
    return Peer(torch.compile(function, fullgraph=True, dynamic=False))


# --- attention: q (B, H, Tq, D), k and v (B, Hkv, Tk, D) -------------------------------------------------------------


def attention(device: torch.device, is_causal: bool, dropout_p: float, gqa: bool) -> Makers:
    """`is_causal` with as many queries as keys, or not causal: the two cases that all peers mean the same by."""
    options = {"is_causal": is_causal, "dropout_p": dropout_p, "enable_gqa": gqa}

    def sdpa(backend: SDPBackend) -> Peer:
        if backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            _only_on_gpus(device)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **options)

        return Peer(call)

    def flex() -> Peer:
        if dropout_p:
            raise Absent("FlexAttention has no dropout")
        module = _import("torch.nn.attention.flex_attention", "torch")
        compiled = torch.compile(module.flex_attention, dynamic=False)
        masks: dict[tuple[int, int], Any] = {}

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            size = (q.shape[2], k.shape[2])
            if is_causal and size not in masks:
                masks[size] = module.create_block_mask(lambda b, h, i, j: j <= i, None, None, *size, device=q.device)
            return compiled(q, k, v, block_mask=masks.get(size), enable_gqa=gqa)

        return Peer(call)

    def flash_attn(module: str) -> Peer:
        _only_on_gpus(device)
        function = _import(
            module, "flash-attn" if module == "flash_attn" else "flash-attn 3"
        ).flash_attn_func  # (B, T, H, D)
        settings: dict[str, Any] = {"causal": is_causal}
        if module == "flash_attn":
            settings["dropout_p"] = dropout_p
        elif dropout_p:
            raise Absent("FlashAttention-3 has no dropout")

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **settings)
            out = out[0] if isinstance(out, tuple) else out  # some versions return the logsumexp too
            return out.transpose(1, 2)

        return Peer(call)

    return {
        "sdpa flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "sdpa efficient": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
        "sdpa math": partial(sdpa, SDPBackend.MATH),
        "flex attention": flex,
        "flash-attn": partial(flash_attn, "flash_attn"),
        "flash-attn 3": partial(flash_attn, "flash_attn_interface"),
    }


# --- layer norm ------------------------------------------------------------------------------------------------------


def layer_norm(device: torch.device) -> Makers:
    """x (n, C), weight (C,), bias (C,)."""

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias)

    def liger() -> Peer:
        _only_on_gpus(device)
        function = _import("liger_kernel.ops.layer_norm", "liger-kernel").LigerLayerNormFunction
        return Peer(lambda x, weight, bias: function.apply(x, weight, bias, 1e-5))

    def quack() -> Peer:
        """Forward alone: QuACK has no autograd function for LayerNorm. Its weights are float32."""
        _only_on_gpus(device)
        function = _import("quack.rmsnorm", "quack-kernels").layernorm_fwd
        kept: dict[int, tuple[Tensor, Tensor]] = {}  # converted once: that is not the kernel's work

        def wide(tensor: Tensor) -> Tensor:
            if id(tensor) not in kept:
                kept[id(tensor)] = (tensor, tensor.float())
            return kept[id(tensor)][1]

        return Peer(lambda x, weight, bias: function(x, wide(weight), wide(bias), eps=1e-5))

    return {
        "torch": lambda: Peer(torchs), "torch.compile": lambda: _compiled(torchs), "liger-kernel": liger,
        "quack-kernels": quack,
    }  # fmt: skip


def add_layer_norm(device: torch.device, dropout_p: float) -> Makers:
    """x (n, C), residual (n, C), weight (C,), bias (C,) -> the norm and its input."""

    def torchs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        h = residual + F.dropout(x, dropout_p)
        return F.layer_norm(h, weight.shape, weight, bias), h

    return {"torch": lambda: Peer(torchs), "torch.compile": lambda: _compiled(torchs)}


# --- embedding -------------------------------------------------------------------------------------------------------


def embedding(device: torch.device) -> Makers:
    """tokens (B, T), token table (V, C), position table (T, C)."""

    def torchs(tokens: Tensor, table: Tensor, positions: Tensor) -> Tensor:
        return F.embedding(tokens, table) + positions

    def liger() -> Peer:
        _only_on_gpus(device)
        function = _import("liger_kernel.ops.experimental.embedding", "liger-kernel").LigerEmbeddingFunction
        return Peer(lambda tokens, table, positions: function.apply(table, tokens) + positions)

    return {"torch": lambda: Peer(torchs), "torch.compile": lambda: _compiled(torchs), "liger-kernel": liger}


# --- cross-entropy ---------------------------------------------------------------------------------------------------


def cross_entropy(device: torch.device) -> Makers:
    """logits (n, V), targets (n,)."""

    def liger() -> Peer:
        _only_on_gpus(device)
        function = _import("liger_kernel.transformers.functional", "liger-kernel").liger_cross_entropy
        return Peer(function, overwrites=True)

    def quack() -> Peer:
        _only_on_gpus(device)
        return Peer(_import("quack.cross_entropy", "quack-kernels").cross_entropy)

    return {
        "torch": lambda: Peer(F.cross_entropy), "torch.compile": lambda: _compiled(F.cross_entropy),
        "liger-kernel": liger, "quack-kernels": quack,
    }  # fmt: skip


def linear_cross_entropy(device: torch.device) -> Makers:
    """x (n, C), head (V, C), targets (n,)."""

    def torchs(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, head), targets)

    def liger() -> Peer:
        _only_on_gpus(device)
        return Peer(_import("liger_kernel.transformers.functional", "liger-kernel").liger_fused_linear_cross_entropy)

    def quack() -> Peer:
        _only_on_gpus(device)
        return Peer(_import("quack.linear_cross_entropy", "quack-kernels").chunked_linear_cross_entropy)

    return {
        "torch": lambda: Peer(torchs), "torch.compile": lambda: _compiled(torchs), "liger-kernel": liger,
        "quack-kernels": quack,
    }  # fmt: skip


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A GPT, and what it is fed: B sequences of T tokens; L layers, H heads, width C, vocabulary V. No biases."""

    B: int
    T: int
    L: int
    H: int
    C: int
    V: int
    dropout: float = 0.0

    def __str__(self) -> str:
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        return f"B{self.B} T{self.T} L{self.L} H{self.H} C{self.C} V{self.V}{dropout}"

    @property
    def head_and_blocks(self) -> int:
        """Weights that every token is multiplied with."""
        return 12 * self.L * self.C**2 + self.V * self.C

    @property
    def step_flops(self) -> float:
        """Matrix products of a training step; the causal half of the attention's."""
        tokens = self.B * self.T
        return 6.0 * tokens * self.head_and_blocks + 3.5 * 4 * tokens * (self.T / 2) * self.C * self.L


Loss = Callable[[Tensor, Tensor], Tensor]
Model = tuple[nn.Module, Loss]


def fastgpt_model(shape: Shape) -> Model:
    cfg = GPTConfig(
        vocab_size=shape.V, block_size=shape.T, n_layer=shape.L, n_head=shape.H, n_embd=shape.C,
        dropout=shape.dropout, bias=False,
    )  # fmt: skip
    model = GPT(cfg)
    return model, model.loss


def nanogpt(shape: Shape, checkout: str | None) -> Model:
    """karpathy/nanoGPT, its model.py as it is."""
    if checkout is None:
        raise Absent("give a checkout: --nanogpt DIR")
    module = _load(Path(checkout) / "model.py", "nanogpt_model")
    config = module.GPTConfig(
        vocab_size=shape.V, block_size=shape.T, n_layer=shape.L, n_head=shape.H, n_embd=shape.C,
        dropout=shape.dropout, bias=False,
    )  # fmt: skip
    model = module.GPT(config)
    return model, lambda x, y: model(x, y)[1]


def lecture(shape: Shape, file: str | None, device: torch.device) -> Model:
    """The lecture's gpt.py (karpathy/ng-video-lecture): its imports and classes; the script around them trains."""
    if file is None:
        raise Absent("give the file: --lecture gpt.py")
    path = Path(file)
    if not path.is_file():
        raise Absent(f"{path} is not a file")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef))]
    settings = {"vocab_size": shape.V, "block_size": shape.T, "n_layer": shape.L, "n_head": shape.H}
    namespace = {**settings, "n_embd": shape.C, "dropout": shape.dropout, "device": str(device), "__name__": "lecture"}
    exec(compile(tree, str(path), "exec"), namespace)
    model = namespace["GPTLanguageModel"]()
    return model, lambda x, y: model(x, y)[1]


def transformers(shape: Shape, attention: str) -> Model:
    """transformers.GPT2LMHeadModel, which always has biases and the tanh form of GELU."""
    module = _import("transformers", "transformers")
    config = module.GPT2Config(
        vocab_size=shape.V, n_positions=shape.T, n_layer=shape.L, n_head=shape.H, n_embd=shape.C,
        resid_pdrop=shape.dropout, embd_pdrop=shape.dropout, attn_pdrop=shape.dropout,
        attn_implementation=attention, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = module.GPT2LMHeadModel(config)
    # Its own loss shifts the labels; the logits against the targets are the same work on all T tokens.
    return model, lambda x, y: F.cross_entropy(model(x, use_cache=False).logits.flatten(0, 1), y.flatten())


def models(
    shape: Shape, device: torch.device, nanogpt_checkout: str | None, lecture_file: str | None
) -> tuple[dict[str, Model], dict[str, str]]:
    """(name -> (model, loss), name -> why it is absent); on `device`, every model initialised from one seed."""
    makers = {
        "fastgpt": lambda: fastgpt_model(shape),
        "nanoGPT": lambda: nanogpt(shape, nanogpt_checkout),
        "lecture": lambda: lecture(shape, lecture_file, device),
        "transformers sdpa": lambda: transformers(shape, "sdpa"),
        "transformers eager": lambda: transformers(shape, "eager"),
    }
    present, absent = {}, {}
    for name, make in makers.items():
        torch.manual_seed(0)
        try:
            model, loss = make()
        except Absent as reason:
            absent[name] = str(reason)
            continue
        present[name] = (model.to(device), loss)
    return present, absent


def training_step(model: nn.Module, loss: Loss, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Forward, backward, clipping and fused AdamW, as `fastgpt train` does them; bfloat16 autocast on a GPU."""
    model.train()
    optimizer, precision = make_optimizer(model, TrainConfig()), measured_precision(device)
    return lambda x, y: one_step(model, loss, optimizer, [(x, y)], precision, grad_clip=1.0)


def measured_precision(device: torch.device) -> Precision:
    """What models are measured in, whatever `fastgpt train` takes there: a row means the same on every GPU."""
    return Precision(device, "bfloat16" if device.type == "cuda" else "float32")


def _load(path: Path, name: str) -> SimpleNamespace:
    if not path.is_file():
        raise Absent(f"{path} is not a file")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # torch.compile looks a function's module up by name
    spec.loader.exec_module(module)
    return module  # type: ignore[return-value]
