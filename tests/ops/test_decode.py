"""One new token through a whole GPT by one op, against the same model in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastgpt
from fastgpt import GPT, GPTConfig
from fastgpt.config import ACTIVATIONS
from fastgpt.ops.backend import unavailable
from fastgpt.ops.decode import decode_, reason_against_decode

REASON = unavailable("native", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# The storage's unit times the size of the logits: what the float32 between the steps is rounded to.
UNIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def built(B: int = 2, dtype: torch.dtype = torch.float32, **changes) -> tuple[GPT, torch.Tensor]:
    """A model with random weights, biases and norms, and tokens (B, block_size)."""
    torch.manual_seed(0)
    cfg = GPTConfig(**{"vocab_size": 37, "block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 32, **changes})
    model = GPT(cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.to(dtype), torch.randint(cfg.vocab_size, (B, cfg.block_size))


def weights_of(model: GPT) -> list[torch.Tensor]:
    none = next(model.parameters()).new_empty(0)
    layers = [(b.ln_1, b.attn.qkv, b.attn.proj, b.ln_2, b.mlp.up, b.mlp.down) for b in model.blocks]
    found = [model.token_embedding.weight, model.position_embedding.weight]
    for layer in [*sum(layers, ()), model.ln_f, model.lm_head]:
        found += [layer.weight, none if layer.bias is None else layer.bias]
    return [tensor.detach() for tensor in found]


def arguments(model: GPT, tokens: torch.Tensor, length: int = 0) -> tuple:
    """Those of the op, for the token at `length`."""
    cfg = model.cfg
    sizes = 2, cfg.n_layer, len(tokens), cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head
    cache = torch.zeros(sizes, dtype=model.lm_head.weight.dtype)
    return tokens[:, length : length + 1], weights_of(model), cache, length, cfg.activation, model.ln_f.eps


def all_logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """(B, T, V), token by token."""
    _, weights, cache, _, activation, eps = arguments(model, tokens)
    pieces = [decode_(t, weights, cache, i, activation, eps) for i, t in enumerate(tokens.split(1, dim=1))]
    return torch.stack(pieces, dim=1)


@torch.no_grad()
def errors(model: GPT, tokens: torch.Tensor) -> tuple[float, float, float]:
    """The largest errors of the op and of PyTorch's ops, and the largest logit."""
    exact = copy.deepcopy(model).double()(tokens)[0]
    with fastgpt.use_backend("torch"):
        theirs = model(tokens)[0]
    found = all_logits(model, tokens)
    assert found.dtype == theirs.dtype and found.shape == theirs.shape
    return *(float((logits.double() - exact).abs().max()) for logits in (found, theirs)), float(exact.abs().max())


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize(
    ("B", "H", "C"), [(1, 2, 32), (2, 1, 1), (3, 3, 21), (4, 1, 16), (5, 2, 34), (8, 4, 64), (9, 1, 40)], ids=str
)
def test_the_error_is_at_most_twice_that_of_pytorchs_ops(instructions, B: int, H: int, C: int, dtype) -> None:
    """Heads that are, and are not, whole vectors of any instruction set; caches longer than a vector of keys."""
    model, tokens = built(B, dtype, n_head=H, n_embd=C)
    ours, theirs, size = errors(model, tokens)
    assert ours <= 2 * theirs + UNIT[dtype] * size


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_and_without_biases(activation: str, bias: bool) -> None:
    ours, theirs, size = errors(*built(activation=activation, bias=bias, tie_weights=bias))
    assert ours <= 2 * theirs + 1e-5 * size


def test_a_head_with_a_bias_and_a_feed_forward_layer_of_another_width() -> None:
    model, tokens = built()
    model.lm_head = torch.nn.Linear(32, 37)
    model.blocks[1].mlp.up, model.blocks[1].mlp.down = torch.nn.Linear(32, 50), torch.nn.Linear(50, 32)
    ours, theirs, size = errors(model, tokens)
    assert ours <= 2 * theirs + 1e-5 * size


