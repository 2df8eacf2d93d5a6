"""A training step, forward to optimizer, against the models one would train instead.

Same shape and dropout, the same fused AdamW, the same clipping; float32 on a CPU, bfloat16 autocast on a GPU. A case
that is compiled gives torch.compile to all of them.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

from fastgpt.benchmarks.harness import peers
from fastgpt.benchmarks.harness.suite import OURS, Work, model_error_ratio


@dataclasses.dataclass(frozen=True)
class Case(peers.Shape):
    compiled: bool = False

    def __str__(self) -> str:
        return super().__str__() + (", torch.compile" if self.compiled else "")


_CHARACTERS = Case(B=12, T=64, L=4, H=4, C=128, V=65)
_GPT2 = Case(B=16, T=1024, L=12, H=12, C=768, V=50304)
CASES = {
    "cpu": [
        _CHARACTERS,
        dataclasses.replace(_CHARACTERS, compiled=True),
        Case(B=4, T=256, L=6, H=6, C=384, V=65, dropout=0.2),
        Case(B=2, T=256, L=4, H=8, C=512, V=50304),
    ],
    "cuda": [
        _GPT2,
        Case(B=64, T=256, L=6, H=6, C=384, V=65, dropout=0.2),
        dataclasses.replace(_GPT2, compiled=True),
    ],
}
COMPILED = (OURS, "nanoGPT", "transformers sdpa")  # the others would take minutes more


def bench_train_step(bench, setting, case):
    bench(work(case, setting))


def work(case: Case, setting) -> Work:
    device = setting.device
    present, absent = peers.models(case, device, setting.nanogpt, setting.lecture)
    if case.compiled:
        torch.compiler.reset()
        present = {name: (model, torch.compile(loss)) for name, (model, loss) in present.items() if name in COMPILED}
    draw = torch.Generator(device).manual_seed(1)
    batches = [
        tuple(torch.randint(case.V, (case.B, case.T), generator=draw, device=device) for _ in range(2))
        for _ in range(4)
    ]

    def call(model, loss):
        step, turn = peers.training_step(model, loss, device), itertools.cycle(batches)
        return lambda: step(*next(turn))

    ours = present[OURS][0]
    few = tuple(tokens[:2] for tokens in batches[0])
    weights = ours.num_parameters()
    return Work(
        op="train_step", shape=str(case), direction="step", dtype="float32" if device.type == "cpu" else "bfloat16",
        contenders={name: call(*made) for name, made in present.items()}, absent=absent,
        error_ratio=lambda name: model_error_ratio(ours, *few, case.compiled) if name == OURS else None,
        n_bytes=7 * 4 * weights,  # AdamW: weight, gradient and two moments read; weight and moments written
        flops=case.step_flops, tokens=case.B * case.T, warmups=0 if device.type == "cpu" else 3,
    )  # fmt: skip
