"""The draw of one token: the repetition penalty, log-probabilities and generators. test_generate.py has the rest."""

from __future__ import annotations

import pytest
import torch

from fastgpt.draw import Draw, DrawSettings, checked_generators, checked_settings, next_token

LOGITS = torch.tensor([[2.0, -1.0, 0.0, 1.9, -torch.inf], [2.0, -1.0, 0.0, 1.9, -torch.inf]])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    settings = DrawSettings(repetition_penalty=2.0)
    n = 40_000
    context = torch.tensor([[0, 1, 4, 0]]).expand(n, 4)
    tokens = next_token(LOGITS[:1].expand(n, 5), 1.0, None, None, seeded(0), 2.0, context)
    expected = torch.softmax(torch.tensor([1.0, -2.0, 0.0, 1.9, -torch.inf]), dim=0)
    assert settings != DrawSettings()
    torch.testing.assert_close(torch.bincount(tokens.flatten(), minlength=5) / n, expected, rtol=0.0, atol=0.011)


def test_each_row_counts_its_own_tokens_and_the_new_ones() -> None:
    draw = Draw(checked_settings(0.0, repetition_penalty=1.5), None, torch.tensor([[0], [2]]))
    assert draw(LOGITS)[0].flatten().tolist() == [3, 0]
    assert draw(LOGITS)[0].flatten().tolist() == [0, 3], "1.33 and 1.27; 1.33 and 1.9"
    assert draw(LOGITS)[0].flatten().tolist() == [0, 0]
    assert Draw(checked_settings(0.0, repetition_penalty=0.5), None, torch.tensor([[3]]))(LOGITS[:1])[0].item() == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_a_penalty_never_makes_what_is_not_finite(dtype, penalty) -> None:
    logits = torch.tensor([[60000.0, -60000.0, 1e-3, -torch.inf]], dtype=dtype).expand(50, 4)
    context = torch.arange(4).expand(50, 4)
    for temperature in (0.0, 1.0, 1e300):
        drawn = next_token(logits, temperature, None, None, seeded(1), penalty, context)
        assert 3 not in drawn, "what the model excludes stays excluded"


def test_log_probabilities_are_those_of_the_logits_as_they_are() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        logits = LOGITS.to(dtype)
        draw = Draw(checked_settings(0.3, 2, 0.9, 3.0), seeded(0), torch.tensor([[0], [3]]), logprobs=True)
        token, largest, logprob = draw(logits)
        expected = torch.log_softmax(logits.double(), dim=-1).gather(-1, token).float()
        assert logprob.dtype == torch.float32 and logprob.shape == largest.shape == (2, 1)
        torch.testing.assert_close(logprob, expected)


@pytest.mark.parametrize("n_tokens", [3, 40, 5000])
def test_a_row_with_its_own_generator_is_drawn_as_alone(n_tokens) -> None:
    logits = torch.randn(5, n_tokens, generator=seeded(9))
    for options in ({}, {"top_k": 3}, {"top_p": 0.5, "temperature": 0.7}):
        together = next_token(logits, generator=[seeded(i) for i in range(5)], **options)
        each = [next_token(logits[i : i + 1], generator=seeded(i), **options) for i in range(5)]
        assert torch.equal(together, torch.cat(each))


def test_wrong_generators_are_named() -> None:
    one = seeded(0)
    for generator, said in (
        (3, "generator: expected a torch.Generator or a list of them, got int"),
        ([one], "generator: expected one, or 2, one for each row; got 1"),
        ([one, 5], "generator: expected a list of torch.Generators, got a int in it"),
        ([one, one], "generator: one is in the list twice"),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            checked_generators(generator, 2)
    assert checked_generators((one, None), 2) == [one, None] and checked_generators(None, 2) is None


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("nan"), float("inf"), True, "2", None])
def test_a_wrong_penalty_is_named(penalty) -> None:
    with pytest.raises(ValueError, match=r"^repetition_penalty: expected a number above 0, got"):
        checked_settings(repetition_penalty=penalty)
    with pytest.raises(ValueError, match=r"^context: is missing"):
        next_token(LOGITS, repetition_penalty=2.0)
