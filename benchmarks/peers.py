"""The models FastGPT is compared with, each behind the same few lines: built to one shape, trained by one step.

Every peer does the same work: same shape and dropout, fused AdamW with the same settings, the same clipping. A peer
that is not here (a package that is not installed, a checkout whose path was not given) is listed as absent, and why.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fastgpt import GPT, GPTConfig
from fastgpt.config import TrainConfig
from fastgpt.train import make_optimizer


class Absent(Exception):
    """Why a peer is not measured."""


@dataclass(frozen=True)
class Shape:
    """A training step: B sequences of T tokens; L layers, H heads, width C, vocabulary V. No biases."""

    B: int
    T: int
    L: int
    H: int
    C: int
    V: int
    dropout: float

    def __str__(self) -> str:
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        return f"B{self.B} T{self.T} L{self.L} H{self.H} C{self.C} V{self.V}{dropout}"


Loss = Callable[[Tensor, Tensor], Tensor]


def fastgpt_model(shape: Shape) -> tuple[nn.Module, Loss]:
    cfg = GPTConfig(
        vocab_size=shape.V, block_size=shape.T, n_layer=shape.L, n_head=shape.H, n_embd=shape.C,
        dropout=shape.dropout, bias=False,
    )  # fmt: skip
    model = GPT(cfg)
    return model, model.loss


def nanogpt(shape: Shape, checkout: str | None) -> tuple[nn.Module, Loss]:
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


def lecture(shape: Shape, file: str | None) -> tuple[nn.Module, Loss]:
    """The lecture's gpt.py (karpathy/ng-video-lecture): its imports and classes; the script around them trains."""
    if file is None:
        raise Absent("give the file: --lecture gpt.py")
    path = Path(file)
    if not path.is_file():
        raise Absent(f"{path} is not a file")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef))]
    settings = {"vocab_size": shape.V, "block_size": shape.T, "n_layer": shape.L, "n_head": shape.H}
    namespace = {**settings, "n_embd": shape.C, "dropout": shape.dropout, "device": "cpu", "__name__": "lecture"}
    exec(compile(tree, str(path), "exec"), namespace)
    model = namespace["GPTLanguageModel"]()
    return model, lambda x, y: model(x, y)[1]


def transformers(shape: Shape, attention: str) -> tuple[nn.Module, Loss]:
    """transformers.GPT2LMHeadModel, which always has biases and the tanh form of GELU."""
    if importlib.util.find_spec("transformers") is None:
        raise Absent("transformers is not installed")
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.V, n_positions=shape.T, n_layer=shape.L, n_head=shape.H, n_embd=shape.C,
        resid_pdrop=shape.dropout, embd_pdrop=shape.dropout, attn_pdrop=shape.dropout,
        attn_implementation=attention, use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    # Its own loss shifts the labels; the logits against the targets are the same work on all T tokens.
    return model, lambda x, y: nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())


def training_step(model: nn.Module, loss: Loss) -> Callable[[Tensor, Tensor], float]:
    """Forward, backward, clipping and fused AdamW, as `fastgpt train` does them."""
    model.train()
    optimizer = make_optimizer(model, TrainConfig())  # type: ignore[arg-type]

    def step(x: Tensor, y: Tensor) -> float:
        value = loss(x, y)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach())

    return step


def _load(path: Path, name: str) -> SimpleNamespace:
    if not path.is_file():
        raise Absent(f"{path} is not a file")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module  # type: ignore[return-value]


def build(shape: Shape, nanogpt_checkout: str | None, lecture_file: str | None) -> tuple[dict, dict[str, str]]:
    """(name -> (model, loss), name -> why it is absent), every model initialised from one seed."""
    makers = {
        "fastgpt": lambda: fastgpt_model(shape),
        "nanoGPT": lambda: nanogpt(shape, nanogpt_checkout),
        "lecture": lambda: lecture(shape, lecture_file),
        "transformers sdpa": lambda: transformers(shape, "sdpa"),
        "transformers eager": lambda: transformers(shape, "eager"),
    }
    present, absent = {}, {}
    for name, make in makers.items():
        torch.manual_seed(0)
        try:
            present[name] = make()
        except Absent as reason:
            absent[name] = str(reason)
    return present, absent
