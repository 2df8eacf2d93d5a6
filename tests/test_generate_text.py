"""Text in, text out: what a sample's text is, where it ends, and what a layout asks for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt import GPT, GPTConfig
from fastgpt.baselines import Bigram
from fastgpt.data.completions import end_token
from fastgpt.generate_text import SIDE_BY_SIDE, Sample, prompt_tokens, stream_text
from fastgpt.tokenizer import BPETokenizer, CharTokenizer

TEXT = "to be, or not to be: that is the question.\nnaïve 日本語 🎉\n" * 20
CHARS, BPE = CharTokenizer.train(TEXT), BPETokenizer.train(TEXT, 290)
SMALL_BPE = BPETokenizer.train("ab bc ca 🎉a" * 9, 264)


def gpt(tokenizer, layout: str = "blocks") -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=16))
    model.tokenizer, model.layout = tokenizer, layout
    return model


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recites:
    """A model for `stream`, which continues every row by one text, whatever it is asked."""

    training, context_size, cfg = False, None, GPTConfig(is_causal=True)

    def __init__(self, tokenizer, ids: list[int]) -> None:
        self.ids, self.vocab_size, self.n = ids, tokenizer.vocab_size, 0

    def new_cache(self, batch_size: int) -> None:
        return None

    def next_logits(self, idx, cache=None):
        logits = torch.zeros(idx.shape[0], self.vocab_size)
        logits[:, self.ids[self.n]] = 1e9
        self.n += 1
        return logits


@pytest.mark.parametrize("tokenizer", [CHARS, BPE], ids=["char", "bpe"])
def test_the_text_is_that_of_the_tokens(tokenizer):
    model = gpt(tokenizer)
    idx = torch.tensor([tokenizer.encode("to be")])
    tokens = model.generate(idx, 40, temperature=0.7, generator=seeded())
    text = model.generate_text("to be", 40, temperature=0.7, generator=seeded())
    assert text == tokenizer.decode(tokens[0]) and text.startswith("to be")


@given(text=st.text("abc🎉", max_size=30), stop=st.text("abc🎉", min_size=1, max_size=4), tokenizer=st.integers(0, 1))
def test_a_text_ends_before_the_stop_wherever_tokens_are_cut(text, stop, tokenizer):
    """A token is a character, a part of one, or several."""
    tokenizer = (SMALL_BPE, CharTokenizer("abc🎉"))[tokenizer]
    sample, shown = Sample(0, tokenizer, stop, None), ""
    for token in tokenizer.encode(text):
        shown += sample.push(token)
        assert text.partition(stop)[0].startswith(shown), "what may be the stop's beginning is held back"
    shown += sample.finish()
    assert shown == text.partition(stop)[0]
    assert sample.ended and sample.push(0) == sample.finish() == ""


def up_to_the_first(text: str, stops: list[str]) -> str:
    """By definition: read one character after the other, until what was read ends with a stop text."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@given(
    text=st.text("abc🎉", max_size=30),
    stops=st.lists(st.text("abc🎉", min_size=1, max_size=4), max_size=4),
    tokenizer=st.integers(0, 1),
)
def test_of_several_stops_the_first_that_is_complete_ends_the_text(text, stops, tokenizer):
    tokenizer = (SMALL_BPE, CharTokenizer("abc🎉"))[tokenizer]
    sample, shown, expected = Sample(0, tokenizer, stops, None), "", up_to_the_first(text, stops)
    for token in tokenizer.encode(text):
        shown += sample.push(token)
        assert expected.startswith(shown), "what may be the beginning of a stop is held back"
    assert shown + sample.finish() == expected


def test_stops_that_are_parts_of_each_other():
    for stops, expected in (
        (["be,", "be"], "to "),
        (["o b", " be, or"], "t"),
        (["e, or", "be, or"], "to "),
        (["not be", "be, on"], "to be, or not"),
        ([], "to be, or not"),
    ):
        model = Recites(CHARS, CHARS.encode("to be, or not"))
        assert (
            "".join(text for _, text in stream_text(model, CHARS, "t", 13, stop=[*stops, "🎉"] if stops else stops))
            == expected
        )


PROMPTS = ["to be", "n", "or not to be: that is", "the question", "to", "be", "q", "that", "is", "日本語 🎉"]


