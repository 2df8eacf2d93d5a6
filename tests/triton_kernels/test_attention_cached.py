"""Decoding against a cache of fixed size: the kernel and its PyTorch version against the formula, at all lengths."""

import math

import pytest
import torch

from fastgpt import ops, use_backend
from fastgpt.ops import attention_cached, reference
from fastgpt.ops.attention_cached import attention_cached_, attention_cached_on_torch_
from fastgpt.parity import ATOL
from triton_checks import DEVICE

kernels = pytest.importorskip("fastgpt.triton_kernels.attention_cached")


def call_triton_(q, k, v, keys, values, length):
    length = torch.tensor(length, device=DEVICE)
    return torch.ops.fastgpt.attention_cached_triton_(q, k, v, keys, values, length, 1 / math.sqrt(q.shape[3]))


def call_torch_(q, k, v, keys, values, length):
    length = torch.tensor(length, device=DEVICE)
    return attention_cached_on_torch_(q, k, v, keys, values, length, 1 / math.sqrt(q.shape[3]))


def inputs(B, H, Hkv, T, capacity, D, dtype, unaligned=False):
    """q, k, v as slices of one projection; a cache whose rows are NaN where nothing was written."""
    extra = 3 if unaligned else 0
    qkv = torch.randn(B, T, (H + 2 * Hkv) * D + extra, dtype=dtype, device=DEVICE)[:, :, extra:]
    q, k, v = (t.view(B, T, -1, D).transpose(1, 2) for t in qkv.split([H * D, Hkv * D, Hkv * D], dim=2))
    cache = torch.full((2, B, Hkv, capacity + extra, D + extra), torch.nan, dtype=dtype, device=DEVICE)
    return q, k, v, *cache[:, :, :, extra:, extra:]


def check(call_, B, H, Hkv, T, capacity, D, dtype, length, unaligned=False):
    q, k, v, keys, values = inputs(B, H, Hkv, T, capacity, D, dtype, unaligned)
    for cache in (keys, values):
        cache[:, :, :length] = torch.randn(B, Hkv, length, D, dtype=dtype, device=DEVICE)
    whole = [torch.cat([cache[:, :, :length], new], dim=2) for cache, new in ((keys, k), (values, v))]
    expected = reference.attention(q.double(), *(x.double() for x in whole))
    peer = ops.attention(q, *whole, backend="torch")
    out = call_(q, k, v, keys, values, length)
    for cache, rows in zip((keys, values), whole, strict=True):
        assert torch.equal(cache[:, :, : length + T], rows), "the cache and what was appended"
        assert cache[:, :, length + T :].isnan().all(), "what is behind them"
    assert (out.dtype == dtype and out.transpose(1, 2).is_contiguous()) or call_ is call_torch_
    error, peers_error = (float((x.double() - expected).abs().max()) for x in (out, peer))
    assert error <= 2 * peers_error + ATOL[dtype], f"length {length}: {error:.2e}, PyTorch's {peers_error:.2e}"


# name: (B, H, Hkv, T, capacity, D, dtype, unaligned). The interpreter counts as two multiprocessors, for which keys are
# split among up to 4 programs of at least 128 keys: 1 split, then 2, then 3.
CASES = {
    "one split": (1, 2, 2, 1, 40, 16, torch.float32, False),
    "one split, many heads": (2, 4, 4, 2, 300, 20, torch.float16, True),
    "two splits, grouped": (1, 4, 1, 1, 200, 32, torch.bfloat16, False),
    "two splits, odd head size": (2, 2, 1, 3, 190, 33, torch.float32, True),
    "three splits, eight tokens": (1, 2, 1, 8, 330, 64, torch.float16, False),
    "head size 256": (1, 1, 1, 5, 140, 256, torch.bfloat16, True),
}


