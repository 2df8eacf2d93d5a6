"""Sampling texts. The time cannot be less than that of reading the weights once per token.

FastGPT and transformers keep the keys and values of earlier tokens; nanoGPT computes them again at every step. A shape
that is graphed launches all kernels of a token at once, by a CUDA graph, and is compared with FastGPT without one.

A prompt that fills the context measures texts longer than it: each token computes the whole window. With a stride the
window moves by many tokens at once, which is compared with FastGPT's exact window.

Prompts of unequal lengths are padded on the left, for transformers too, and compared with FastGPT's one at a time.
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
EXACT = "fastgpt exact window"
ALONE = "fastgpt one at a time"


@dataclass(frozen=True)
class GenerationShape(ModelShape):
    new: int = 64
    graphed: bool = False
    prompt: int = PROMPT
    stride: int | None = None
    shorter: int = 0  # each prompt has so many tokens less than the one before it

    def tiny(self) -> Self:
        tiny = replace(super().tiny(), B=min(self.B, 2), new=3)
        shorter = min(self.shorter, 2)
        return replace(tiny, prompt=min(self.prompt, tiny.T), stride=self.stride and tiny.T // 2, shorter=shorter)

    def __str__(self) -> str:
        sequences = f"B{self.B} " if self.B > 1 else ""
        how = ", CUDA graph" if self.graphed else ""
        how += ", exact window" if self.whole_windows else ""
        how += f", stride {self.stride}" if self.stride else ""
        how += ", unequal prompts" if self.shorter else ""
        model = f"{sequences}L{self.L} H{self.H} C{self.C} V{self.V}"
        return f"{model}, prompt {self.prompt}, {self.new} new tokens{how}"

    @property
    def fits(self) -> bool:
        """Whether the text is no longer than the context."""
        return self.prompt + self.new <= self.T

    @property
    def lengths(self) -> list[int]:
        """The tokens of each prompt, the longest first."""
        return [max(1, self.prompt - self.shorter * row) for row in range(self.B)]

    @property
    def whole_windows(self) -> bool:
        return not self.fits and self.stride is None

    @property
    def flops(self) -> float:
        """At least. Of a whole window, the last block's keys and values, and all of the blocks before it."""
        weights, tokens = self.head_and_blocks, self.B * self.new
        if self.whole_windows:
            tokens, weights = tokens * self.T, (12 * (self.L - 1) + 2) * self.C**2
        return 2.0 * tokens * weights


_CHARACTERS = GenerationShape(B=1, T=256, L=6, H=6, C=384, V=65)
_GPT2 = GenerationShape(B=1, T=1024, L=12, H=12, C=768, V=50257)


@pytest.mark.shapes(
    cpu=[
        replace(_CHARACTERS, new=64),
        replace(_GPT2, new=16),
        replace(_CHARACTERS, B=8, new=64),
        replace(_CHARACTERS, B=8, new=64, prompt=25, shorter=3),
        replace(_CHARACTERS, prompt=256, new=8),
        replace(_CHARACTERS, prompt=256, new=64, stride=128),
    ],
    cuda=[replace(shape, new=128, graphed=graphed) for graphed in (False, True) for shape in (_GPT2, _CHARACTERS)],
)
def bench_generate(run_work, setting, shape):
    run_work(generate_work(setting, shape))


@torch.no_grad()
def logits_error_ratio(model: fastgpt.GPT, shape: GenerationShape) -> float:
    """Logits of a prompt and then of one token after the other, from the cache, against the whole text at once.

    Where each token computes its whole window: the logits of one window. Of unequal prompts: of the tokens after them.
    """
    weight = model.token_embedding.weight
    draw = torch.Generator().manual_seed(2)
    first, n = (shape.T, shape.T) if shape.whole_windows else (PROMPT, 2 * PROMPT)
    tokens = torch.randint(model.cfg.vocab_size, (shape.B, n), generator=draw).to(weight.device)
    with fastgpt.use_backend("torch"):
        exact = copy.deepcopy(model).double()(tokens)[0]
        torchs = model(tokens)[0]
    if shape.shorter:
        lengths = torch.tensor([min(length, PROMPT) for length in shape.lengths], device=weight.device)
        ours = _logits_of_rows(model, tokens, lengths)
        at = lengths[:, None] + torch.arange(PROMPT, device=weight.device)  # (B, PROMPT)
        exact, torchs = (logits.gather(1, at[..., None].expand_as(ours)) for logits in (exact, torchs))
    else:
        cache = None if shape.whole_windows else model.new_cache(shape.B)
        pieces = tokens[:, :first], *(tokens[:, i : i + 1] for i in range(first, n))
        ours = torch.stack([model.next_logits(piece, cache) for piece in pieces], dim=1)
        exact, torchs = exact[:, first - 1 :], torchs[:, first - 1 :]
    errors = (float((logits - exact).abs().max()) for logits in (ours, torchs))
    return error_ratio(*errors, parity.tolerance(weight.dtype, exact))


