"""Text in, text out: what a sample's text is, where it ends, and what a layout asks for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt import GPT, GPTConfig
from fastgpt.baselines import Bigram
from fastgpt.data.completions import end_token
from fastgpt.generate_text import _Sample, prompt_tokens, stream_text
from fastgpt.tokenizer import BPETokenizer, CharTokenizer

TEXT = "to be, or not to be: that is the question.\nnaïve 日本語 🎉\n" * 20
CHARS, BPE = CharTokenizer.train(TEXT), BPETokenizer.train(TEXT, 290)
SMALL_BPE = BPETokenizer.train("ab bc ca 🎉a" * 9, 264)


def gpt(tokenizer, layout: str = "blocks") -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=16))
    model.tokenizer, model.layout = tokenizer, layout
    return model


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


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
    sample, shown = _Sample(0, tokenizer, stop, None), ""
    for token in tokenizer.encode(text):
        shown += sample.push(token)
        assert text.partition(stop)[0].startswith(shown), "what may be the stop's beginning is held back"
    shown += sample.finish()
    assert shown == text.partition(stop)[0]
    assert sample.ended and sample.push(0) == sample.finish() == ""


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
        ({"prompt": 5}, "prompt: expected a text, got int"),
        ({"prompt": "t", "stop": ["o"]}, "stop: expected a text, got list"),
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
