"""The oracle: it equals torch.nn.functional in float64, its gradients are those of finite differences."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from fastgpt.ops import reference
from fastgpt.ops.dropout import philox_keep_mask
from fastgpt.parity import YARDSTICKS, Draw, max_error, parity_cases


@pytest.mark.parametrize("case", parity_cases(), ids=lambda case: f"{case.op}: {case.name}")
def test_equals_torch_in_float64(case) -> None:
    arguments = case.arguments(Draw(torch.float64, "cpu"))
    ours = getattr(reference, case.op)(**arguments, **case.options)
    theirs = YARDSTICKS[case.op](**arguments, **case.options)
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    for our, their in pairs:
        assert our.shape == their.shape
        assert max_error(our, their) <= 1e-13 * max(1.0, float(their.abs().max()))


def inputs(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": False}, {"scale": 0.3}, {"dropout_p": 0.4, "seed": 3}],
    ids=str,
)
@pytest.mark.parametrize("Tq, Tk", [(3, 3), (2, 4), (4, 2)])
def test_attention_gradient(Tq: int, Tk: int, options: dict) -> None:
    q, k, v = inputs((1, 2, Tq, 3), (1, 1, Tk, 3), (1, 1, Tk, 3))
    assert gradcheck(lambda *qkv: reference.attention(*qkv, **options), (q, k, v))


def test_layer_norm_gradient() -> None:
    x, residual, weight, bias = inputs((3, 5), (3, 5), (5,), (5,))
    assert gradcheck(reference.layer_norm, (x, weight, bias))
    assert gradcheck(lambda *a: reference.add_layer_norm(*a, dropout_p=0.3, seed=1), (x, residual, weight, bias))


def test_embedding_gradient() -> None:
    tokens, (table, positions) = torch.tensor([[0, 2, 2]]), inputs((4, 3), (5, 3))
    assert gradcheck(lambda *tables: reference.embedding(tokens, *tables, position_offset=1), (table, positions))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cross_entropy_gradient(reduction: str, label_smoothing: float) -> None:
    logits, x, weight, bias = inputs((3, 4), (3, 2), (4, 2), (4,))
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    targets, class_weight = torch.tensor([1, -100, 3]), torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    assert gradcheck(lambda z: reference.cross_entropy(z, targets, weight=class_weight, **options), (logits,))
    assert gradcheck(
        lambda x, w, b: reference.linear_cross_entropy(x, w, targets, bias=b, **options), (x, weight, bias)
    )


def test_cross_entropy_ignores_no_target_of_32_bits_whose_last_bits_alone_are_those_of_ignore_index() -> None:
    (logits,) = inputs((4, 10))
    targets = torch.tensor([3, 3, 3, 1])
    losses = [reference.cross_entropy(logits, t, ignore_index=2**32 + 3) for t in (targets, targets.int())]
    assert torch.equal(*losses)


def test_attention_dropout_is_the_mask() -> None:
    """With equal scores and v the identity, the output is the dropped weights themselves."""
    T, p = 8, 0.25
    q, v = torch.zeros(2, 3, T, T, dtype=torch.float64), torch.eye(T, dtype=torch.float64).expand(2, 3, T, T)
    out = reference.attention(q, q, v, is_causal=False, dropout_p=p, seed=11)
    keep = philox_keep_mask(11, p, 2 * 3 * T, T, q.device).view(2, 3, T, T)
    assert torch.equal(out, keep.double() / T / (1 - p))
    assert 0 < int(keep.sum()) < keep.numel()


def test_a_query_that_sees_no_key_gives_zeros() -> None:
    q, k, v = inputs((1, 1, 3, 2), (1, 1, 1, 2), (1, 1, 1, 2))
    out = reference.attention(q, k, v)
    assert torch.equal(out[:, :, :2], torch.zeros(1, 1, 2, 2, dtype=torch.float64))
    assert torch.equal(out[:, :, 2:], v)