@pytest.mark.parametrize("call_", [call_triton_, call_torch_], ids=["triton", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_lengths_around_the_borders_of_blocks(name, call_):
    B, H, Hkv, T, capacity, D, dtype, unaligned = CASES[name]
    torch.manual_seed(len(name))
    lengths = {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 192, 193, 256, 257}
    for length in sorted(n for n in lengths | {capacity - T - 1, capacity - T} if n <= capacity - T):
        check(call_, B, H, Hkv, T, capacity, D, dtype, length, unaligned)


@pytest.mark.parametrize("call_", [call_triton_, call_torch_], ids=["triton", "torch"])
@pytest.mark.parametrize("tokens", range(1, 9))
def test_each_number_of_new_tokens(tokens, call_):
    torch.manual_seed(tokens)
    for length in (0, 7, 64, 150 - tokens):
        check(call_, 1, 2, 1, tokens, 150, 16, torch.float16, length)


@pytest.mark.parametrize("call_", [call_triton_, call_torch_], ids=["triton", "torch"])
@pytest.mark.parametrize("length", [-1, 139, 140, 2**40])
def test_without_room_nothing_is_written_and_the_result_is_nan(length, call_):
    q, k, v, keys, values = inputs(1, 2, 1, 2, 140, 16, torch.float32)
    keys.fill_(1.0), values.fill_(2.0)
    assert call_(q, k, v, keys, values, length).isnan().all()
    assert (keys == 1.0).all() and (values == 2.0).all()


def test_token_by_token_is_the_whole_at_once(monkeypatch):
    """As generation does it, with a length that is counted on the device."""
    torch.manual_seed(0)
    q, k, v, keys, values = inputs(2, 4, 2, 20, 150, 24, torch.float32)
    whole, length, parts = (
        ops.attention(q, k, v, backend="torch"),
        torch.zeros((), dtype=torch.int64, device=DEVICE),
        [],
    )
    monkeypatch.setattr(attention_cached, "attention_cached_on_torch_", None)  # it must not be called
    with use_backend("triton"):
        for i in range(20):
            parts.append(attention_cached_(*(x[:, :, i : i + 1] for x in (q, k, v)), keys, values, length))
            length += 1
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=1e-5, rtol=1e-5)


def test_heads_of_a_layer_of_one_large_tensor():
    """The cache of a model: all layers, keys and values in one tensor."""
    cache = torch.zeros(2, 3, 1, 2, 40, 16, device=DEVICE)
    q, k, v, *_ = inputs(1, 2, 2, 1, 40, 16, torch.float32)
    out = call_triton_(q, k, v, cache[0, 1], cache[1, 1], 5)
    assert torch.equal(cache[:, 1, :, :, 5:6], torch.stack([k, v])) and int((cache != 0).sum()) == 2 * k.numel()
    expected = ops.attention(q, *cache[:, 1, :, :, :6], backend="torch")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_opcheck():
    q, k, v, keys, values = inputs(1, 4, 2, 2, 30, 16, torch.float32)
    keys.zero_(), values.zero_()
    arguments = (q, k, v, keys, values, torch.tensor(3, device=DEVICE), 0.25)
    torch.library.opcheck(torch.ops.fastgpt.attention_cached_triton_.default, arguments)


def test_under_compile_the_cache_is_changed_in_place():
    q, k, v, keys, values = inputs(1, 2, 1, 1, 30, 16, torch.float32)
    keys.zero_(), values.zero_()
    length = torch.tensor(3, device=DEVICE)
    copies = keys.clone(), values.clone()

    def step(q, k, v, keys, values, length):
        return torch.ops.fastgpt.attention_cached_triton_(q, k, v, keys, values, length, 0.25)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, keys, values, length), step(q, k, v, *copies, length))
    assert torch.equal(keys, copies[0]) and torch.equal(values, copies[1]) and keys.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a | {"keys": a["keys"].transpose(2, 3)}, ValueError, "keys, values: expected the D elements"),
        (lambda a: a | {"q": a["q"].repeat(1, 1, 9, 1)}, ValueError, "q: expected 1 to 8 new tokens, got 9"),
        (lambda a: a | {"length": torch.tensor(1.0)}, TypeError, "length: expected a 0-dim int64 tensor"),
        (lambda a: a | {"length": torch.tensor([1])}, TypeError, "length: expected a 0-dim int64 tensor"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    names = ("q", "k", "v", "keys", "values")
    arguments = dict(zip(names, inputs(1, 2, 2, 1, 16, 16, torch.float32), strict=True))
    arguments["length"] = torch.tensor(1)
    with pytest.raises(error, match=message):
        attention_cached_(**change(arguments))
