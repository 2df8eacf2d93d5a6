"""A stride in generation: the tokens of the contexts that it names, from the cache, without one and by a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig
from fastgpt.baselines import build_model
from fastgpt.cli import main
from fastgpt.generate import stream, stream_names
from stand_in_graph import StandIn

LIMIT = 16
CONFIG = GPTConfig(vocab_size=29, block_size=LIMIT, n_layer=2, n_head=2, n_embd=24)


def made(kind: str = "gpt"):
    model = build_model(CONFIG, 3, kind).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)  # untrained logits are too flat to tell two contexts apart
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return made()


def prompt_of(n_tokens: int, batch_size: int = 1) -> Tensor:
    return torch.randint(29, (batch_size, n_tokens), generator=torch.Generator().manual_seed(n_tokens))


@torch.no_grad()
def by_definition(model: GPT, text: Tensor, n: int, stride: int) -> Tensor:
    """Greedy generation; each token from all of its context at once."""
    first = max(0, text.shape[1] - LIMIT)  # of the tokens in the context
    for _ in range(n):
        if text.shape[1] - first > LIMIT:
            first += stride
        logits, _ = model(text[:, first:])
        text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return text


@pytest.mark.parametrize("prompt_tokens", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("stride", [1, 5, 8, 15, 16])
def test_the_tokens_are_those_of_the_contexts_by_definition(model, prompt_tokens, stride):
    for batch_size in (1, 3):
        prompt = prompt_of(prompt_tokens, batch_size)
        expected = by_definition(model, prompt, 40, stride)
        assert torch.equal(model.generate(prompt, 40, temperature=0.0, stride=stride), expected)
        without = stream(model, prompt, 40, temperature=0.0, stride=stride, use_cache=False)
        assert torch.equal(torch.cat([prompt, *without], dim=1), expected)
        if stride > 1:
            default = model.generate(prompt, 40, temperature=0.0)
            same = max(prompt_tokens, LIMIT) + 1 - prompt_tokens  # tokens before the first drop
            assert torch.equal(default[:, : prompt_tokens + same], expected[:, : prompt_tokens + same])
            assert not torch.equal(default, expected), "the contexts must differ, or this shows nothing"
        else:
            assert torch.equal(expected, model.generate(prompt, 40, temperature=0.0))


def test_each_window_is_computed_once_and_the_rest_from_the_cache(model, monkeypatch):
    asked = []
    next_logits = GPT.next_logits

    def seen(self, idx, cache=None):
        asked.append((None if cache is None else cache.length, idx.shape[1]))
        return next_logits(self, idx, cache)

    monkeypatch.setattr(GPT, "next_logits", seen)
    model.generate(prompt_of(14), 9, stride=6)
    assert asked == [(0, 14), (14, 1), (15, 1), (0, 11), *((n, 1) for n in range(11, 16))]
    asked.clear()
    model.generate(prompt_of(20), 3, stride=6)
    assert asked == [(0, 16), (0, 11), (11, 1)]
    asked.clear()
    model.generate(prompt_of(14), 5)
    assert asked == [(0, 14), (14, 1), (15, 1), (None, 16), (None, 16)], "the default computes whole windows"


def test_a_model_that_is_called_as_a_whole_sees_the_same_contexts(nothing_said_yet):
    model = made()
    expected = by_definition(model, prompt_of(10), 30, 6)
    model.register_forward_hook(lambda module, inputs, output: None)
    with pytest.warns(UserWarning, match="without a cache"):
        assert torch.equal(model.generate(prompt_of(10), 30, temperature=0.0, stride=6), expected)


def test_a_graph_serves_the_tokens_after_each_window(use_recorder, model):
    stand_in, prompt = use_recorder(StandIn()), prompt_of(14)
    expected = model.generate(prompt, 30, temperature=0.0, stride=6)
    assert torch.equal(model.generate(prompt, 30, temperature=0.0, stride=6, cuda_graph=True), expected)
    windows = 1 + 5  # of the prompt, and before the new tokens 4, 10, 16, 22 and 28
    assert (stand_in.recordings, stand_in.replays) == (1, 30 - windows)


def test_names_longer_than_the_context(model):
    boundary = 29  # which this model never draws, so that all is one name
    expected = by_definition(model, prompt_of(10), 30, 6)[:, 10:]
    options = {"temperature": 0.0, "stride": 6}
    assert torch.equal(torch.cat([*stream_names(model, prompt_of(10), 30, boundary, **options)], dim=1), expected)


@pytest.mark.parametrize(
    ("stride", "said"),
    [
        (0, "expected an integer of at least 1, got 0"),
        (-1, "expected an integer of at least 1, got -1"),
        (2.0, "expected an integer of at least 1, got 2.0"),
        (True, "expected an integer of at least 1, got True"),
        (17, "expected at most 16, the tokens of the model's context, got 17"),
    ],
)
def test_a_bad_stride_is_named(model, stride, said):
    with pytest.raises(ValueError, match=f"^stride: {said}$"):
        stream(model, prompt_of(3), 1, stride=stride)
    with pytest.raises(ValueError, match=f"^stride: {said}$"):
        stream_names(model, prompt_of(3), 1, 0, stride=stride)


@pytest.mark.parametrize("kind", ["rnn", "lstm"])
def test_a_recurrent_model_refuses_a_stride(kind):
    with pytest.raises(ValueError, match=r"^stride: this model reads a text of any length"):
        made(kind).generate(prompt_of(3), 1, stride=2)


def test_the_baselines_take_a_stride():
    model = made("positional-bigram")
    expected = by_definition(model, prompt_of(3), 30, 5)
    assert torch.equal(model.generate(prompt_of(3), 30, temperature=0.0, stride=5), expected)


def test_on_the_command_line(tmp_path, capsys):
    text, out = tmp_path / "text.txt", str(tmp_path / "out")
    text.write_text("All that is gold does not glitter, not all those who wander are lost.\n" * 30)
    sizes = "--max-steps 2 --block-size 8 --n-layer 1 --n-head 1 --n-embd 8 --batch-size 2 --device cpu".split()
    assert main(["train", "--data", str(text), "--out", out, *sizes]) == 0
    sample = ["sample", "--checkpoint", out, "--device", "cpu", "--max-new-tokens", "20", "--seed", "1", "--stride"]
    capsys.readouterr()
    assert main([*sample, "4"]) == 0
    assert len(capsys.readouterr().out) == 1 + 20 + 1
    assert main([*sample, "9"]) == 2
    assert "stride: expected at most 8, the tokens of the model's context, got 9" in capsys.readouterr().err
