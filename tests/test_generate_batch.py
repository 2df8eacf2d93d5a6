"""A batch of sequences that come and go: each gets the tokens that it gets alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt
from altered_models import IDX, OF_THE_MODEL, REPLACED, alterations
from altered_models import built as plain
from fastgpt import GPT, GPTConfig
from fastgpt.baselines import build_model
from fastgpt.draw import log_probabilities
from fastgpt.generate import stream
from fastgpt.generate_batch import Batch, Drawn

LIMIT = 16
CONFIG = GPTConfig(vocab_size=29, block_size=LIMIT, n_layer=2, n_head=2, n_embd=24, dropout=0.5)
KINDS = ("gpt", "bigram", "positional-bigram", "rnn", "lstm")


def made(kind: str = "gpt", cfg: GPTConfig = CONFIG):
    model = build_model(cfg, 3, kind)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)  # untrained logits are too flat to tell two contexts apart
    return model


MODELS = {kind: made(kind) for kind in KINDS}


def alone(model, tokens: list[int], n: int, seed: int, stride: int | None = None, **options) -> list[int]:
    steps = stream(model, torch.tensor([tokens]), n, generator=seeded(seed), stride=stride, **options)
    return [int(token) for token in steps]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


prompts = st.lists(st.integers(0, 28), min_size=1, max_size=LIMIT + 3)
ways = st.sampled_from(
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.8},
        {"repetition_penalty": 1.8},
        {"temperature": 0.0, "repetition_penalty": 0.6},
    ]
)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["gpt", "gpt", *KINDS]),
    size=st.integers(1, 10),
    stride=st.sampled_from([None, 5]),
    comings=st.lists(st.tuples(st.integers(0, 3), prompts, ways, st.integers(1, 24)), min_size=1, max_size=8),
    use_cache=st.sampled_from([True, True, False]),
)
def test_each_sequence_gets_the_tokens_that_it_gets_alone(kind, size, stride, comings, use_cache):
    """Sequences wait for some steps, come as soon as there is room, and leave after some tokens."""
    model = MODELS[kind]
    stride = None if model.context_size != LIMIT else stride
    batch = Batch(model, size, stride=stride, use_cache=use_cache)
    waiting = list(enumerate(comings))
    present: dict[int, tuple[int, list[int]]] = {}  # the slot's sequence and its new tokens
    finished = 0
    pause = 0
    while waiting or present:
        while waiting and batch.free and (pause >= waiting[0][1][0] or not present):
            number, (_, tokens, way, _) = waiting.pop(0)
            slot = batch.add(tokens, generator=seeded(number), **way)
            assert slot not in present
            present[slot] = number, []
            pause = 0
        pause += 1
        drawn = batch.step()
        assert drawn.keys() == present.keys()
        assert batch.free == size - len(present)
        for slot, result in drawn.items():
            number, new = present[slot]
            new.append(result.token)
            _, tokens, way, n = comings[number]
            if len(new) == n:
                assert new == alone(model, tokens, n, number, stride, **way)
                batch.remove(slot)
                del present[slot]
                finished += 1
    assert finished == len(comings) and batch.step() == {}


UNEQUAL = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]


def greedy(model, n: int = 4) -> list[list[int]]:
    """The new tokens of the prompts, of which the last one comes when two are drawn."""
    batch, found = Batch(model, 4), {}
    for step in range(n + 2):
        for tokens in UNEQUAL[:3] if step == 0 else UNEQUAL[3:] if step == 2 else []:
            found[batch.add(tokens, temperature=0.0)] = []
        for slot, result in batch.step().items():
            found[slot].append(result.token)
    return [found[slot][:n] for slot in range(4)]


# One computes in float64 alone, one for whole blocks alone, and one changes the tied head at each token that it embeds.
NOT_SERVED = "lm_head, quantised", "ln_f, over time and features", "token_embedding, {'max_norm': 0.5}"
ALTERED = [*alterations(), *(pytest.param(alter, id=n) for n, alter in REPLACED.items() if n not in NOT_SERVED)]
ALTERED += [pytest.param(alter, id=name) for name, alter in OF_THE_MODEL.items() if name != "another hidden"]


@pytest.mark.filterwarnings("ignore:fastgpt", "ignore:.*weight_norm", "ignore:.*spectral_norm")
@pytest.mark.parametrize("alter", ALTERED)
def test_an_altered_model_is_computed_by_its_modules(alter) -> None:
    torch.manual_seed(1)
    model = plain(alter).float().eval()
    for tokens, found in zip(UNEQUAL, greedy(model), strict=True):
        assert found == [int(token) for token in stream(model, torch.tensor([tokens]), 4, temperature=0.0)]


def test_a_model_with_other_parts_is_continued_row_by_row() -> None:
    """Attention and blocks of other classes know a cache of one length."""
    for path in ("blocks.0", "blocks.1.attn"):
        model = plain().float().eval()
        part = model.get_submodule(path)
        forward = type(part).forward

        def later(self, *args, forward=forward):
            cache = args[-1]
            assert cache is None or isinstance(cache.length, int)
            result = forward(self, *args)
            return (1.5 * result[0], result[1]) if isinstance(result, tuple) else 1.5 * result

        part.__class__ = type("OfItsOwn", (type(part),), {"forward": later})
        for tokens, found in zip(UNEQUAL, greedy(model), strict=True):
            assert found == [int(token) for token in stream(model, torch.tensor([tokens]), 4, temperature=0.0)]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_sequences_of_one_new_token_share_a_call(backend, monkeypatch) -> None:
    model, asked = made(), []
    next_logits = GPT.next_logits
    monkeypatch.setattr(
        GPT,
        "next_logits",
        lambda self, idx, cache=None: asked.append(tuple(idx.shape)) or next_logits(self, idx, cache),
    )
    with fastgpt.use_backend(backend):
        greedy(model)
    assert asked == [(1, 3), (1, 5), (1, 1), (3, 1), (1, 2), (3, 1), (4, 1), (4, 1), (4, 1)]


@pytest.mark.parametrize("n", [9, 16, 17])
def test_more_sequences_than_one_op_computes(n) -> None:
    model, batch = MODELS["gpt"], Batch(MODELS["gpt"], n)
    prompts = [[1 + i, *range(i % 5)] for i in range(n)]
    found = {batch.add(tokens, generator=seeded(i)): [] for i, tokens in enumerate(prompts)}
    for _ in range(8):
        for slot, result in batch.step().items():
            found[slot].append(result.token)
    assert [found[i] for i in range(n)] == [alone(model, tokens, 8, i) for i, tokens in enumerate(prompts)]


@torch.no_grad()
def test_log_probabilities_are_those_of_the_model() -> None:
    model = made().eval()
    batch = Batch(model, 3)
    ways = [{"logprobs": 0}, {"logprobs": 3, "temperature": 0.5, "top_k": 2, "repetition_penalty": 2.0}, {}]
    texts = [[1, 2], [3, 4, 5], [6]]
    for tokens, way in zip(texts, ways, strict=True):
        batch.add(tokens, generator=seeded(1), **way)
    for _ in range(4):
        expected = [log_probabilities(model(torch.tensor([text]))[0][:, -1])[0] for text in texts]
        for slot, result in batch.step().items():
            likeliest = expected[slot].topk(ways[slot].get("logprobs", 0))
            assert [token for token, _ in result.top] == likeliest.indices.tolist()
            torch.testing.assert_close(torch.tensor([p for _, p in result.top]), likeliest.values, rtol=1e-4, atol=1e-4)
            if slot < 2:
                assert result.logprob == pytest.approx(float(expected[slot][result.token]), abs=1e-4)
            else:
                assert result == Drawn(result.token, None, [])
            texts[slot].append(result.token)
    assert len(batch.step()[1].top) == 3
    many = Batch(model, 1)
    many.add([1], logprobs=100)
    assert len(many.step()[0].top) == 29, "of all tokens, where there are fewer"


def test_dropout_is_off_and_the_mode_is_restored() -> None:
    model = made().train()
    batch = Batch(model, 2)
    slot = batch.add([1, 2, 3], temperature=0.0)
    found = [batch.step()[slot].token for _ in range(5)]
    assert model.training
    assert found == alone(model, [1, 2, 3], 5, 0, temperature=0.0)


def test_a_slot_that_held_nan_serves_the_next_sequence() -> None:
    model = made()
    with fastgpt.use_backend("torch"):  # whose attention masks what is behind a row
        batch = Batch(model, 2)
        batch.add([3, 4, 5, 6, 7], temperature=0.0)
        slot = batch.add([1, 2, 3, 4, 5], temperature=0.0)
        batch.step()
        batch.remove(slot)
        batch._rows.tensor[:, :, slot] = torch.nan
        assert batch.add([1, 2], temperature=0.0) == slot
        found = [batch.step()[slot].token for _ in range(3)]
        assert found == alone(model, [1, 2], 3, 0, temperature=0.0)


def test_a_model_that_gives_nan_is_named_with_slot_and_position() -> None:
    model = made()
    with torch.no_grad():
        model.position_embedding.weight[5] = torch.nan
    batch = Batch(model, 2)
    batch.add([7], temperature=0.0), batch.add([1, 2, 3, 4, 5], temperature=0.0)
    batch.step()
    with pytest.raises(ValueError, match=r"^model: its logits for position 6 of the sequence in slot 1: one is nan"):
        batch.step()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": []}, "tokens: the prompt is empty"),
        ({"tokens": "text"}, "tokens: expected a list of ids or a tensor (T,), got str"),
        ({"tokens": 3}, "tokens: expected a list of ids or a tensor (T,), got int"),
        ({"tokens": [1.0]}, "tokens: expected an integer, got 1.0"),
        ({"tokens": [True]}, "tokens: expected an integer, got True"),
        ({"tokens": [29]}, "tokens: expected ids in [0, 29), got 29"),
        ({"tokens": [3, -1]}, "tokens: expected ids in [0, 29), got -1"),
        ({"tokens": torch.zeros(1, 2, dtype=torch.int64)}, "tokens: expected ids (T,), int64, got (1, 2)"),
        ({"tokens": torch.zeros(2)}, "tokens: expected ids (T,), int64, got (2,) torch.float32"),
        ({"temperature": -1.0}, "temperature: expected"),
        ({"top_k": 0}, "top_k: expected"),
        ({"top_p": 1.5}, "top_p: expected"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a number above 0, got 0.0"),
        ({"generator": 3}, "generator: expected a torch.Generator, got int"),
        ({"logprobs": -1}, "logprobs: expected an integer of at least 0, got -1"),
        ({"logprobs": True}, "logprobs: expected an integer of at least 0, got True"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named_and_changes_nothing(options, said) -> None:
    batch = Batch(MODELS["gpt"], 1)
    with pytest.raises(ValueError) as raised:
        batch.add(**{"tokens": [1], **options})
    assert str(raised.value).startswith(said) and batch.free == 1 and batch.step() == {}


def test_wrong_uses_of_a_batch_are_named() -> None:
    model = MODELS["gpt"]
    for options, said in (
        ({"size": 0}, "size: expected an integer of at least 1"),
        ({"size": 1, "stride": 17}, "stride: expected at most 16"),
    ):
        with pytest.raises(ValueError, match=said):
            Batch(model, **options)
    batch = Batch(model, 1)
    slot = batch.add([1])
    with pytest.raises(ValueError, match=r"^size: all 1 slots are taken; remove a sequence first"):
        batch.add([1])
    with pytest.raises(ValueError, match=r"^slot: expected one of \[0\], in which there are sequences, got 1"):
        batch.remove(1)
    batch.remove(slot)
    with pytest.raises(ValueError, match=r"^slot: "):
        batch.remove(slot)
    with pytest.raises(ValueError, match="model: generation needs is_causal=True"):
        Batch(GPT(GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4, is_causal=False)), 1)


def test_tokens_may_be_tensors_and_of_any_integers() -> None:
    for tokens in (torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32), (1, 2), list(IDX[0, :2].numpy())):
        batch = Batch(MODELS["gpt"], 1)
        batch.add(tokens, temperature=0.0)
        assert batch.step()[0].token == alone(MODELS["gpt"], [int(t) for t in tokens], 1, 0, temperature=0.0)[0]
