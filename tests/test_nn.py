"""fastgpt.nn: torch.nn's layers and losses on the ops, with the same results, errors and keys."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

import fastgpt
from fastgpt import ops
from fastgpt.ops.accuracy import max_error, tolerance
from helpers import integers, random

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
TOKENS = integers(11, 3, 5)
LOGITS, TARGETS = random(7, 11), integers(11, 7)
CALLED = {"LayerNorm": "layer_norm", "Embedding": "embedding", "CrossEntropyLoss": "cross_entropy"}


def both(name: str, *args, **kwargs) -> tuple[nn.Module, nn.Module]:
    """FastGPT's module and PyTorch's, with the same parameters."""
    ours, theirs = getattr(fastgpt.nn, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)
    for i, parameter in enumerate(theirs.parameters()):
        parameter.data = random(*parameter.shape, seed=i + 1, dtype=parameter.dtype)
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    return ours, theirs


def results(module: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The result, and the gradients of the first input and the parameters."""
    inputs = tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs)
    module.zero_grad(set_to_none=True)
    out = module(*inputs)
    out.backward(random(*out.shape, seed=9, dtype=out.dtype))
    grads = [x.grad for x in (*inputs, *module.parameters()) if x.requires_grad]
    return [out.detach(), *(g.to_dense() if g.is_sparse else g for g in grads)]


def assert_same(ours: nn.Module, theirs: nn.Module, *inputs: torch.Tensor) -> None:
    got, want = results(ours, *inputs), results(theirs, *inputs)
    exact = results(copy.deepcopy(theirs).double(), *(x.double() if x.is_floating_point() else x for x in inputs))
    for value, expected, oracle in zip(got, want, exact, strict=True):
        assert value.dtype == expected.dtype
        allowed = 2 * max_error(expected, oracle) + tolerance(value.dtype, oracle)
        assert max_error(value, oracle) <= allowed


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the ops that are called, in order."""
    called: list[str] = []

    def watched(name, op):
        def call(*args, **kwargs):
            called.append(name)
            return op(*args, **kwargs)

        return call

    for name in (*CALLED.values(), "linear_cross_entropy"):
        monkeypatch.setattr(ops, name, watched(name, getattr(ops, name)))
    return called


@pytest.mark.filterwarnings("ignore:fastgpt")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name, args, kwargs, inputs",
    [
        ("LayerNorm", (16,), {}, (random(3, 5, 16),)),
        ("LayerNorm", (16,), {"bias": False, "eps": 1e-3}, (random(16),)),
        ("Embedding", (11, 16), {}, (TOKENS,)),
        ("Embedding", (11, 16), {}, (TOKENS[0, 0],)),
        ("Embedding", (11, 16), {}, (integers(11, 2, 3, 4).int(),)),
        ("CrossEntropyLoss", (), {}, (LOGITS, TARGETS)),
        ("CrossEntropyLoss", (), {"ignore_index": 3, "reduction": "none"}, (random(2, 11, 4), integers(11, 2, 4))),
        ("CrossEntropyLoss", (), {"label_smoothing": 0.1, "reduction": "sum"}, (LOGITS[0], TARGETS[0])),
    ],
)
def test_the_op_computes_what_the_module_does(calls, dtype, name, args, kwargs, inputs):
    ours, theirs = both(name, *args, **kwargs)
    assert_same(ours.to(dtype), theirs.to(dtype), *(x.to(dtype) if x.is_floating_point() else x for x in inputs))
    assert calls == [CALLED[name]]


@pytest.mark.parametrize(
    "name, args, kwargs, inputs",
    [
        ("LayerNorm", ((5, 16),), {}, (random(3, 5, 16),)),
        ("LayerNorm", (16,), {"elementwise_affine": False}, (random(3, 16),)),
        ("Embedding", (11, 16), {"padding_idx": 2}, (TOKENS,)),
        ("Embedding", (11, 16), {"max_norm": 0.5}, (TOKENS,)),
        ("Embedding", (11, 16), {"scale_grad_by_freq": True}, (TOKENS,)),
        ("Embedding", (11, 16), {"sparse": True}, (TOKENS,)),
        ("CrossEntropyLoss", (), {}, (LOGITS, random(7, 11, seed=2).softmax(1))),
    ],
)
def test_what_an_op_does_not_have_is_pytorchs(calls, name, args, kwargs, inputs):
    assert_same(*both(name, *args, **kwargs), *inputs)
    assert calls == []


def test_class_weights(calls):
    weight = random(11, seed=3).abs()
    assert_same(*both("CrossEntropyLoss", weight=weight), LOGITS, TARGETS)
    assert calls == ["cross_entropy"]


@pytest.mark.parametrize("name", CALLED)
def test_constructors_take_the_same_arguments(name):
    ours, theirs = (list(inspect.signature(getattr(n, name)).parameters.values()) for n in (fastgpt.nn, nn))
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    assert issubclass(getattr(fastgpt.nn, name), getattr(nn, name))


@pytest.mark.parametrize(
    "name, inputs",
    [
        ("LayerNorm", (random(3, 15),)),
        ("Embedding", (random(3),)),
        ("CrossEntropyLoss", (LOGITS, TARGETS[:-1])),
        ("CrossEntropyLoss", (LOGITS, "x")),
    ],
)
def test_wrong_input_raises_what_pytorch_raises(name, inputs):
    sizes = {"LayerNorm": (16,), "Embedding": (11, 16), "CrossEntropyLoss": ()}[name]
    ours, theirs = both(name, *sizes)
    with pytest.raises((ValueError, RuntimeError, TypeError)) as want:
        theirs(*inputs)
    with pytest.raises(want.type):
        ours(*inputs)


def test_forward_mode_derivatives_are_pytorchs():
    ours, theirs = both("LayerNorm", 16)
    x, tangent = random(3, 16), random(3, 16, seed=4)
    got, want = (torch.func.jvp(module, (x,), (tangent,))[1] for module in (ours, theirs))
    torch.testing.assert_close(got, want)


def test_autocast_gives_pytorchs_dtype():
    ours, theirs = both("LayerNorm", 16)
    with torch.autocast("cpu"):
        for dtype in (torch.float32, torch.bfloat16):
            assert ours(random(3, 16, dtype=dtype)).dtype == theirs(random(3, 16, dtype=dtype)).dtype


# --- the head and its loss --------------------------------------------------------------------------------------------

HIDDEN = random(7, 6)


class Written(nn.Module):
    """The head and its loss as two of PyTorch's modules, under the names that the one module has."""

    def __init__(self, num_classes: int = 11, out_features: tuple[int, ...] = (), bias: bool = False, **options):
        super().__init__()
        self.shape = (num_classes, *out_features)
        self.linear = nn.Linear(6, torch.Size(self.shape).numel(), bias=bias)
        self.loss = nn.CrossEntropyLoss(**options)

    def forward(self, x, target):
        return self.loss(self.linear(x).unflatten(-1, self.shape), target)


