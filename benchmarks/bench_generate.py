"""Sampling a text, one sequence at a time: what it takes to read the weights once a token is the floor.

FastGPT and transformers keep the keys and values of earlier tokens; nanoGPT computes them again at every step.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import torch

import fastgpt
from fastgpt import parity
from fastgpt.benchmarks.harness import peers
from fastgpt.benchmarks.harness.suite import OURS, Work, error_ratio

PROMPT = 16


@dataclasses.dataclass(frozen=True)
class Case(peers.Shape):
    new: int = 64

    def __str__(self) -> str:
        return f"L{self.L} H{self.H} C{self.C} V{self.V}, prompt {PROMPT}, {self.new} new tokens"


CASES = {
    "cpu": [
        Case(B=1, T=256, L=6, H=6, C=384, V=65, new=64),
        Case(B=1, T=1024, L=12, H=12, C=768, V=50257, new=16),
    ],
    "cuda": [
        Case(B=1, T=1024, L=12, H=12, C=768, V=50257, new=128),
        Case(B=1, T=256, L=6, H=6, C=384, V=65, new=128),
    ],
}


@torch.no_grad()
def cached_error_ratio(model: fastgpt.GPT) -> float:
    """Logits of a prompt and then of one token after the other, from the cache, against the whole text at once."""
    weight = model.token_embedding.weight
    tokens = torch.randint(
        model.cfg.vocab_size, (1, 2 * PROMPT), generator=torch.Generator().manual_seed(2)
    ).to(weight.device)  # fmt: skip
    with fastgpt.use_backend("torch"):
        exact = copy.deepcopy(model).double()(tokens)[0]
        torchs = model(tokens)[0]
    cache = model.new_cache(1)
    pieces = [model.hidden(piece, cache) for piece in (tokens[:, :PROMPT], *tokens[:, PROMPT:].split(1, dim=1))]
    ours = model.lm_head(torch.cat(pieces, dim=1))
    errors = (float((logits - exact).abs().max()) for logits in (ours, torchs))
    return error_ratio(*errors, parity.tolerance(weight.dtype, exact))


def bench_generate(bench, setting, case):
    bench(work(case, setting))


def work(case: Case, setting) -> Work:
    device, dtype = setting.device, setting.dtype
    present, absent = peers.models(case, device, setting.nanogpt, setting.lecture)
    models = {name: model.eval().to(dtype) for name, (model, _) in present.items() if name != "lecture"}
    absent.pop("lecture", None)  # it would be nanoGPT's way once more
    prompt = torch.randint(case.V, (1, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)

    def call(name: str, model):
        if not name.startswith("transformers"):
            return lambda: model.generate(prompt, case.new)
        sampling = {
            "do_sample": True,
            "top_k": 0,
            "top_p": 1.0,
            "temperature": 1.0,
            "use_cache": True,
            "pad_token_id": 0,
        }
        mask = torch.ones_like(prompt)
        lengths = {"max_new_tokens": case.new, "min_new_tokens": case.new}
        return lambda: model.generate(prompt, attention_mask=mask, **lengths, **sampling)

    def quiet(generate):
        def run():
            with torch.no_grad(), contextlib.redirect_stderr(None):
                out = generate()
            assert out.shape == (1, PROMPT + case.new), f"{tuple(out.shape)} tokens instead of {PROMPT + case.new}"

        return run

    return Work(
        op="generate", shape=str(case), direction="generate", dtype=str(dtype).removeprefix("torch."),
        contenders={name: quiet(call(name, model)) for name, model in models.items()}, absent=absent,
        error_ratio=lambda name: cached_error_ratio(models[OURS]) if name == OURS else None,
        n_bytes=case.new * case.head_and_blocks * dtype.itemsize, flops=2 * case.new * case.head_and_blocks,
        tokens=case.new, warmups=0 if device.type == "cpu" else 1,
    )  # fmt: skip
