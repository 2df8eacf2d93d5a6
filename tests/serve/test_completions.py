"""What a request of /v1/completions may ask for, and how tokens are named in its answer."""

from __future__ import annotations

import pytest
import torch

from fastgpt.generate_batch import Drawn
from fastgpt.serve.completions import Answer, Limits, echoed, read, score
from fastgpt.serve.engine import Token
from fastgpt.serve.errors import ApiError
from fastgpt.tokenizer import BPETokenizer
from served_models import NAME, TOKENIZER, small_model

LIMITS = Limits(NAME, context_size=32, max_tokens=50, capacity=12)


def asked(layout: str = "blocks", tokenizer=TOKENIZER, **fields):
    return read({"prompt": "the cat", **fields}, LIMITS, tokenizer, layout)


def test_what_is_not_said_is_as_in_openais():
    got = asked()
    assert (got.n, got.max_tokens, got.logprobs, got.echo, got.is_stream, got.stops) == (1, 16, None, False, False, [])
    assert got.settings["temperature"] == 1.0 and got.settings["top_p"] is None
    assert asked(max_tokens=None, stop=None, seed=None, n=None, temperature=None).max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [("the", ["the"]), (["the", "cat"], ["the", "cat"]), (TOKENIZER.encode("mat"), ["mat"]),
     ([TOKENIZER.encode("mat"), TOKENIZER.encode("on")], ["mat", "on"])],
)  # fmt: skip
def test_a_prompt_is_a_text_or_tokens_or_several_of_them(prompt, shown):
    assert asked(prompt=prompt).shown == shown
    assert asked(prompt=prompt).n_prompt_tokens == len("".join(shown))


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "is empty"),
        ({"prompt": None}, "prompt", "is empty"),
        ({"prompt": []}, "prompt", "is empty"),
        ({"prompt": [[]]}, "prompt", "is empty"),
        ({"prompt": 5}, "prompt", "a number"),
        ({"prompt": {"a": 1}}, "prompt", "an object"),
        ({"prompt": [1, "a"]}, "prompt", "integer"),
        ({"prompt": [1.5]}, "prompt", "integer"),
        ({"prompt": [True]}, "prompt", "integer"),
        ({"prompt": [-1]}, "prompt", "at least 0"),
        ({"prompt": [10**30]}, "prompt", "below"),
        ({"prompt": "a dog"}, "prompt", "'d'"),
        ({"prompt": "\ud800"}, "prompt", "ud800"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 51}, "max_tokens", "at most 50"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"temperature": -0.1}, "temperature", "at least 0"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": 10**400}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "(0, 1]"),
        ({"top_p": 1.1}, "top_p", "(0, 1]"),
        ({"top_k": 0}, "top_k", "at least 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 13}, "n", "12"),
        ({"n": 129}, "n", "at most 128"),
        ({"best_of": 2}, "best_of", "does not have it"),
        ({"stop": 5}, "stop", "string"),
        ({"stop": ["a", 5]}, "stop", "string"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"logprobs": -1}, "logprobs", "at least 0"),
        ({"logprobs": 21}, "logprobs", "at most 20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"echo": 1}, "echo", "true or false"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": []}, "stream_options", "an object"),
        ({"suffix": "end"}, "suffix", "does not have it"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "does not have it"),
        ({"presence_penalty": 0.5}, "presence_penalty", "does not have it"),
        ({"frequency_penalty": -1}, "frequency_penalty", "does not have it"),
        ({"max_new_tokens": 5}, "max_new_tokens", "no such parameter"),
        ({"model": 5}, "model", "a string"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(fields, param, words):
    with pytest.raises(ApiError) as error:
        asked(**fields)
    assert error.value.status == 400 and error.value.param == param
    assert words in error.value.message and param in error.value.message


def test_a_body_that_is_no_object_is_refused():
    for body in ([], "text", 5, None):
        with pytest.raises(ApiError, match="expected an object"):
            read(body, LIMITS, TOKENIZER, "blocks")


def test_another_model_is_not_found():
    with pytest.raises(ApiError) as error:
        asked(model="dogs")
    assert (error.value.status, error.value.code, error.value.param) == (404, "model_not_found", "model")


def test_a_prompt_that_does_not_fit_has_openais_code():
    assert asked(prompt="t" * 32).n_prompt_tokens == 32
    with pytest.raises(ApiError) as error:
        asked(prompt="t" * 33)
    assert error.value.code == "context_length_exceeded" and "33" in error.value.message


def test_an_empty_prompt_begins_a_text_where_the_tokenizer_has_a_token_for_it():
    tokenizer = type(TOKENIZER).train("the cat", with_end=True)
    assert asked(prompt="", tokenizer=tokenizer).prompts == [[tokenizer.end_of_text]]


def test_a_model_of_names_goes_on_with_the_last_line():
    assert asked(layout="names", prompt="mat\nca").prompts == [TOKENIZER.encode("\nca")]


def test_zero_tokens_are_for_the_scores_of_a_prompt():
    assert asked(max_tokens=0, echo=True, logprobs=1).max_tokens == 0


def test_the_scores_of_a_prompt_are_the_models():
    model, prompt = small_model(), TOKENIZER.encode("the cat")
    scores = score(model, prompt, 3)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([prompt]))[0][0].double(), -1)
    assert scores[0] == Drawn(prompt[0])
    for place, (drawn, token) in enumerate(zip(scores[1:], prompt[1:], strict=True)):
        assert drawn.token == token and drawn.logprob == pytest.approx(float(expected[place, token]), abs=1e-5)
        assert [i for i, _ in drawn.top] == expected[place].topk(3).indices.tolist()
    assert [token.offset for token in echoed(prompt, scores, TOKENIZER)] == list(range(7))


def test_tokens_that_are_parts_of_a_character_are_named_by_their_bytes():
    tokenizer = BPETokenizer.train("é" * 3, 256)
    answer = Answer(asked(logprobs=2), NAME, tokenizer)
    first, second = tokenizer.encode("é")
    assert answer.name(first) == "bytes:\\xc3" and answer.name(second) == "bytes:\\xa9"
    assert answer.name(tokenizer.vocab_size) == "\ufffd"
    got = answer.choice(0, "é", [Token(Drawn(first, -1.0, [(first, -1.0)]), 0)], None)
    assert got["logprobs"]["top_logprobs"] == [{"bytes:\\xc3": -1.0}]


def test_logprobs_are_null_where_they_were_not_asked_for():
    assert Answer(asked(), NAME, TOKENIZER).choice(0, "a", [Token(Drawn(0), 0)], "stop")["logprobs"] is None