@pytest.mark.parametrize(
    "inputs, options, op",
    [
        ((HIDDEN, TARGETS), {"bias": True}, "linear_cross_entropy"),
        ((HIDDEN, TARGETS), {"reduction": "none", "ignore_index": 3}, "linear_cross_entropy"),
        ((HIDDEN[0], TARGETS[0]), {"label_smoothing": 0.1}, "linear_cross_entropy"),
        ((HIDDEN, TARGETS), {"weight": random(11, seed=3).abs()}, "cross_entropy"),
        ((HIDDEN, random(7, 11).softmax(1)), {}, None),
        ((HIDDEN, integers(11, 7, 2, 3)), {"out_features": (2, 3)}, "cross_entropy"),
    ],
)
def test_head_and_loss_in_one(calls, inputs, options, op):
    ours, theirs = fastgpt.nn.LinearCrossEntropyLoss(6, 11, **options), Written(**options)
    ours.linear.load_state_dict(theirs.linear.state_dict())
    assert_same(ours, theirs, *inputs)
    assert calls == ([op] if op else [])


def test_sequences_of_hidden_states():
    loss = fastgpt.nn.LinearCrossEntropyLoss(6, 11, reduction="none", weight=torch.ones(11))
    x, targets = random(2, 4, 6), integers(11, 2, 4)
    got = loss(x, targets)
    loss.weight = None
    assert got.shape == (2, 4)
    torch.testing.assert_close(got, loss(x, targets))


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has no such class")
@pytest.mark.parametrize("options", [{}, {"bias": True, "weight": torch.ones(11), "out_features": (2,)}])
def test_state_dict_is_that_of_pytorchs_class(options):
    ours, theirs = fastgpt.nn.LinearCrossEntropyLoss(6, 11, **options), nn.LinearCrossEntropyLoss(6, 11, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    names = inspect.signature(nn.LinearCrossEntropyLoss).parameters.keys()
    assert names <= inspect.signature(fastgpt.nn.LinearCrossEntropyLoss).parameters.keys()


def test_a_hooked_head_is_called(calls):
    loss = fastgpt.nn.LinearCrossEntropyLoss(6, 11)
    plain = loss(HIDDEN, TARGETS)
    loss.linear.register_forward_hook(lambda module, args, out: out * 2)
    assert not torch.equal(loss(HIDDEN, TARGETS), plain) and calls == ["linear_cross_entropy", "cross_entropy"]


@pytest.mark.parametrize(
    "argument, value",
    [("weight", torch.ones(3)), ("label_smoothing", 1.5), ("reduction", "average")],
)
def test_bad_options_of_the_head_are_named(argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: "):
        fastgpt.nn.LinearCrossEntropyLoss(6, 11, **{argument: value})


@pytest.mark.parametrize("options", [{"z_loss": 0.1}, {"softcap": 5.0}, {"return_accuracy": True}], ids=str)
def test_options_that_pytorch_does_not_have(options):
    """Each is that of the op, of logits and of a head alike, also beside class weights, for which logits are made."""
    token_weight = random(7, seed=5)
    loss, head = fastgpt.nn.CrossEntropyLoss(**options), fastgpt.nn.LinearCrossEntropyLoss(6, 11, **options)
    logits = head.linear(HIDDEN)
    want = ops.cross_entropy(logits, TARGETS, token_weight=token_weight, **options)
    torch.testing.assert_close(loss(logits, TARGETS, token_weight), want)
    torch.testing.assert_close(head(HIDDEN, TARGETS, token_weight), want)
    head.weight = torch.ones(11)
    torch.testing.assert_close(head(HIDDEN, TARGETS, token_weight), want)
    for module, x in ((loss, logits), (head, HIDDEN)):
        with pytest.raises(ValueError, match=r"^target: with .*, expected a class index"):
            module(x, random(7, 11).softmax(1))


def test_options_are_checked_by_the_op():
    with pytest.raises(ValueError, match=r"^softcap: "):
        fastgpt.nn.CrossEntropyLoss(softcap=-1.0)(LOGITS, TARGETS)
