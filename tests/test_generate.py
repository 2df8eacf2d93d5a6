"""Generation: the cache gives the tokens of full recomputation, and sampling draws from the distribution it names."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastgpt import GPT, GPTConfig
from fastgpt.generate import next_token, stream

WITHOUT_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(3)
    model = GPT(GPTConfig(vocab_size=29, block_size=16, n_layer=3, n_head=2, n_embd=24, dropout=0.5))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)  # untrained logits are too flat to tell two contexts apart
    return model


def lecture_generate(model: GPT, idx: torch.Tensor, n: int) -> torch.Tensor:
    """Greedy generation as the lecture writes it: crop, forward, take the last logits, append."""
    model.eval()
    for _ in range(n):
        logits, _ = model(idx[:, -model.cfg.block_size :])
        idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    model.train()
    return idx


@pytest.mark.parametrize("prompt_tokens", [1, 5, 15, 16, 17, 40])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_with_cache_equals_recomputation(model, prompt_tokens, batch_size):
    prompt = torch.randint(29, (batch_size, prompt_tokens), generator=torch.Generator().manual_seed(prompt_tokens))
    expected = lecture_generate(model, prompt, 30)
    assert torch.equal(model.generate(prompt, 30, temperature=0.0), expected)
    without = list(stream(model, prompt, 30, temperature=0.0, use_cache=False))
    assert torch.equal(torch.cat([prompt, *without], dim=1), expected)
    assert len(expected[:, prompt_tokens:].unique()) > 3, "the model must not repeat one token, or this shows nothing"


@torch.no_grad()
def test_cached_logits_equal_full_ones_in_float64(model):
    wide = GPT(model.cfg).double().eval()
    wide.load_state_dict(model.state_dict())
    idx = torch.arange(12).view(1, 12)
    cache = wide.new_cache(1)
    pieces = [wide.hidden(part, cache) for part in idx.split([4, 1, 3, 1, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), wide.hidden(idx), rtol=1e-12, atol=1e-12)


def test_the_generator_makes_a_sample_repeatable(model):
    prompt = torch.zeros(2, 1, dtype=torch.int64)
    draws = [model.generate(prompt, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_mode_is_restored_and_dropout_is_off(model):
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    model.train()
    first = model.generate(prompt, 5, temperature=0.0)
    assert model.training
    assert torch.equal(first, model.generate(prompt, 5, temperature=0.0))
    model.eval()
    model.generate(prompt, 2)
    assert not model.training
    model.train()


def test_shapes_dtypes_and_zero_tokens(model):
    prompt = torch.zeros(2, 3, dtype=torch.int64)
    assert model.generate(prompt, 4).shape == (2, 7)
    assert torch.equal(model.generate(prompt, 0), prompt)
    assert model.generate(prompt.int(), 2).dtype == torch.int32
    assert all(token.shape == (2, 1) for token in stream(model, prompt, 3))


LOGITS = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))


def frequencies(**options) -> torch.Tensor:
    n = 40_000
    tokens = next_token(LOGITS.expand(n, 4), generator=torch.Generator().manual_seed(0), **options)
    return torch.bincount(tokens.flatten(), minlength=4) / n


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [25 / 36.5, 9 / 36.5, 2.25 / 36.5, 0.25 / 36.5]),
        ({"top_k": 2}, [0.625, 0.375, 0.0, 0.0]),
        ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 1}, [1.0, 0.0, 0.0, 0.0]),
        ({"top_p": 0.7}, [0.625, 0.375, 0.0, 0.0]),
        ({"top_p": 0.1}, [1.0, 0.0, 0.0, 0.0]),
        ({"top_p": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 3, "top_p": 0.6}, [0.625, 0.375, 0.0, 0.0]),
        ({"temperature": 0.0}, [1.0, 0.0, 0.0, 0.0]),
        ({"temperature": 1e-40}, [1.0, 0.0, 0.0, 0.0]),
        ({"temperature": 5e-324}, [1.0, 0.0, 0.0, 0.0]),
        ({"temperature": 1e-37}, [1.0, 0.0, 0.0, 0.0]),
        ({"temperature": 1e300}, [0.25, 0.25, 0.25, 0.25]),
        ({"temperature": 1e300, "top_k": 3}, [1 / 3, 1 / 3, 1 / 3, 0.0]),
        ({"top_p": 1e-300}, [1.0, 0.0, 0.0, 0.0]),
    ],
    ids=str,
)
def test_sampling_frequencies(options, expected):
    torch.testing.assert_close(frequencies(**options), torch.tensor(expected), rtol=0.0, atol=0.011)


def distribution(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """The probabilities that `stream` promises, in float64: each rule written out, one token after the other."""
    by_likelihood = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = by_likelihood[:top_k]
    if temperature < 2.0**-126:
        kept, temperature = kept[:1], 1.0
    weights = np.zeros(len(logits))
    for token in kept:
        weights[token] = np.exp((logits[token] - logits[kept[0]]) / temperature)
    weights /= weights.sum()
    if top_p is not None:
        mass = 0.0
        for token in kept:
            mass, weights[token] = mass + weights[token], weights[token] if mass < top_p else 0.0
    return weights / weights.sum()


finite = st.floats(-60000, 60000, width=16)  # float16's, and often equal
rows = st.lists(st.one_of(st.sampled_from([0.0, 1.0, 2.0, -torch.inf]), finite), min_size=1, max_size=12)


@settings(deadline=None, max_examples=150)
@given(
    logits=rows,
    temperature=st.one_of(st.just(0.0), st.floats(0.01, 1e6), st.sampled_from([1e-40, 1e-30, 1e38, 1e308])),
    top_k=st.one_of(st.none(), st.integers(1, 15)),
    top_p=st.one_of(st.none(), st.sampled_from([1e-50, 0.15, 0.45, 0.85, 1.0])),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_draws_have_the_frequencies_of_the_formula(logits, temperature, top_k, top_p, dtype):
    assume(max(logits) > -torch.inf)
    expected = distribution(logits, temperature, top_k, top_p)
    if top_p is not None:  # a sum that reaches p to the last bit is for rounding to decide
        ahead = np.sort(distribution(logits, temperature, top_k, None))[::-1].cumsum()
        assume(np.abs(ahead - top_p).min() > 1e-4 or top_p == 1.0)
    n = 2000
    repeated = torch.tensor(logits, dtype=dtype).expand(n, len(logits))
    tokens = next_token(repeated, temperature, top_k, top_p, torch.Generator().manual_seed(len(logits)))
    counts = np.bincount(tokens.flatten().numpy(), minlength=len(logits))
    assert (counts[expected == 0.0] == 0).all(), "a token that is left out is never drawn"
    spread = np.sqrt(n * expected * (1 - expected))
    assert (np.abs(counts - n * expected) <= 6 * spread + 1).all()


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6, 7])
def test_of_equal_tokens_exactly_k_are_kept_the_first(k):
    logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0, 1.0]]).expand(3000, 6)
    drawn = next_token(logits, 1.0, k, generator=torch.Generator().manual_seed(0)).unique()
    assert drawn.tolist() == sorted([1, 3, 0, 2, 4, 5][:k])
    assert next_token(logits[:1], 0.0).item() == next_token(logits[:1], 1e-40).item() == 1, "greedy: the first too"


def test_top_p_takes_the_first_of_equal_tokens():
    logits = torch.zeros(3000, 8)
    drawn = next_token(logits, 1.0, None, 0.3, torch.Generator().manual_seed(0)).unique()
    assert drawn.tolist() == [0, 1, 2]


def test_a_draw_is_that_of_multinomial():
    probs = torch.softmax(torch.randn(64, 50, generator=torch.Generator().manual_seed(1)), dim=-1)
    for seed in range(5):
        expected = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(next_token(probs.log(), generator=torch.Generator().manual_seed(seed)), expected)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 1e-40}])
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([0.0, torch.nan, 1.0], "one is nan"),
        ([torch.inf, 0.0, 1.0], "one is inf"),
        ([-torch.inf] * 3, "all are -inf"),
        ([torch.nan] * 3, "one is nan"),
        ([torch.inf, torch.nan, 0.0], "one is nan"),
    ],
)
def test_logits_that_are_not_finite_are_refused(options, bad, said):
    with pytest.raises(ValueError, match=f"^logits: in row 1, {said}; expected finite numbers"):
        next_token(torch.tensor([[0.0, -torch.inf, 1.0], bad]), **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, WITHOUT_GPU])])
def test_a_model_that_gives_nan_is_named_with_row_and_position(model, temperature, device):
    broken = GPT(model.cfg).to(device)
    with torch.no_grad():
        broken.position_embedding.weight[5] = torch.nan  # seen once position 5 is part of the context
    prompt = torch.zeros(2, 3, dtype=torch.int64, device=device)
    assert broken.generate(prompt, 3, temperature=temperature).shape == (2, 6)
    with pytest.raises(ValueError, match=r"^model: its logits for position 6: in row 0, one is nan"):
        broken.generate(prompt, 4, temperature=temperature)
    assert broken.training


def test_settings_may_be_any_integer_or_real_number(model):
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    draw = {"temperature": 0.5, "top_k": 3, "top_p": 0.75}
    expected = model.generate(prompt, 6, **draw, generator=torch.Generator().manual_seed(0))
    for integer in (np.int64, np.uint8, torch.tensor):
        for real in (np.float32, np.float64, Fraction, torch.tensor):
            others = {"temperature": real(0.5), "top_k": integer(3), "top_p": real(0.75)}
            got = model.generate(prompt, integer(6), **others, generator=torch.Generator().manual_seed(0))
            assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"idx": torch.zeros(1, 0, dtype=torch.int64)}, "idx: the prompt is empty"),
        ({"idx": torch.zeros(3, dtype=torch.int64)}, "idx: expected token ids"),
        ({"idx": torch.zeros(1, 3)}, "idx: expected token ids"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected"),
        ({"max_new_tokens": 2.0}, "max_new_tokens: expected"),
        ({"max_new_tokens": True}, "max_new_tokens: expected an integer of at least 0, got True"),
        ({"max_new_tokens": None}, "max_new_tokens: expected"),
        ({"max_new_tokens": torch.tensor([1, 2])}, "max_new_tokens: expected"),
        ({"temperature": -0.1}, "temperature: expected"),
        ({"temperature": float("nan")}, "temperature: expected"),
        ({"temperature": float("inf")}, "temperature: expected"),
        ({"temperature": 10**400}, "temperature: expected"),
        ({"temperature": True}, "temperature: expected"),
        ({"temperature": torch.tensor(True)}, "temperature: expected"),
        ({"temperature": None}, "temperature: expected"),
        ({"temperature": "1"}, "temperature: expected a number of at least 0, got '1'"),
        ({"temperature": 1j}, "temperature: expected"),
        ({"top_k": 1.0}, "top_k: expected"),
        ({"top_k": np.True_}, "top_k: expected"),
        ({"top_p": True}, "top_p: expected"),
        ({"top_p": np.nan}, "top_p: expected"),
        ({"top_k": 0}, "top_k: expected"),
        ({"top_p": 0.0}, "top_p: expected"),
        ({"top_p": 1.1}, "top_p: expected"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"idx": torch.zeros(1, 1, dtype=torch.int64), "max_new_tokens": 1, **options})


def test_an_encoder_does_not_generate():
    encoder = GPT(GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4, is_causal=False))
    with pytest.raises(ValueError, match="is_causal"):
        encoder.generate(torch.zeros(1, 1, dtype=torch.int64), 1)


def test_a_token_out_of_range_is_named(model):
    with pytest.raises(IndexError, match="tokens: value 29"):
        model.generate(torch.tensor([[29]]), 1)