def test_same_bits_for_any_number_of_threads_and_in_every_run(instructions) -> None:
    model, tokens = built(3, n_embd=48, n_head=3)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(all_logits(model, tokens[:, :6]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_scores_of_any_size_and_values_that_are_not_finite() -> None:
    """A key far ahead of the others takes all of the weight; nan and inf reach the sequence that they are in alone."""
    model, tokens = built()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(300.0)
        ours, theirs, size = errors(model, tokens)
        assert ours <= 2 * theirs + 1e-4 * size
        tokens[0], tokens[1] = 5, 6
        for value in (torch.nan, torch.inf):
            broken, _ = built(tie_weights=False)
            broken.token_embedding.weight[5] = value
            logits = all_logits(broken, tokens)
            assert logits[0].isnan().all() and logits[1].isfinite().all()


def test_rows_have_lengths_of_their_own(instructions) -> None:
    """Each has the bits that it has among rows of one length. The rows are some of the cache's, in any order."""
    model, tokens = built(4)
    rows, lengths = [5, 0, 6, 2], [0, 1, 4, 23]
    _, weights, cache, _, activation, eps = arguments(model, tokens)
    wide = cache.new_full((*cache.shape[:2], 7, *cache.shape[3:]), torch.nan)  # what is behind a row is not read
    expected = []
    for length in range(24):
        if length in lengths:
            i = lengths.index(length)
            wide[:, :, rows[i], :, :length] = cache[:, :, i, :, :length]
        logits = decode_(tokens[:, length : length + 1], weights, cache, length, activation, eps)
        if length in lengths:
            expected.append(logits[i])
    new = torch.stack([tokens[i, length : length + 1] for i, length in enumerate(lengths)])
    found = decode_(new, weights, wide, 23, activation, eps, torch.tensor([*zip(rows, lengths, strict=True)]))
    assert torch.equal(found, torch.stack(expected))
    for row in range(7):
        filled = lengths[rows.index(row)] + 1 if row in rows else 0
        assert wide[:, :, row, :, :filled].isfinite().all() and wide[:, :, row, :, filled:].isnan().all()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[0, 3]], "rows: expected int64"),
        ([[0, 3, 1], [1, 3, 1]], "rows: expected int64"),
        ([[0.0, 3.0], [1.0, 3.0]], "rows: expected int64"),
        ([[0, 3], [2, 3]], "rows: expected rows of the cache"),
        ([[0, 3], [-1, 3]], "rows: expected rows of the cache"),
        ([[1, 3], [1, 3]], "rows: expected rows of the cache, each once"),
        ([[0, 3], [1, 24]], "rows: expected lengths below 24"),
        ([[0, 3], [1, -1]], "rows: expected lengths"),
    ],
    ids=str,
)
def test_wrong_rows_are_named(rows: list, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        decode_(*arguments(*built()), torch.tensor(rows))


@pytest.mark.parametrize("rows", [None, torch.tensor([[1, 3], [0, 2]])], ids=["one length", "rows"])
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_opcheck(dtype: torch.dtype, rows: torch.Tensor | None) -> None:
    tokens, weights, cache, length, _, eps = arguments(*built(dtype=dtype), length=3)
    torch.library.opcheck(torch.ops.fastgpt.decode_native_.default, (tokens, weights, cache, length, rows, 0, eps))


def test_its_operations_are_counted() -> None:
    model, tokens = built()
    with FlopCounterMode(display=False) as counter:
        decode_(*arguments(model, tokens))
    matrices = 2 * (12 * 32 * 32) + 37 * 32
    assert counter.get_total_flops() == 2 * 2 * matrices


def test_only_the_new_tokens_place_in_the_cache_is_written() -> None:
    model, tokens = built()
    given = arguments(model, tokens, length=5)
    cache = given[2].uniform_()
    before = cache.clone()
    decode_(*given)
    changed = (cache != before).any(-1)
    assert changed[..., 5].all() and not changed[..., :5].any() and not changed[..., 6:].any()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda a: (a[0].repeat(1, 2), *a[1:]), "tokens: expected int64"),
        (lambda a: (a[0].int(), *a[1:]), "tokens: expected int64"),
        (lambda a: (a[0][:1], *a[1:]), "cache: expected one for n sequences"),
        (lambda a: (a[0], a[1][:-1], *a[2:]), "weights: expected 30 tensors"),
        (lambda a: (a[0], [*a[1][:4], a[1][4].t(), *a[1][5:]], *a[2:]), "weights: expected contiguous"),
        (lambda a: (a[0], [*a[1][:4], a[1][4].double(), *a[1][5:]], *a[2:]), "weights: expected float32"),
        (lambda a: (a[0], [*a[1][:4], a[1][4].half(), *a[1][5:]], *a[2:]), "weights: expected contiguous"),
        (lambda a: (a[0], [a[1][0], a[1][1][:5], *a[1][2:]], a[2], 5, *a[4:]), "a row for this token"),
        (lambda a: (*a[:2], a[2].transpose(1, 2), *a[3:]), "cache: expected"),
        (lambda a: (*a[:3], 24, *a[4:]), "not full"),
        (lambda a: (*a[:3], -1, *a[4:]), "not full"),
    ],
)
def test_wrong_arguments_are_named(wrong, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        decode_(*wrong(arguments(*built())))


def test_a_token_outside_the_vocabulary_is_named() -> None:
    model, tokens = built()
    with pytest.raises(IndexError, match="tokens: value 37 at flat position 1"):
        decode_(torch.tensor([[0], [37]]), *arguments(model, tokens)[1:])


def test_a_backend_that_was_asked_for_decides() -> None:
    assert reason_against_decode() is None
    with fastgpt.use_backend("torch"):
        assert reason_against_decode() == "the torch backend is preferred"
