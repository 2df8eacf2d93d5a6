"""Sampling a text, one sequence at a time. The time cannot be less than that of reading the weights once per token.

FastGPT and transformers keep the keys and values of earlier tokens; nanoGPT computes them again at every step. A shape
that is graphed launches all kernels of a token at once, by a CUDA graph, and is compared with FastGPT without one.
"""

import contextlib
import copy
import warnings
from dataclasses import dataclass, replace
from typing import Self

import pytest
import torch

import fastgpt
from fastgpt import parity
from fastgpt.benchmarks.harness.accuracy import error_ratio
from fastgpt.benchmarks.harness.ceilings import Demand, Traffic
from fastgpt.benchmarks.harness.models import ModelShape, make_models
from fastgpt.benchmarks.harness.suite import OURS, Setting, Work

PROMPT = 16
EAGER = "fastgpt eager"


@dataclass(frozen=True)
class GenerationShape(ModelShape):
    new: int = 64
    graphed: bool = False

    def tiny(self) -> Self:
        return replace(super().tiny(), new=3)

    def __str__(self) -> str:
        how = ", CUDA graph" if self.graphed else ""
        return f"L{self.L} H{self.H} C{self.C} V{self.V}, prompt {PROMPT}, {self.new} new tokens{how}"


_CHARACTERS = GenerationShape(B=1, T=256, L=6, H=6, C=384, V=65)
_GPT2 = GenerationShape(B=1, T=1024, L=12, H=12, C=768, V=50257)


@pytest.mark.shapes(
    cpu=[replace(_CHARACTERS, new=64), replace(_GPT2, new=16)],
    cuda=[replace(shape, new=128, graphed=graphed) for graphed in (False, True) for shape in (_GPT2, _CHARACTERS)],
)
def bench_generate(run_work, setting, shape):
    run_work(generate_work(setting, shape))


@torch.no_grad()
def cached_error_ratio(model: fastgpt.GPT) -> float:
    """Logits of a prompt and then of one token after the other, from the cache, against the whole text at once."""
    weight = model.token_embedding.weight
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(model.cfg.vocab_size, (1, 2 * PROMPT), generator=draw).to(weight.device)
    with fastgpt.use_backend("torch"):
        exact = copy.deepcopy(model).double()(tokens)[0][:, PROMPT - 1 :]
        torchs = model(tokens)[0][:, PROMPT - 1 :]
    cache = model.new_cache(1)
    pieces = tokens[:, :PROMPT], *tokens[:, PROMPT:].split(1, dim=1)
    ours = torch.stack([model.next_logits(piece, cache) for piece in pieces], dim=1)
    errors = (float((logits - exact).abs().max()) for logits in (ours, torchs))
    return error_ratio(*errors, parity.tolerance(weight.dtype, exact))


def generate_work(setting: Setting, shape: GenerationShape) -> Work:
    present, absent = make_models(shape, setting)
    absent.pop("lecture", None)  # it samples as nanoGPT does
    models = {name: model.eval().to(setting.dtype) for name, (model, _) in present.items() if name != "lecture"}
    if shape.graphed:
        models = {OURS: models[OURS], EAGER: models[OURS]}
    n_weights, weights = shape.head_and_blocks, shape.head_and_blocks * setting.dtype.itemsize
    prompt = torch.randint(shape.V, (1, PROMPT), generator=torch.Generator().manual_seed(1)).to(setting.device)
    # For transformers: sample from all tokens, and write exactly as many as the others.
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "use_cache": True, "pad_token_id": 0}
    sampling |= {"attention_mask": torch.ones_like(prompt), "min_new_tokens": shape.new, "max_new_tokens": shape.new}

    def sampler(name: str, model):
        arguments, options = ((), sampling) if name.startswith("transformers") else ((shape.new,), {})
        if shape.graphed and name == OURS and not setting.rehearsal:
            options = {"cuda_graph": True}

        def sample():
            with torch.no_grad(), contextlib.redirect_stderr(None), warnings.catch_warnings():
                # What goes on without a graph is not measured as one.
                warnings.filterwarnings("error", message="fastgpt: generation goes on without a CUDA graph")
                out = model.generate(prompt, *arguments, **options)
            assert out.shape == (1, PROMPT + shape.new), f"{tuple(out.shape)} tokens instead of {PROMPT + shape.new}"

        return sample

    return Work(
        op="generate", shape=str(shape), direction="generate", dtype=setting.dtype_name, absent=absent,
        contenders={name: sampler(name, model) for name, model in models.items()},
        error_ratio=lambda name: cached_error_ratio(models[OURS]) if name == OURS else None,
        demand=Demand(Traffic(read=shape.new * weights, written=0, footprint=weights), flops=2 * shape.new * n_weights),
        tokens=shape.new, warmups=0 if setting.device.type == "cpu" else 1,
    )  # fmt: skip
