"""The calls that checks.py compares with the formulas, by the device that is emulated for them: DEVICES."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass
class Case:
    name: str
    run: Callable[[], list[Tensor]]  # by the kernels
    exact: Callable[[], list[Tensor]]  # in float64
    slack: list[Tensor | float] | float = 2e-7  # what is allowed beyond the rounding to the result's dtype, absolutely


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows(C: int, dtype: torch.dtype, offset: int | None, n: int) -> tuple[Tensor, Tensor]:
    """Logits (n, C), `offset` values after the start of longer rows, or packed; and targets, one of them ignored."""
    logits = 3.0 * draw(n, C, seed=C)
    targets = torch.randint(C, (n,), generator=torch.Generator().manual_seed(C))
    targets[0], targets[-1] = 0, C - 1
    if n > 2:
        targets[1] = -100
        logits[1] = math.nan  # an ignored row counts for nothing
    if offset is None:
        return logits.to(dtype), targets
    wide = torch.full((n, C + 11), math.nan, dtype=dtype)
    wide[:, offset : offset + C] = logits
    return wide[:, offset : offset + C], targets


def token_weights(n: int, reduction: str) -> Tensor:
    """One for each target. In a sum some are negative, as in reinforcement learning."""
    weights = 0.5 + draw(n, seed=n).abs()
    return weights if reduction == "mean" else weights * torch.tensor([1.0, -1.0]).repeat(n)[:n]


def cross_entropy(
    C: int,
    dtype=F32,
    *,
    offset=None,
    n=3,
    weighted=False,
    smoothing=0.0,
    reduction="mean",
    z_loss=0.0,
    softcap=None,
    tokens_weighted=0.0,
    accuracy=False,
    passes=1,
    change=None,
) -> Case:
    """The loss, the accuracy where asked for, and the gradient of each backward pass: the second one through a kept
    graph computes it anew. `tokens_weighted` multiplies the tokens' weights; 0 is for none."""
    from fastgpt.ops import cross_entropy, reference

    logits, targets = rows(C, dtype, offset, n)
    if change is not None:
        change(logits, targets)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    more_options = {"z_loss": z_loss, "softcap": softcap, "return_accuracy": accuracy}
    options |= {name: value for name, value in more_options.items() if value}
    traits = [f"{name} {value}" for name, value in options.items()] + [f"offset {offset}", "weighted" * weighted]
    if tokens_weighted:
        options["token_weight"] = tokens_weighted * token_weights(n, reduction)
        traits.append(f"tokens weighted by {tokens_weighted}")
    weight = draw(C, seed=1).abs().to(dtype) if weighted else None
    upstream = torch.linspace(0.5, 1.5, n) if reduction == "none" else torch.tensor(1.0)

    def outcome(op, x: Tensor, weight: Tensor | None) -> list[Tensor]:
        x = x.detach().requires_grad_(passes > 0)
        result = op(x, targets, weight=weight, **options)
        loss, *more = result if accuracy else (result,)
        scaled = upstream.to(loss.dtype)
        return [loss, *more, *(torch.autograd.grad(loss, x, scaled, retain_graph=True)[0] for _ in range(passes))]

    return Case(
        f"cross_entropy {n} x {C} {dtype} {' '.join(traits)}, {passes} backward",
        lambda: outcome(cross_entropy, logits, weight),
        lambda: outcome(reference.cross_entropy, logits.double(), None if weight is None else weight.double()),
        slack=1e-6 if C > 10000 else 2e-7,
    )


