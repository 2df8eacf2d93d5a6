"""The Triton kernels that a training step and generation launch, recorded from the model itself and compiled offline.

    python tests/shared/trained_launches.py 0/1        # a JSON row for each kernel

The model runs on the CPU, but as on CUDA: Triton serves the ops, and autocast is on in training. A launch compiles the
kernel instead of running it, in the variant that Triton makes for these arguments: for their types, strides that are
multiples of 16, and counts of 1. Matrix products are left out, so that sizes can be those of real runs.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace

os.environ["FASTGPT_SELF_TEST"] = "0"  # nothing that a launch would compute is there to be compared

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import GPT, GPTConfig
from fastgpt.ops import backend
from fastgpt.triton_kernels import offline, target, tuned

MULTIPROCESSORS = 132  # of an H100


@dataclass(frozen=True)
class Run:
    """A training step of `batch_size` sequences, or with `new_tokens`, their continuation with a cache."""

    cfg: GPTConfig
    batch_size: int
    dtype: torch.dtype = torch.float32
    new_tokens: int = 0
    tf32: bool = False  # training without autocast, where matrix products may be TF32


def _small(preset: str, **changes: float) -> GPTConfig:
    """One layer has every kind of launch that twelve have, and the vocabulary has no part in them."""
    return replace(GPTConfig.preset(preset), n_layer=1, vocab_size=64, **changes)


RUNS = {
    "gpt2.train": Run(_small("gpt2", dropout=0.0), 16),
    "gpt2.train.dropout": Run(_small("gpt2", dropout=0.1), 16),
    "shakespeare_char.train": Run(_small("shakespeare-char"), 64),
    "gpt2.train.tf32": Run(_small("gpt2", dropout=0.0), 16, tf32=True),
    "unaligned.train": Run(_small("gpt2", dropout=0.1, n_embd=100, n_head=4, block_size=130), 3),
    "gpt2.generate": Run(_small("gpt2"), 1, new_tokens=2),
    "gpt2.generate.bfloat16": Run(_small("gpt2"), 1, torch.bfloat16, new_tokens=2),
}
# sm_80 and sm_100 take other configurations; that they compile is shown by the step that most people train.
RECORDED = [(90, name) for name in RUNS] + [(80, "gpt2.train"), (100, "gpt2.train")]


class _WithoutProducts(TorchDispatchMode):
    """Matrix products give tensors without values, at no cost."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            return a.new_empty(a.shape[0], b.shape[1])
        return func(*args, **(kwargs or {}))


def _launch(run: Run) -> None:
    """Everything that `run` launches, on a model with any values."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if run.tf32 else "ieee"
    model = GPT(run.cfg).to(run.dtype)
    tokens = torch.zeros(run.batch_size, run.cfg.block_size, dtype=torch.int64)
    if run.new_tokens:
        model.eval()
        with torch.no_grad():
            cache = model.new_cache(run.batch_size)
            model.next_logits(tokens[:, : -run.new_tokens], cache)
            model.next_logits(tokens[:, :1], cache)
        return
    with torch.autocast("cpu", torch.bfloat16, enabled=not run.tf32):
        loss = model.loss(tokens, tokens)
    loss.backward()


def record(arch: int, name: str) -> list[dict]:
    """A row for each kernel of the run, in the order in which they are launched first."""
    for op in ("attention", "layer_norm", "add_layer_norm"):
        backend.PREFERENCE[op]["cpu"] = ("triton",)
    backend._availability["triton", "cpu"] = None
    backend._availability["native", "cpu"] = "on CUDA a token of generation does not take the CPU's op"
    compiled = target.compile_launches(arch, MULTIPROCESSORS)
    with _WithoutProducts(), tuned.use(tuned.Table()):  # entries of a table are compiled by test_tuned_offline.py
        _launch(RUNS[name])
    rows = []
    count: Counter[str] = Counter()
    for kernel, code in {code.hash: (kernel, code) for kernel, code in compiled}.values():
        module = code.src.fn.__module__.rpartition(".")[2]
        label = f"{name}.{module}.{kernel.removesuffix('_kernel')}"
        count[label] += 1
        rows.append({"arch": arch, "name": f"{label}.{count[label]}", **offline.machine_code(code, arch)})
    return rows


def main() -> None:
    first, step = map(int, sys.argv[1].split("/"))
    for arch, name in RECORDED[first::step]:
        for row in record(arch, name):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
