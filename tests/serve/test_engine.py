"""The engine: texts that come and go, stop texts, a full queue, a client that goes away, a model that fails."""

from __future__ import annotations

import asyncio
import queue
import threading

import pytest
import torch

from fastgpt.generate import stream
from fastgpt.serve.engine import MOST_CALLS, Engine, Text
from fastgpt.serve.errors import ApiError
from served_models import TOKENIZER, small_model

SETTINGS = {"temperature": 1.0, "logprobs": 1}


class Reader:
    """A text, and what the engine delivers of it."""

    def __init__(self, prompt: str = "the", n: int = 12, seed: int = 1, stops=(), **settings) -> None:
        self.pieces: queue.Queue = queue.Queue()
        prompt_ids = TOKENIZER.encode(prompt)
        self.text = Text(prompt_ids, n, {**SETTINGS, **settings}, seed, list(stops), self.pieces.put)

    def read(self):
        """The text, its tokens, and why it ended."""
        text, tokens = "", []
        while True:
            piece = self.pieces.get(timeout=60)
            if piece.error is not None:
                raise piece.error
            text, tokens = text + piece.text, tokens + piece.tokens
            if piece.finish is not None:
                return text, tokens, piece.finish


@pytest.fixture
def engine():
    made = Engine(small_model(), TOKENIZER, size=3, queue=4)
    made.start()
    yield made
    made.stop()


def alone(prompt: str, n: int, seed: int) -> str:
    idx = torch.tensor([TOKENIZER.encode(prompt)])
    tokens = stream(small_model(), idx, n, generator=torch.Generator().manual_seed(seed))
    return TOKENIZER.decode([int(token) for token in tokens])


def test_texts_side_by_side_are_those_they_would_be_alone(engine):
    asked = [("the", 20, 1), ("on the mat", 7, 2), ("a", 40, 3), ("cat", 1, 4), ("sat on", 15, 5)]
    readers = [Reader(*each) for each in asked]
    for reader in readers:
        engine.submit([reader.text])
    for reader, each in zip(readers, asked, strict=True):
        text, tokens, finish = reader.read()
        assert text == alone(*each) and finish == "length"
        assert [token.offset for token in tokens] == list(range(each[1]))
        assert all(token.drawn.logprob <= 0 for token in tokens)


def test_a_stop_text_ends_a_text_and_is_not_part_of_it(engine):
    whole = alone("the", 40, 1)
    stop = whole[10:13]
    reader = Reader(n=40, stops=["#never#", stop])
    engine.submit([reader.text])
    text, tokens, finish = reader.read()
    assert (text, finish) == (whole.partition(stop)[0], "stop")
    assert len(tokens) == len(text)  # one token is one character here


def test_what_may_begin_a_stop_text_comes_once_it_is_certain(engine):
    whole = alone("the", 12, 1)
    reader = Reader(stops=[whole[-2:] + "x"])
    engine.submit([reader.text])
    text, tokens, finish = reader.read()
    assert (text, finish, len(tokens)) == (whole, "length", 12)


def test_more_texts_than_fit_are_refused_all_together(engine):
    together = [Reader(seed=seed).text for seed in range(8)]  # three are continued, four wait
    with pytest.raises(ApiError) as error:
        engine.submit(together)
    assert error.value.status == 429 and "of at most 7" in error.value.message
    engine.submit(together[:7])


def test_a_cancelled_text_gives_up_its_place(engine):
    long = [Reader(n=10**9, seed=seed) for seed in range(3)]
    engine.submit([reader.text for reader in long])
    waiting = Reader(n=3)
    engine.submit([waiting.text])
    long[0].pieces.get(timeout=60)
    assert waiting.pieces.empty()
    engine.cancel([long[0].text])
    assert waiting.read()[2] == "length"
    engine.cancel([reader.text for reader in long])


def test_a_text_that_is_cancelled_while_it_waits_never_comes(engine):
    long = [Reader(n=10**9, seed=seed) for seed in range(3)]
    engine.submit([reader.text for reader in long])
    gone, after = Reader(n=2), Reader(n=2)
    engine.submit([gone.text, after.text])
    engine.cancel([gone.text, long[0].text])
    after.read()
    assert gone.pieces.empty()
    engine.cancel([reader.text for reader in long])


def test_a_model_that_fails_fails_the_texts_and_goes_on(engine):
    head = engine._model.lm_head
    weight = head.weight.data.clone()
    head.weight.data.fill_(torch.nan)
    reader = Reader()
    engine.submit([reader.text])
    with pytest.raises(ValueError, match="logits"):
        reader.read()
    head.weight.data.copy_(weight)
    again = Reader(n=5)
    engine.submit([again.text])
    assert again.read()[0] == alone("the", 5, 1)


def test_a_text_that_cannot_be_read_fails_alone(engine, monkeypatch):
    broken, whole = Reader(), Reader(n=20)
    monkeypatch.setattr(broken.text, "push", lambda drawn: 1 // 0)
    engine.submit([broken.text, whole.text])
    with pytest.raises(ZeroDivisionError):
        broken.read()
    assert whole.read()[0] == alone("the", 20, 1)


def test_calls_run_on_the_thread_between_tokens(engine):
    async def ask():
        with pytest.raises(ZeroDivisionError):
            await engine.call(lambda: 1 // 0)
        return await engine.call(threading.current_thread)

    assert asyncio.run(ask()).name == "fastgpt engine"


def test_too_many_calls_are_refused(engine):
    release = threading.Event()

    async def ask():
        first = [asyncio.ensure_future(engine.call(release.wait)) for _ in range(MOST_CALLS + 2)]
        done, _ = await asyncio.wait(first, return_when=asyncio.FIRST_EXCEPTION)
        release.set()
        await asyncio.gather(*first, return_exceptions=True)
        return [task.exception() for task in done]

    assert any(isinstance(error, ApiError) and error.status == 429 for error in asyncio.run(ask()))


def test_what_is_not_complete_when_it_stops_gets_an_error():
    engine = Engine(small_model(), TOKENIZER, size=1, queue=4)
    engine.start()
    readers = [Reader(n=10**9), Reader()]
    engine.submit([reader.text for reader in readers])
    readers[0].pieces.get(timeout=60)
    engine.stop()
    for reader in readers:
        with pytest.raises(ApiError, match="stopping"):
            reader.read()
    with pytest.raises(ApiError, match="stopping"):
        engine.submit([Reader().text])


@pytest.mark.parametrize("layout", ["names", "completions"])
def test_names_and_completions_end_by_themselves(layout):
    model = small_model(layout=layout)
    with torch.no_grad():  # whatever comes before it, the line's end comes next
        model.lm_head.weight.zero_()
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.lm_head.weight[TOKENIZER.encode("\n")[0]] = 10.0
    engine = Engine(model, TOKENIZER, size=1, queue=0)
    engine.start()
    reader = Reader(temperature=0.0)
    engine.submit([reader.text])
    assert reader.read() == ("", [], "stop")
    engine.stop()
