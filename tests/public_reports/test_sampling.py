"""What users of neighbouring projects reported about generation (see test_citations.py)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastgpt.baselines import Bigram
from fastgpt.generate import stream
from helpers import TINY, integers, tiny


def draws(probabilities: list[float], n: int = 4000, **options) -> list[int]:
    """How often each token follows token 0, for a model that gives it these probabilities."""
    V = len(probabilities)
    model = Bigram(dataclasses.replace(TINY, vocab_size=V))
    with torch.no_grad():
        model.table.weight.copy_(torch.tensor(probabilities).log().expand(V, V))
    options.setdefault("generator", torch.Generator().manual_seed(1))
    out = model.generate(torch.zeros(n, 1, dtype=torch.int64), max_new_tokens=1, **options)
    return torch.bincount(out[:, 1], minlength=V).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [0, -1])
def test_sampling_top_k_of_nothing(top_k, temperature):
    """Lightning-AI/litgpt#2309: top_k=0 masked every logit, and greedy decoding gave token 0."""
    with pytest.raises(ValueError, match=f"top_k: expected an integer of at least 1, got {top_k}"):
        draws([0.2, 0.8], top_k=top_k, temperature=temperature)


@pytest.mark.parametrize("top_k", [4, 5, 10_000])
def test_sampling_top_k_of_more_than_there_are(top_k):
    """TransformerLensOrg/TransformerLens#1347, OpenNMT/CTranslate2#586, ml-explore/mlx-lm#1377: crash, or refusal."""
    assert draws([0.1, 0.2, 0.3, 0.4], top_k=top_k) == draws([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("top_k", [1.2, 2.0, "3"])
def test_sampling_top_k_of_a_fraction(top_k):
    """vllm-project/vllm#7227, devforth/gpt-j-6b-gpu-docker#1: a TypeError from inside the sampler."""
    with pytest.raises(ValueError, match="top_k: expected an integer of at least 1, got "):
        draws([0.2, 0.3, 0.5], n=10, top_k=top_k)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, [0]), (0.49, [0]), (0.6, [0, 1]), (0.81, [0, 1, 2]), (0.97, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])],
)
def test_sampling_top_p_keeps_the_token_that_crosses(top_p, kept):
    """thu-nics/C2C#21, Biohub/esm#360, fishaudio/fish-speech#1171: the crossing token was left out."""
    counts = draws([0.5, 0.3, 0.15, 0.05], top_p=top_p)
    assert [token for token, count in enumerate(counts) if count] == kept
    share = sum([0.5, 0.3, 0.15, 0.05][: len(kept)])
    assert counts[0] / 4000 == pytest.approx(0.5 / share, abs=0.04)


def test_sampling_never_takes_what_is_impossible():
    """pytorch/pytorch#48841, huggingface/transformers#23088: tokens of probability 0 were drawn."""
    counts = draws([0.0, 0.7, 0.0, 0.3, 0.0], n=100_000)
    assert [counts[i] for i in (0, 2, 4)] == [0, 0, 0] and sum(counts) == 100_000


def test_sampling_repeats_with_its_generator():
    """karpathy/nanoGPT#426, openai/gpt-2#65, minimaxir/gpt-2-simple#121: the same seed gave other text."""
    model, idx = tiny(), integers(11, 2, 3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = model.generate(idx, 12, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.manual_seed(2)
    assert torch.equal(first, model.generate(idx, 12, generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(first, model.generate(idx, 12, generator=torch.Generator().manual_seed(8)))


def test_sampling_restores_the_mode():
    """pytorch/examples#114, shubhamagarwal92/mmd#14: dropout on while sampling, or off for the rest of training."""
    model, idx = tiny(dropout=0.6), integers(11, 1, 3)
    first, second = (model.generate(idx, 12, temperature=0.0) for _ in range(2))
    assert torch.equal(first, second) and model.training
    tokens = stream(model, idx, 12, temperature=0.0)
    next(tokens)
    assert model.training, "between two tokens the caller may train"
    tokens.close()
    model.eval()
    assert torch.equal(first, model.generate(idx, 12, temperature=0.0)) and not model.training


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("prompt", [1, 5, 8, 11])
def test_sampling_with_and_without_a_cache(batch, prompt):
    """lucidrains/x-transformers#219, rasbt/LLMs-from-scratch#1048: the cache changed what was said."""
    model, idx = tiny(seed=3), integers(11, batch, prompt)
    with_cache, without = (
        torch.cat(list(stream(model, idx, 10, temperature=0.0, use_cache=use)), 1) for use in (True, False)
    )
    assert torch.equal(with_cache, without)
    text = idx
    for token in with_cache.split(1, 1):
        logits = model(text[:, -8:])[0][:, -1]
        assert torch.equal(logits.argmax(-1, keepdim=True), token)
        text = torch.cat([text, token], 1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sampling_the_caches_dtype_is_attentions(dtype, autocast):
    """Lightning-AI/litgpt#57, TransformerLensOrg/TransformerLens#1260: keys of one dtype met queries of another."""
    model, idx = tiny(seed=3).to(dtype), integers(11, 2, 3)
    half = torch.float16 if dtype == torch.float16 else torch.bfloat16
    with torch.autocast("cpu", half, enabled=autocast):
        assert model.generate(idx, 9, temperature=0.0).shape == (2, 12)


def test_sampling_past_the_context():
    """huggingface/transformers#530, huggingface/transformers#11033, Lightning-AI/litgpt#45: an error at token 1025."""
    model, idx = tiny(), integers(11, 2, 20)
    out = model.generate(idx, 30)
    assert out.shape == (2, 50) and torch.equal(out[:, :20], idx) and int(out.max()) < 11


def test_sampling_rows_of_a_batch_do_not_meet():
    """rasbt/reasoning-from-scratch#33: a row said something else beside other rows than alone."""
    model, idx = tiny(seed=4), integers(11, 4, 3)
    together = model.generate(idx, 10, temperature=0.0)
    for row, alone in zip(together, idx, strict=True):
        assert torch.equal(row, model.generate(alone[None], 10, temperature=0.0)[0])
