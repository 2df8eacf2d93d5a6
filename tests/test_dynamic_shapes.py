"""Sizes that change from call to call: every op and every model, compiled and exported in one graph for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

from fastgpt import GPT, GPTConfig, ops, use_backend
from fastgpt.baselines import MODELS
from strict_backend import only_on

C, V = 16, 24
# (B, T). At first neither is equal to another size of the call: PyTorch would take the two for equal ever after.
SIZES = ((3, 9), (7, 6), (5, 11), (6, 20))


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def tokens(*shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(sum(shape)))


def heads(B: int, T: int, H: int = 4) -> Tensor:
    return numbers(B, H, T, 8)


WEIGHT, BIAS, HEAD = numbers(C), numbers(C), numbers(V, C)
TABLE, POSITIONS = numbers(V, C), numbers(64, C)

Call = Callable[..., Tensor]
# What is called, and its arguments for a batch of B sequences of T.
CALLS: dict[str, tuple[Call, Callable[[int, int], tuple[Tensor, ...]]]] = {
    "attention": (ops.attention, lambda B, T: (heads(B, T), heads(B, T), heads(B, T))),
    "attention, fewer key heads": (ops.attention, lambda B, T: (heads(B, T), heads(B, T, 2), heads(B, T, 2))),
    "attention, not causal": (lambda q, k, v: ops.attention(q, k, v, is_causal=False), lambda B, T: (heads(B, T),) * 3),
    "attention, more keys": (ops.attention, lambda B, T: (heads(B, T), heads(B, T + 3), heads(B, T + 3))),
    "attention, fewer keys": (ops.attention, lambda B, T: (heads(B, T), heads(B, T - 2), heads(B, T - 2))),
    "attention, scale": (lambda q, k, v: ops.attention(q, k, v, scale=-0.3), lambda B, T: (heads(B, T),) * 3),
    "attention, seeded dropout": (
        lambda q, k, v: ops.attention(q, k, v, dropout_p=0.3, seed=5),
        lambda B, T: (heads(B, T),) * 3,
    ),
    "layer_norm": (lambda x: ops.layer_norm(x, WEIGHT, BIAS), lambda B, T: (numbers(B, T, C),)),
    "add_layer_norm": (
        lambda x, r: ops.add_layer_norm(x, r, WEIGHT, BIAS)[0],
        lambda B, T: (numbers(B, T, C), numbers(B, T, C)),
    ),
    "add_layer_norm, seeded dropout": (
        lambda x, r: ops.add_layer_norm(x, r, WEIGHT, dropout_p=0.4, seed=3)[0],
        lambda B, T: (numbers(B, T, C), numbers(B, T, C)),
    ),
    "activation": (lambda x: ops.activation(x, BIAS), lambda B, T: (numbers(B, T, C),)),
    "embedding": (lambda t: ops.embedding(t, TABLE), lambda B, T: (tokens(B, T),)),
    "embedding, positions": (lambda t: ops.embedding(t, TABLE, POSITIONS), lambda B, T: (tokens(B, T),)),
    "embedding, offset": (
        lambda t: ops.embedding(t, TABLE, POSITIONS, position_offset=t.shape[1]),
        lambda B, T: (tokens(B, T),),
    ),
    "cross_entropy": (ops.cross_entropy, lambda B, T: (numbers(B * T, V), tokens(B * T))),
    "cross_entropy, more dimensions": (
        lambda x, t: ops.cross_entropy(x, t, reduction="none", label_smoothing=0.1),
        lambda B, T: (numbers(B, V, T), tokens(B, T)),
    ),
    "linear_cross_entropy": (
        lambda x, t: ops.linear_cross_entropy(x, HEAD, t),
        lambda B, T: (numbers(B, T, C), tokens(B, T)),
    ),
    "linear_cross_entropy, none": (
        lambda x, t: ops.linear_cross_entropy(x, HEAD, t, bias=HEAD[:, 0], reduction="none", ignore_index=3),
        lambda B, T: (numbers(B, T, C), tokens(B, T)),
    ),
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def n_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def gradients(out: Tensor, arguments: Sequence[Tensor]) -> list[Tensor]:
    leaves = [a for a in (*arguments, WEIGHT, HEAD, TABLE, POSITIONS) if a.requires_grad]
    found = torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True)
    return [g for g in found if g is not None]


# A launch on Triton's interpreter takes milliseconds: one call of each kind.
ON_TRITON = ("attention, fewer key heads", "layer_norm", "add_layer_norm, seeded dropout")


@pytest.mark.parametrize(
    "name, backend",
    [(name, backend) for name in CALLS for backend in ("auto", "torch")] + [(name, "triton") for name in ON_TRITON],
)
def test_compiled_op(name: str, backend: str) -> None:
    """One graph for every size, with the values and gradients of the eager call."""
    call, arguments = CALLS[name]
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    with only_on(backend) if backend == "triton" else use_backend(backend):
        for B, T in SIZES[:2] if backend == "triton" else SIZES:
            given = arguments(B, T)
            ours, eager = compiled(*given), call(*given)
            torch.testing.assert_close(ours, eager)
            for a, b in zip(gradients(ours, given), gradients(eager, given), strict=True):
                torch.testing.assert_close(a, b)
    assert n_graphs() == 1


class Module(torch.nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.call(*arguments)


@pytest.mark.parametrize("name", CALLS)
def test_exported_op(name: str) -> None:
    """Exported once with sizes that are not fixed, right for others."""
    call, arguments = CALLS[name]
    at_export = arguments(6, 11)
    follow_b_and_t = {6, 9, 11, 14, 66}  # B, Tk, T, Tk, B * T
    auto = torch.export.Dim.AUTO
    free = tuple({d: auto for d, size in enumerate(a.shape) if size in follow_b_and_t} for a in at_export)
    with torch.no_grad():
        program = torch.export.export(Module(call), at_export, dynamic_shapes=(free,))
        for B, T in SIZES:
            given = arguments(B, T)
            torch.testing.assert_close(program.module()(*given), call(*given))


CONFIG = GPTConfig(vocab_size=V, block_size=32, n_layer=1, n_head=2, n_embd=C, dropout=0.0)


@pytest.mark.parametrize("options", [{}, {"norm": "post"}], ids=str)
@pytest.mark.parametrize("entrance", ["loss", "forward"])
def test_compiled_model(entrance: str, options: dict) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**vars(CONFIG), **options}))
    compiled = torch.compile(getattr(model, entrance), fullgraph=True, dynamic=True, backend="aot_eager")
    for B, T in SIZES:
        idx, targets = tokens(B, T), tokens(T, B).t()
        ours = compiled(idx, targets)
        ours = ours if entrance == "loss" else ours[1]
        eager = model.loss(idx, targets)
        torch.testing.assert_close(ours, eager)
        found, expected = (torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, eager))
        torch.testing.assert_close(found, expected)
    assert n_graphs() == 1


def test_lengths_as_they_come() -> None:
    """Without being told, PyTorch compiles for the first length, and once more for all lengths at the second."""
    model = GPT(CONFIG)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    for T in (8, 5, 32, 17, 9):
        compiled(tokens(2, T), tokens(2, T)).backward()
    assert n_graphs() == 2


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("entrance", ["loss", "forward"])
def test_exported_model(kind: str, entrance: str) -> None:
    if kind in ("rnn", "gru", "lstm"):
        pytest.skip("torch.export takes PyTorch's recurrent layers at one length only")
    torch.manual_seed(0)
    model = MODELS[kind](CONFIG).eval()
    call = model.loss if entrance == "loss" else (lambda idx, targets: model(idx)[0])

    class Exported(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
            return call(idx, targets)

    sizes = {0: torch.export.Dim("B", min=1, max=64), 1: torch.export.Dim("T", min=2, max=32)}
    program = torch.export.export(Exported(), (tokens(2, 8), tokens(2, 8)), dynamic_shapes=(sizes, sizes))
    for B, T in (*SIZES, (1, 2), (4, 32)):
        torch.testing.assert_close(program.module()(tokens(B, T), tokens(B, T)), call(tokens(B, T), tokens(B, T)))