@pytest.mark.parametrize("tokenizer", [CHARS, BPE], ids=["char", "bpe"])
def test_each_of_several_prompts_goes_on_as_it_would_alone(tokenizer):
    """More prompts than are drawn side by side, each with a generator of its own, and most with an end of their own."""
    model = gpt(tokenizer)
    options = {"temperature": 0.9, "repetition_penalty": 1.1, "stop": ["o", "be", "\n"]}
    found = model.generate_text(PROMPTS, 40, **options, generator=[seeded(i) for i in range(len(PROMPTS))])
    alone = [model.generate_text(text, 40, **options, generator=seeded(i)) for i, text in enumerate(PROMPTS)]
    assert found == alone and len(PROMPTS) > SIDE_BY_SIDE
    assert len({len(text) - len(prompt) for text, prompt in zip(found, PROMPTS, strict=True)}) > 2


def test_one_generator_for_several_prompts_makes_them_repeatable_whatever_ends_first():
    model = gpt(CHARS)
    whole = model.generate_text(PROMPTS, 30, generator=seeded())
    assert whole == model.generate_text(PROMPTS, 30, generator=seeded())
    cut = model.generate_text(PROMPTS, 30, generator=seeded(), stop="o")
    for prompt, text, shorter in zip(PROMPTS, whole, cut, strict=True):
        assert shorter == prompt + text.removeprefix(prompt).partition("o")[0]
    assert model.generate_text(["to", "be"], 0) == ["to", "be"]
    assert model.generate_text(("to",), 5, generator=seeded()) == [model.generate_text("to", 5, generator=seeded())]


