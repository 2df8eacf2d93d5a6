"""Generation: the cache gives the tokens of full recomputation, and sampling draws from the distribution it names."""

from __future__ import annotations

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.generate import next_token, stream


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
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
    tokens = next_token(LOGITS.expand(n, 4), generator=torch.Generator().manual_seed(0), **settings)
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
    ],
    ids=str,
)
def test_sampling_frequencies(options, expected):
    torch.testing.assert_close(frequencies(**options), torch.tensor(expected), rtol=0.0, atol=0.011)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"idx": torch.zeros(1, 0, dtype=torch.int64)}, "idx: the prompt is empty"),
        ({"idx": torch.zeros(3, dtype=torch.int64)}, "idx: expected token ids"),
        ({"idx": torch.zeros(1, 3)}, "idx: expected token ids"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected"),
        ({"max_new_tokens": 2.0}, "max_new_tokens: expected"),
        ({"temperature": -0.1}, "temperature: expected"),
        ({"temperature": float("nan")}, "temperature: expected"),
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