def chunk(C: int, dtype=F32, smoothing=0.0, z_loss=0.0, softcap=0.0, with_grad=True, with_correct=False) -> Case:
    """linear_cross_entropy's op: the losses of a chunk of logits, which their gradient overwrites."""
    from fastgpt.ops import reference

    logits, targets = rows(C, dtype, None, 3)
    scale = torch.tensor([0.5, 1.0, 2.0])
    options = smoothing, z_loss, softcap, with_grad, with_correct

    def run() -> list[Tensor]:
        overwritten = logits.clone()
        losses, correct = torch.ops.fastgpt.cross_entropy_chunk_(overwritten, targets, scale, -100, *options)
        return [losses, correct, overwritten]

    def exact() -> list[Tensor]:
        x = logits.double().requires_grad_()
        named = {"label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap or None, "return_accuracy": True}
        losses, correct = reference.cross_entropy(x, targets, reduction="none", **named)
        gradient = torch.autograd.grad(losses, x, scale.double())[0] if with_grad else x
        return [losses, correct if with_correct else correct[:0], gradient]

    return Case(f"cross_entropy_chunk_ {C} {dtype} {options}", run, exact)


def linear(op_name: str, V: int, **options: object) -> Case:
    """linear_cross_entropy with the accuracy, or linear_log_probs, whose targets are all counted."""
    from fastgpt import ops
    from fastgpt.ops import reference

    x, weight = draw(5, 8), draw(V, 8, seed=1)
    targets = torch.tensor([0, V - 1, -100 if op_name == "linear_cross_entropy" else 2, V // 2, 1])
    targets[3] = (x[3] @ weight.t()).argmax()

    def outcome(op, *inputs: Tensor) -> list[Tensor]:
        inputs = [value.detach().requires_grad_() for value in inputs]
        result = op(*inputs, targets, **options)
        loss, *accuracy = result if isinstance(result, tuple) else (result,)
        return [loss, *accuracy, *torch.autograd.grad(loss.sum(), inputs)]

    return Case(
        f"{op_name} {V} {options}",
        lambda: outcome(getattr(ops, op_name), x, weight),
        lambda: outcome(getattr(reference, op_name), x.double(), weight.double()),
        slack=5e-6,
    )


def embedding(V: int, C: int, B: int, T: int, dtype=F32, *, frequent=0.0, P=0, position=0, offset=0) -> Case:
    """The sum of two tables' rows and both gradients. `frequent` is the share of one token; the tables begin `offset`
    values after a multiple of 16 bytes."""
    from fastgpt.ops import embedding, reference

    random = torch.Generator().manual_seed(V * C + B)
    tokens = torch.randint(V, (B, T), generator=random)
    tokens[torch.rand(B, T, generator=random) < frequent] = V // 2
    flat = draw((V + P) * C + offset, seed=C, dtype=dtype)[offset:]
    tables = [flat[: V * C].view(V, C)] + ([flat[V * C :].view(P, C)] if P else [])
    upstream = draw(B, T, C, seed=B, dtype=dtype)

    def outcome(op, tables: list[Tensor], upstream: Tensor) -> list[Tensor]:
        tables = [table.detach().requires_grad_() for table in tables]
        out = op(tokens, *tables, position_offset=position if P else 0)
        return [out, *torch.autograd.grad(out, tables, upstream)]

    exact = [table.double() for table in tables]
    sums = outcome(reference.embedding, exact, upstream.double().abs())  # of the absolute values that are added
    return Case(
        f"embedding V {V} C {C} B {B} T {T} {dtype} frequent {frequent} P {P}+{position} offset {offset}",
        lambda: outcome(embedding, tables, upstream),
        lambda: outcome(reference.embedding, exact, upstream.double()),
        slack=[2e-7, *(1e-6 * value for value in sums[1:])],
    )


def sum_sorted(C: int, dtype: torch.dtype, keys: torch.dtype, chunk: int) -> Case:
    """The op that sums rows of equal tokens: with any chunk, and with keys of 64 bits, which huge vocabularies need."""
    V, n = 5, 300
    tokens = torch.randint(V, (n,), generator=torch.Generator().manual_seed(C)) * 2 % V
    keys_in_order, order = torch.sort(tokens.to(keys), stable=True)
    grad = draw(n, C, seed=C, dtype=dtype)

    def exact(grad: Tensor) -> Tensor:
        return torch.zeros(V, C, dtype=torch.float64).index_add_(0, tokens, grad.double())

    return Case(
        f"embedding_sum_sorted {n} x {C} {dtype} {keys} in chunks of {chunk}",
        lambda: [torch.ops.fastgpt.embedding_sum_sorted(grad, keys_in_order, order, V, chunk)],
        lambda: [exact(grad)],
        slack=[1e-6 * exact(grad.abs())],
    )


def scale_gradient(n: int, dtype: torch.dtype, factor: float, offset: int) -> Case:
    """The gradient times a factor; zeros stay zeros. `offset`: values after a multiple of 16 bytes."""
    values = draw(n + offset, seed=n, dtype=dtype)
    values[offset] = 0.0

    def run() -> list[Tensor]:
        whole = values.clone()
        torch.ops.fastgpt.scale_gradient_(whole[offset:], torch.tensor(factor))
        return [whole]

    def exact() -> list[Tensor]:
        whole = values.double()
        part = whole[offset:]
        part.copy_(torch.where(part == 0, part, (part * factor).to(dtype).double()))
        return [whole]

    return Case(f"scale_gradient_ {n} {dtype} times {factor} offset {offset}", run, exact, slack=0.0)


def make_infinite(logits: Tensor, targets: Tensor) -> None:
    """Single values and a whole row of -inf, +inf, NaN, and the largest numbers."""
    logits[0, 1:3] = -math.inf
    logits[2] = -math.inf
    logits[3, 5] = math.inf
    logits[4, 6] = math.nan
    logits[5, 7], logits[5, 8] = torch.finfo(logits.dtype).max, torch.finfo(logits.dtype).min


def make_ties(logits: Tensor, targets: Tensor) -> None:
    """Rows of which an argmax takes the target, or one that is equal to it, hardly above it, or no number."""
    logits[1:] = 0.5 * logits[1:].nan_to_num()
    targets[:] = torch.tensor([0, 5, 5, 5, 5, 0, 5, 5])
    logits[:5, 5] = 9.0
    logits[0] = 9.0  # all are equal, and the target is the first
    logits[1, 4] = 9.0  # an equal one comes before the target
    logits[2, -1] = 9.0  # one comes after it
    logits[3, 7] = 9.0625  # a larger one, which a softcap of 0.5 makes equal
    logits[5] = -math.inf
    logits[6, 5], logits[6, 6] = math.inf, math.nan
    logits[7, 5] = math.nan


def make_nan(logits: Tensor, targets: Tensor) -> None:
    logits[0] = math.nan


def saturate(logits: Tensor, targets: Tensor) -> None:
    """Logits up to nine times a softcap of 2, where the slope of tanh is 6e-8."""
    logits[:] = torch.linspace(-18.0, 18.0, logits.shape[1])


# Rows of 3 KB of shared memory take every path at lengths that cost little: up to 128 values of float32 are kept in
# registers, up to about 512 by one block, up to about 4000 by a cluster.
SMALL, H100 = 3072, 232448
REGISTERS, BLOCK, CLUSTER, NOWHERE = (1, 65, 127, 128), (129, 257, 500), (1000, 1601, 4099), (9001,)


def small_device() -> Iterator[Case]:
    for C in (*REGISTERS, *BLOCK, *CLUSTER, *NOWHERE):
        for dtype in (F32, BF16, F16):
            yield cross_entropy(C, dtype, smoothing=0.1, weighted=True, offset=1)
            yield cross_entropy(C, dtype, reduction="sum", passes=2)
        yield cross_entropy(C, smoothing=0.1, weighted=True, reduction="none", passes=1)
        yield cross_entropy(C, BF16, offset=8, reduction="none", passes=1)
        yield cross_entropy(C, smoothing=0.1, passes=0)
        yield cross_entropy(C, BF16, offset=3, passes=0)
        yield chunk(C, smoothing=0.1)
        yield chunk(C, F16)
    yield cross_entropy(65, n=300)  # two blocks of row_weights_kernel
    for C in (100, 300, 1000):
        yield cross_entropy(C, n=7, change=make_infinite, reduction="none")
        yield cross_entropy(C, BF16, n=7, change=make_infinite, reduction="sum", offset=1)
    yield from loss_options()
    yield chunk(1000, with_grad=False)
    yield linear("linear_cross_entropy", 300, reduction="mean", label_smoothing=0.1)
    yield linear("linear_cross_entropy", 1000, reduction="none", label_smoothing=0.1)
    yield from embeddings()
    for dtype in (F32, BF16, F16):
        for n, factor, offset in (
            (1, 0.5, 0),
            (7, 0.5, 3),
            (5000, 0.5, 0),
            (5001, 3.0, 1),
            (64, math.inf, 0),
            (64, 1.0, 5),
        ):
            yield scale_gradient(n, dtype, factor, offset)


EVERY_OPTION = {"z_loss": 1e-2, "softcap": 4.0, "tokens_weighted": 1.0, "accuracy": True}


def loss_options() -> Iterator[Case]:
    """Options of the loss, one at a time and together, for rows that are kept in each place."""
    every = {"smoothing": 0.1, "weighted": True, **EVERY_OPTION}
    for C in (65, 127, 257, 1601, 9001):
        for dtype in (F32, BF16, F16):
            yield cross_entropy(C, dtype, offset=1, **every)
        yield cross_entropy(C, BF16, reduction="sum", softcap=4.0, z_loss=1e-2, passes=2)
        yield cross_entropy(C, reduction="none", tokens_weighted=1.0, softcap=30.0)
        yield cross_entropy(C, F16, offset=3, reduction="sum", **EVERY_OPTION, passes=0)
        yield cross_entropy(C, z_loss=1e-2, weighted=True)
        yield cross_entropy(C, tokens_weighted=1.0, weighted=True)
        yield cross_entropy(C, softcap=2.0, tokens_weighted=1e6, reduction="sum", change=saturate)
        yield cross_entropy(C, n=8, accuracy=True, reduction="none", passes=0, change=make_ties)
        yield cross_entropy(C, BF16, n=8, offset=1, accuracy=True, softcap=0.5, reduction="none", change=make_ties)
        yield cross_entropy(C, n=7, reduction="none", **EVERY_OPTION, change=make_infinite)
        yield chunk(C, smoothing=0.1, z_loss=1e-2, softcap=4.0, with_correct=True)
        yield chunk(C, BF16, with_grad=False, with_correct=True)
    every = {"z_loss": 1e-2, "softcap": 2.0, "token_weight": torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0])}
    for reduction in ("mean", "none"):
        yield linear("linear_cross_entropy", 300, reduction=reduction, return_accuracy=True, **every)
    yield linear("linear_log_probs", 300)
    yield linear("linear_log_probs", 1000, softcap=2.0)
    yield cross_entropy(1, accuracy=True, reduction="none", change=make_nan)  # one class, and that is no number
    yield cross_entropy(300, softcap=1e30)  # the largest one and the least
    yield cross_entropy(300, softcap=1e-30)


def embeddings() -> Iterator[Case]:
    for dtype in (F32, BF16, F16):
        yield embedding(1, 1, 1, 1, dtype)
        yield embedding(7, 33, 3, 100, dtype, P=128, position=5)
        yield embedding(7, 34, 3, 100, dtype, P=128, position=5)
        yield embedding(50, 8, 5, 129, dtype, frequent=0.5, P=200, position=71)
        yield embedding(2, 24, 5, 200, dtype, frequent=0.9, P=200)
        yield embedding(1, 16, 4, 64, dtype, offset=1)
        yield embedding(5, 520, 3, 128, dtype, frequent=0.97, P=128, offset=8)
        for C in (33, 34, 64):
            yield sum_sorted(C, dtype, torch.int64, chunk=16)
            yield sum_sorted(C, dtype, torch.int32, chunk=128)
    yield embedding(300, 1100, 1, 70, BF16, frequent=0.2, P=70)
    yield embedding(3, 768, 2, 64, P=64)


def h100() -> Iterator[Case]:
    """The lengths of rows that models have, and one too long for a cluster: two rows of each, of which both count."""
    for C, dtype in ((65, F32), (1000, BF16), (50257, F32), (50304, BF16), (128256, F32), (500000, F32)):
        yield cross_entropy(C, dtype, n=2)
        yield cross_entropy(C, dtype, n=1, passes=0)


def without_clusters() -> Iterator[Case]:
    for C, dtype in ((50304, F32), (128256, F32)):
        yield cross_entropy(C, dtype, n=2)
    yield cross_entropy(128256, n=1, softcap=30.0, accuracy=True)


def few() -> Iterator[Case]:
    """What a fault put into the kernels on purpose has to be seen by."""
    yield cross_entropy(300)
    yield cross_entropy(1000)
    yield embedding(50, 8, 5, 129, frequent=0.5)


def with_plans() -> Iterator[Case]:
    """Every number of threads and of blocks that a plan may name, for rows that fill three groups of copies or less."""
    for threads, choices in {128: (0, 1), 256: (0, 1, 2, 4, 8), 512: (0, 1, 2, 4, 8)}.items():
        for blocks in choices:
            for dtype in (F32, BF16, F16):
                yield planned(cross_entropy(9001, dtype, n=1, smoothing=0.1), threads, blocks)
            yield planned(cross_entropy(1601, offset=1, smoothing=0.1, weighted=True), threads, blocks)
            yield planned(cross_entropy(1601, BF16, offset=3, reduction="none"), threads, blocks)
            yield planned(cross_entropy(1601, **EVERY_OPTION), threads, blocks)
            yield planned(cross_entropy(1601, BF16, smoothing=0.1, offset=3, **EVERY_OPTION), threads, blocks)


def planned(case: Case, threads: int, blocks: int) -> Case:
    """The case with a plan for its calls; a loss alone and a gradient alone take one pass, which keeps no row."""
    from fastgpt.ops.cross_entropy import set_cuda_plans

    of_calls = itertools.product((2, 4), (1, 2), (2000, 10000))  # element sizes, passes, classes: a plan is for a range
    plans = [(size, passes, most, threads, blocks if passes == 2 else 0) for size, passes, most in of_calls]

    def run() -> list[Tensor]:
        set_cuda_plans("cpu", plans)
        try:
            return case.run()
        finally:
            set_cuda_plans("cpu", [])

    return replace(case, name=f"{case.name}, {threads} threads, {blocks} blocks", run=run)


DEVICES = {
    "few cases": (SMALL, True, few),
    "small device": (SMALL, True, small_device),
    "H100": (H100, True, h100),
    "H100 without clusters": (H100, False, without_clusters),
    "H100 with plans": (H100, True, with_plans),
}