def test_samples_of_several_prompts_are_numbered_in_their_order():
    model, texts = gpt(CHARS), [""] * 6
    generators = [seeded(i) for i in range(6)]
    for number, text in stream_text(model, CHARS, ["to", "be", "or"], 9, num_samples=2, generator=generators):
        texts[number] += text
    expected = [model.generate_text(["to", "be", "or"][i // 2], 9, generator=seeded(i)) for i in range(6)]
    assert texts == [text[2:] for text in expected]


def test_a_text_that_has_ended_costs_no_more(monkeypatch):
    model, asked = gpt(CHARS), []
    next_logits = GPT.next_logits

    def seen(self, idx, cache=None):
        asked.append(len(idx))
        return next_logits(self, idx, cache)

    monkeypatch.setattr(GPT, "next_logits", seen)
    options = {"temperature": 0.9, "stop": ["o", "be"]}
    model.generate_text(PROMPTS[:5], 40, **options, generator=[seeded(i) for i in range(5)])
    together = sum(asked)
    asked.clear()
    for i, prompt in enumerate(PROMPTS[:5]):
        model.generate_text(prompt, 40, **options, generator=seeded(i))
    assert together == sum(asked) < 5 * 40, "tokens that the model has computed"


def test_names_after_several_prompts():
    model = gpt(CHARS, "names")
    found = model.generate_text(["be", "to"], 5, temperature=0.0)
    assert found == [model.generate_text(prompt, 5, temperature=0.0) for prompt in ("be", "to")]


def test_a_sample_that_has_ended_draws_no_more_tokens():
    for tokenizer in (CHARS, BPE):
        model = Recites(tokenizer, tokenizer.encode("to be or not"))
        assert "".join(text for _, text in stream_text(model, tokenizer, "t", 9, stop=" be")) == "to"
        assert model.n <= len(tokenizer.encode("to be"))


def test_samples_of_a_batch_end_each_for_itself():
    model, texts = gpt(CHARS), ["", "", ""]
    idx = torch.tensor([CHARS.encode("to")] * 3)
    rows = model.generate(idx, 60, generator=seeded())
    pieces = list(stream_text(model, CHARS, "to", 60, num_samples=3, stop="o", generator=seeded()))
    for number, text in pieces:
        texts[number] += text
    assert texts == [CHARS.decode(row[2:]).partition("o")[0] for row in rows]
    assert len(set(map(len, texts))) > 1, "they do not end at the same time"


def test_a_model_of_names_starts_at_a_boundary():
    assert CHARS.decode(prompt_tokens(CHARS, "be\nto", "names")[0]) == "\nto"
    assert CHARS.decode(prompt_tokens(CHARS, "be\r\nto\rbe")[0]) == "be\nto\nbe"
    pieces = list(stream_text(gpt(CHARS, "names"), CHARS, "be", 30, layout="names", num_samples=2, generator=seeded()))
    assert [number for number, _ in pieces] == [0] * 30 + [1] * 30, "names are drawn one sample after the other"
    assert gpt(CHARS, "names").generate_text("be", 5, cuda_graph=False).startswith("be")
    with pytest.raises(ValueError, match="cuda_graph: a graph belongs to one text"):
        gpt(CHARS, "names").generate_text("be", 5, cuda_graph=True)


def test_a_completion_ends_by_itself():
    tokenizer = CharTokenizer.train(TEXT, with_end=True)
    ids = [*tokenizer.encode("be"), end_token(tokenizer), *tokenizer.encode("not")]
    model = Recites(tokenizer, ids)
    assert list(stream_text(model, tokenizer, "to", 9, layout="completions")) == [(0, "b"), (0, "e")]
    assert model.n == 3


def test_a_model_may_have_more_tokens_than_its_tokenizer():
    end_of_a_character = BPE.encode("🎉")[:1]
    model = Recites(BPE, [*end_of_a_character, BPE.vocab_size + 1, *BPE.encode("to")])
    model.vocab_size += 2
    assert "".join(text for _, text in stream_text(model, BPE, "t", len(model.ids))) == "��to"


def test_a_bigram_has_text_too():
    model = Bigram(GPTConfig(vocab_size=CHARS.vocab_size))
    model.tokenizer = CHARS
    assert len(model.generate_text("to", 8)) == 10


def test_what_cannot_be_continued_is_named():
    model = gpt(CHARS)
    for options, message in (
        ({"prompt": ""}, "prompt: is empty"),
        ({"prompt": "tö"}, "prompt: character 'ö' at position 1"),
        ({"prompt": "t", "stop": ""}, "stop: is empty"),
        ({"prompt": "t", "stop": "ö"}, "stop: character 'ö' at position 0"),
        ({"prompt": "t", "top_k": 0}, "top_k: expected"),
        ({"prompt": 5}, "prompt: expected a text or a list of texts, got int"),
        ({"prompt": ["t", 5]}, "prompt: expected texts, got int"),
        ({"prompt": []}, "prompt: there is none; give at least one text"),
        ({"prompt": ["t", ""]}, "prompt: is empty"),
        ({"prompt": ["t", "o"], "top_k": 0}, "top_k: expected"),
        ({"prompt": ["t", "o"], "stride": 17}, "stride: expected at most 16"),
        ({"prompt": ["t", "o"], "max_new_tokens": -1}, "max_new_tokens: expected"),
        ({"prompt": ["t", "o"], "generator": [seeded()]}, "generator: expected one, or 2, one for each row; got 1"),
        ({"prompt": ["t", "o"], "cuda_graph": True}, "cuda_graph: a graph belongs to texts of one length"),
        ({"prompt": "t", "stop": 5}, "stop: expected a text or a list of texts, got int"),
        ({"prompt": "t", "stop": ["o", 5]}, "stop: expected texts, got int"),
        ({"prompt": "t", "stop": ["o", ""]}, "stop: is empty"),
        ({"prompt": "t", "stop": ["o", "ö"]}, "stop: character 'ö' at position 0"),
        ({"prompt": "t", "return_logprobs": True}, "return_logprobs: belongs to token ids, not to texts"),
        ({"prompt": "t", "attention_mask": None}, "attention_mask: belongs to token ids, not to texts"),
        ({"prompt": "t", "repetition_penalty": -1}, "repetition_penalty: expected a number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate_text(**options)
    with pytest.raises(ValueError, match="num_samples: expected an integer of at least 1, got 0"):
        stream_text(model, CHARS, "t", 4, num_samples=0)
    with pytest.raises(TypeError, match="num_samples"):
        model.generate_text("t", num_samples=2)
    model.tokenizer = None
    with pytest.raises(ValueError, match=r"model\.tokenizer: is None, and text needs one; fastgpt\.load"):
        model.generate_text("t")
