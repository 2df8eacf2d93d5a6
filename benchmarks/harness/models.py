"""The models that FastGPT's is compared with, each behind an adapter of a few lines: a module and its loss.

All have the same sizes and dropout; matrix products are float32 on a CPU, bfloat16 by autocast on a GPU.
"""

import ast
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import GPT, GPTConfig
from fastgpt.benchmarks.publish.rows import OURS
from fastgpt.config import preset
from fastgpt.training.step import Loss, Precision

from .ceilings import Product, linear_products
from .peers import Absent, import_peer, make_present
from .suite import Setting


@dataclass(frozen=True)
class ModelShape:
    """A GPT and what it is fed: B sequences of T tokens; L layers, H heads, width C, vocabulary V. It has no biases."""

    B: int
    T: int
    L: int
    H: int
    C: int
    V: int
    dropout: float = 0.0

    @classmethod
    def of_preset(cls, name: str, V: int) -> Self:
        model_settings, train_settings = preset(name)
        cfg = GPTConfig(vocab_size=V, **model_settings)
        sizes = cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd, V
        return cls(train_settings["batch_size"], *sizes, cfg.dropout)

    def __str__(self) -> str:
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        return f"B{self.B} T{self.T} L{self.L} H{self.H} C{self.C} V{self.V}{dropout}"

    def tiny(self) -> Self:
        """The same model with one thin block, on one short sequence."""
        return replace(self, B=1, T=min(self.T, 40), L=1, C=8 * self.H, V=min(self.V, 500))

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of FastGPT's GPTConfig and of nanoGPT's, which share their names."""
        sizes = {"vocab_size": self.V, "block_size": self.T, "n_layer": self.L, "n_head": self.H, "n_embd": self.C}
        return {**sizes, "dropout": self.dropout, "bias": False}

    @property
    def head_and_blocks(self) -> int:
        """Weights that every token is multiplied with."""
        return 12 * self.L * self.C**2 + self.V * self.C

    @property
    def step_flops(self) -> float:
        """Matrix products of a training step, with the causal half of the attention's."""
        tokens = self.B * self.T
        return 6.0 * tokens * self.head_and_blocks + 3.5 * 4 * tokens * (self.T / 2) * self.C * self.L

    @property
    def step_products(self) -> list[Product]:
        """Those of the linear layers in a step: q, k and v at once, the projection, the two of the MLP, the head."""
        rows, C = self.B * self.T, self.C
        layers = [(C, 3 * C, self.L), (C, C, self.L), (C, 4 * C, self.L), (4 * C, C, self.L), (C, self.V, 1)]
        return [p for k, n, count in layers for p in linear_products(rows, k, n, backward=True, count=count)]

    def random_batches(self, device: torch.device, n_batches: int) -> list[tuple[Tensor, Tensor]]:
        """Batches of tokens x and targets y, (B, T) each."""
        draw = torch.Generator(device).manual_seed(1)
        size = (self.B, self.T)
        pairs = [[torch.randint(self.V, size, generator=draw, device=device) for _ in "xy"] for _ in range(n_batches)]
        return [(x, y) for x, y in pairs]


Model = tuple[nn.Module, Loss]


def fastgpt_model(shape: ModelShape) -> Model:
    model = GPT(GPTConfig(**shape.settings))
    return model, model.loss


def nanogpt(shape: ModelShape, checkout: str | None) -> Model:
    """karpathy/nanoGPT, its model.py as it is."""
    if checkout is None:
        raise Absent("give a checkout: --nanogpt DIR")
    module = _load(Path(checkout) / "model.py", "nanogpt_model")
    model = module.GPT(module.GPTConfig(**shape.settings))
    return model, lambda x, y: model(x, y)[1]


def lecture(shape: ModelShape, file: str | None, device: torch.device) -> Model:
    """The lecture's gpt.py (karpathy/ng-video-lecture): its imports and classes, without the script, which trains."""
    if file is None:
        raise Absent("give the file: --lecture gpt.py")
    path = _existing(Path(file))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef))]
    namespace = {**shape.settings, "device": str(device), "__name__": "lecture"}
    exec(compile(tree, str(path), "exec"), namespace)
    model = namespace["GPTLanguageModel"]()
    return model, lambda x, y: model(x, y)[1]


def transformers(shape: ModelShape, attention: str) -> Model:
    """transformers.GPT2LMHeadModel, which always has biases and the tanh form of GELU."""
    module = import_peer("transformers", "transformers")
    config = module.GPT2Config(
        vocab_size=shape.V, n_positions=shape.T, n_layer=shape.L, n_head=shape.H, n_embd=shape.C,
        resid_pdrop=shape.dropout, embd_pdrop=shape.dropout, attn_pdrop=shape.dropout,
        attn_implementation=attention, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = module.GPT2LMHeadModel(config)
    # Its own loss shifts the labels. The logits against the targets are the same work on all T tokens.
    return model, lambda x, y: F.cross_entropy(model(x, use_cache=False).logits.flatten(0, 1), y.flatten())


def model_makers(shape: ModelShape, setting: Setting) -> dict[str, Callable[[], Model]]:
    """What makes each model on the setting's device, initialised from PyTorch's seed as it is then."""
    makers = {
        OURS: partial(fastgpt_model, shape),
        "nanoGPT": partial(nanogpt, shape, setting.nanogpt),
        "lecture": partial(lecture, shape, setting.lecture, setting.device),
        "transformers sdpa": partial(transformers, shape, "sdpa"),
        "transformers eager": partial(transformers, shape, "eager"),
    }

    def on_device(make: Callable[[], Model]) -> Model:
        model, loss = make()
        return model.to(setting.device), loss

    return {name: partial(on_device, make) for name, make in makers.items()}


def make_models(shape: ModelShape, setting: Setting) -> tuple[dict[str, Model], dict[str, str]]:
    """(name -> (model, loss), name -> why it is absent); every model is initialised from one seed."""

    def seeded(make: Callable[[], Model]) -> Model:
        torch.manual_seed(0)
        return make()

    return make_present({name: partial(seeded, make) for name, make in model_makers(shape, setting).items()})


def measured_precision(setting: Setting) -> Precision:
    """What models are measured in, whatever `fastgpt train` chooses there: a row means the same on every GPU."""
    return Precision(setting.device, setting.dtype_name)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise Absent(f"{path} is not a file")
    return path


def _load(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, _existing(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # torch.compile looks a function's module up by name
    spec.loader.exec_module(module)
    return module