def _logits_of_rows(model: fastgpt.GPT, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(B, PROMPT, V): of the tokens after the first lengths[i] of each row, by a cache of unequal rows."""
    cache = model.new_rows(len(tokens))
    for row, length in enumerate(lengths.tolist()):
        alone = cache.only(row)
        model.next_logits(tokens[row : row + 1, :length], alone)
        cache.keep(row, alone)
    steps = [tokens.gather(1, lengths[:, None] + step) for step in range(PROMPT)]
    rows = range(len(tokens))
    return torch.stack([model.next_logits(new, cache.choose(rows, new.device)) for new in steps], dim=1)


def generate_work(setting: Setting, shape: GenerationShape) -> Work:
    present, absent = make_models(shape, setting)
    absent.pop("lecture", None)  # it samples as nanoGPT does
    models = {name: model.eval().to(setting.dtype) for name, (model, _) in present.items() if name != "lecture"}
    if shape.graphed:
        models = {OURS: models[OURS], EAGER: models[OURS]}
    for name in [name for name in models if not shape.fits and name.startswith("transformers")]:
        absent[f"{name}, {shape}"] = "it has no positions after n_positions"
        del models[name]
    if shape.stride is not None:
        if models.pop("nanoGPT", None) is not None:
            absent[f"nanoGPT, {shape}"] = "it has no stride; its exact window is measured without one"
        models[EXACT] = models[OURS]
    if shape.shorter:
        if models.pop("nanoGPT", None) is not None:
            absent[f"nanoGPT, {shape}"] = "it has no mask for padding"
        models[ALONE] = models[OURS]
    weights = shape.head_and_blocks * setting.dtype.itemsize
    size = (shape.B, shape.prompt)
    prompt = torch.randint(shape.V, size, generator=torch.Generator().manual_seed(1)).to(setting.device)
    mask = torch.ones_like(prompt)
    for row, length in enumerate(shape.lengths):
        mask[row, : shape.prompt - length] = 0
    # For transformers: sample from all tokens, and write exactly as many as the others.
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "use_cache": True, "pad_token_id": 0}
    sampling |= {"attention_mask": mask, "min_new_tokens": shape.new, "max_new_tokens": shape.new}

    def alone(model):
        parts = [row[None, -length:] for row, length in zip(prompt, shape.lengths, strict=True)]
        return torch.cat([prompt, torch.cat([model.generate(p, shape.new)[:, p.shape[1] :] for p in parts])], dim=1)

    def sampler(name: str, model):
        arguments, options = ((), sampling) if name.startswith("transformers") else ((shape.new,), {})
        if shape.graphed and name == OURS and not setting.rehearsal:
            options = {"cuda_graph": True}
        if name == OURS and shape.stride is not None:
            options = {**options, "stride": shape.stride}
        if name == OURS and shape.shorter:
            options = {"attention_mask": mask}

        def sample():
            with torch.no_grad(), contextlib.redirect_stderr(None), warnings.catch_warnings():
                # What goes on without a graph is not measured as one.
                warnings.filterwarnings("error", message="fastgpt: generation goes on without a CUDA graph")
                out = alone(model) if name == ALONE else model.generate(prompt, *arguments, **options)
            n = shape.prompt + shape.new
            assert out.shape == (shape.B, n), f"{tuple(out.shape)} tokens instead of {n} in each of {shape.B} rows"

        return sample

    return Work(
        op="generate", shape=str(shape), direction="generate", dtype=setting.dtype_name, absent=absent,
        contenders={name: sampler(name, model) for name, model in models.items()},
        error_ratio=lambda name: logits_error_ratio(models[OURS], shape) if name == OURS else None,
        demand=Demand(Traffic(read=shape.new * weights, written=0, footprint=weights), flops=shape.flops),
        tokens=shape.B * shape.new, warmups=0 if setting.device.type == "cpu" else 1,
    )  # fmt: skip
