"""Options of generation: left-padded prompts, the repetition penalty and log-probabilities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig
from fastgpt.baselines import build_model
from fastgpt.generate import pad_left, stream, stream_names
from stand_in_graph import StandIn

LIMIT = 16
CONFIG = GPTConfig(vocab_size=29, block_size=LIMIT, n_layer=2, n_head=2, n_embd=24, dropout=0.5)
PROMPTS = [[1, 2, 3], [4], list(range(5, 15)), list(range(29)), [5, 5]]


def made(kind: str = "gpt"):
    model = build_model(CONFIG, 3, kind)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)  # untrained logits are too flat to tell two contexts apart
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return made()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeds(n: int = len(PROMPTS)) -> list[torch.Generator]:
    return [seeded(i) for i in range(n)]


@pytest.mark.parametrize("kind", ["gpt", "positional-bigram", "gru"])
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"top_k": 9}, {"top_p": 0.9, "repetition_penalty": 1.4}, {"use_cache": False}],
    ids=str,
)
def test_padded_rows_go_on_as_their_prompts_alone(kind, options) -> None:
    model, (idx, mask) = made(kind), pad_left(PROMPTS, pad=7)
    for dtype in (torch.bool, torch.int64, torch.uint8):
        steps = stream(model, idx, 20, generator=seeds(), attention_mask=mask.to(dtype), **options)
        found = torch.cat(list(steps), dim=1)
        for row, prompt, own in zip(found, PROMPTS, seeds(), strict=True):
            expected = torch.cat([*stream(model, torch.tensor([prompt]), 20, generator=own, **options)], dim=1)
            assert torch.equal(row, expected[0])
    assert len(found.unique()) > 3, "the model must not repeat one token, or this shows nothing"


def test_the_padding_has_no_effect_and_stays_in_the_result(model) -> None:
    found = []
    for pad in (0, 28):
        idx, mask = pad_left(PROMPTS, pad)
        out = model.generate(idx.int(), 6, generator=seeds(), attention_mask=mask, repetition_penalty=2.0)
        assert out.dtype == torch.int32 and out.shape == (5, 29 + 6) and torch.equal(out[:, :29], idx)
        found.append(out[:, 29:])
    assert torch.equal(*found)


def test_rows_of_one_length_are_those_without_a_mask(model) -> None:
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    mask = torch.ones_like(idx)
    assert torch.equal(
        model.generate(idx, 9, generator=seeded(1)), model.generate(idx, 9, generator=seeded(1), attention_mask=mask)
    )
    one = model.generate(torch.tensor([[9, 1, 2]]), 9, generator=seeded(1), attention_mask=torch.tensor([[0, 1, 1]]))
    assert torch.equal(one[:, 3:], model.generate(torch.tensor([[1, 2]]), 9, generator=seeded(1))[:, 2:])


def test_one_generator_for_padded_rows_seeds_one_for_each(model) -> None:
    idx, mask = pad_left(PROMPTS)
    several = model.generate(idx, 9, generator=seeded(1), attention_mask=mask)
    assert torch.equal(several, model.generate(idx, 9, generator=seeded(1), attention_mask=mask))
    torch.manual_seed(4)
    of_pytorch = model.generate(idx, 9, attention_mask=mask)
    torch.manual_seed(4)
    assert torch.equal(of_pytorch, model.generate(idx, 9, attention_mask=mask)) and not torch.equal(several, of_pytorch)


def test_a_row_with_its_own_generator_does_not_depend_on_the_others(model) -> None:
    idx = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3]])
    together = model.generate(idx, 20, generator=seeds(3))
    for i in range(3):
        assert torch.equal(together[i : i + 1], model.generate(idx[i : i + 1], 20, generator=seeded(i)))


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ([[1, 1, 0], [1, 1, 1]], "row 0 is padded on the right"),
        ([[1, 1, 1], [1, 0, 1]], "row 1 has padding between its tokens; pad on the left alone"),
        ([[0, 0, 0], [1, 1, 1]], "row 0 is padding alone"),
        ([[1, 1, 1], [0, 2, 1]], "expected bools, or the integers 0 and 1"),
        ([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]], "expected bools, or the integers 0 and 1"),
        ([[1, 1, 1]], r"expected the shape of idx \(2, 3\), got \(1, 3\)"),
        ([[0, 1], [1, 1]], r"expected the shape of idx \(2, 3\), got \(2, 2\)"),
    ],
)
def test_a_wrong_mask_is_named(model, mask, said) -> None:
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match=f"^attention_mask: {said}"):
        stream(model, idx, 1, attention_mask=torch.tensor(mask))
    with pytest.raises(ValueError, match=r"^attention_mask: expected the shape of idx .* got list"):
        stream(model, idx, 1, attention_mask=mask)


def test_wrong_prompts_are_named() -> None:
    for prompts, said in (
        ([], "there are none; give at least one"),
        ([[1], []], "expected lists of at least one id, or tensors .T,., got another at 1"),
        ([[[1]]], "expected lists of at least one id"),
        ([[0.5]], "expected lists of at least one id"),
    ):
        with pytest.raises(ValueError, match=f"^prompts: {said}"):
            pad_left(prompts)
    idx, mask = pad_left([torch.tensor([3, 4], dtype=torch.int32), [5]], pad=9)
    assert idx.tolist() == [[3, 4], [9, 5]] and mask.tolist() == [[True, True], [False, True]]


@torch.no_grad()
def test_log_probabilities_are_those_of_the_text_at_once(model) -> None:
    """Before temperature, top_k, top_p and the penalty; with a cache, by the exact window, and beyond padding."""
    idx, mask = pad_left(PROMPTS)
    options = {"temperature": 0.5, "top_k": 4, "repetition_penalty": 1.5, "return_logprobs": True}
    out, logprobs = model.generate(idx, 8, generator=seeds(), attention_mask=mask, **options)
    alone = [model.generate(torch.tensor([p]), 8, generator=seeded(i), **options) for i, p in enumerate(PROMPTS)]
    model.eval()
    for row, found, prompt, (one, own) in zip(out[:, -8:].tolist(), logprobs, PROMPTS, alone, strict=True):
        assert own.shape == (1, 8) and own.dtype == found.dtype == torch.float32 and one[0, -8:].tolist() == row
        for n in range(8):
            context = torch.tensor([[*prompt, *row[:n]][-LIMIT:]])
            expected = torch.log_softmax(model(context)[0][0, -1], dim=-1)[row[n]]
            torch.testing.assert_close(found[n], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(own[0, n], expected, rtol=1e-4, atol=1e-4)
    model.train()
    tokens, nothing = model.generate(idx, 0, return_logprobs=True)
    assert torch.equal(tokens, idx) and nothing.shape == (5, 0) and nothing.dtype == torch.float32
    assert all(
        len(pair) == 2 and pair[0].shape == pair[1].shape == (5, 1)
        for pair in stream(model, idx, 2, return_logprobs=True)
    )


@torch.no_grad()
def by_definition(model, text: Tensor, n: int, penalty: float) -> Tensor:
    model.eval()
    for _ in range(n):
        logits = model(text[:, -LIMIT:])[0][:, -1].clone()
        for row, tokens in zip(logits, text.tolist(), strict=True):
            for token in set(tokens):  # those that have left the window count, too
                row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    model.train()
    return text


@pytest.mark.parametrize("penalty", [1.0, 1.3, 5.0, 0.7])
def test_the_penalty_counts_the_tokens_of_the_whole_text(model, penalty) -> None:
    prompt = torch.tensor([[1, 2, 3], [4, 4, 28]])
    expected = by_definition(model, prompt, 30, penalty)
    for use_cache in (True, False):
        steps = stream(model, prompt, 30, 0.0, use_cache=use_cache, repetition_penalty=penalty)
        assert torch.equal(torch.cat([prompt, *steps], dim=1), expected)
    assert torch.equal(model.generate(prompt, 30, 0.0), expected) == (penalty == 1.0)


def test_a_name_is_penalised_for_its_own_tokens_alone(model) -> None:
    options, start = {"temperature": 0.0, "repetition_penalty": 1.5}, torch.tensor([[1]])
    boundary = int(model.generate(start, 3, **options)[0, -1])
    text = torch.cat([*stream_names(model, start, 20, boundary, **options)], dim=1)
    end = text[0].tolist().index(boundary) + 1
    assert end <= 3
    again = [*stream_names(model, text[:, end - 1 : end], 20 - end, boundary, **options)]
    assert torch.equal(text[:, end:], torch.cat(again, dim=1))


def test_a_graph_has_log_probabilities_and_refuses_the_rest(use_recorder, model) -> None:
    stand_in, idx = use_recorder(StandIn()), torch.tensor([[1, 2], [3, 4]])
    expected = model.generate(idx, 20, generator=seeded(1), return_logprobs=True)
    found = model.generate(idx, 20, generator=seeded(1), return_logprobs=True, cuda_graph=True)
    assert stand_in.replays == 14 and torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    padded, mask = pad_left(PROMPTS)
    for prompt, options, said in (
        (idx, {"repetition_penalty": 1.1}, "repetition_penalty: a CUDA graph does not keep the tokens so far"),
        (idx, {"generator": seeds(2)}, "generator: a CUDA graph draws from one generator"),
        (padded, {"attention_mask": mask}, "cuda_graph: a graph belongs to rows of one length"),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            model.generate(prompt, 1, cuda_graph=True, **options)
