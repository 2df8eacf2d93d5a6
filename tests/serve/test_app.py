"""The application: the openai client against it, streams, limits, tokens, hosts, and clients that go away."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket

import openai
import pytest
import torch
from starlette.testclient import TestClient

from fastgpt import GPTConfig
from fastgpt.baselines import MODELS
from fastgpt.generate import stream
from fastgpt.serve.app import allowed_hosts, host_of, is_loopback
from fastgpt.serve.completions import score
from served_models import NAME, TOKENIZER, app_of, listening, small_model

ASK = {"model": NAME, "prompt": "the cat", "max_tokens": 12, "seed": 1}


@pytest.fixture(scope="module")
def address():
    with listening(app_of()) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@contextlib.contextmanager
def asking(app, **options):
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False, **options) as client:
        yield client


def alone(n: int = 12, seed: int = 1) -> str:
    idx = torch.tensor([TOKENIZER.encode("the cat")])
    return TOKENIZER.decode(
        [int(token) for token in stream(small_model(), idx, n, generator=torch.Generator().manual_seed(seed))]
    )


# ---- the openai client ----


def test_the_model_is_listed_and_found(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).object == "model"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("dogs")
    assert error.value.code == "model_not_found"


def test_a_completion(client):
    got = client.completions.create(**ASK)
    assert got.object == "text_completion" and got.model == NAME and got.id.startswith("cmpl-")
    assert (got.choices[0].text, got.choices[0].finish_reason) == (alone(), "length")
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (7, 12, 19)
    assert got.choices[0].logprobs is None


def test_a_stream_has_the_same_text(client):
    events = list(client.completions.create(**ASK, stream=True, stream_options={"include_usage": True}, logprobs=2))
    choices = [event.choices[0] for event in events[:-1]]
    assert len(choices) > 2 and "".join(choice.text for choice in choices) == alone()
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert [token for choice in choices for token in choice.logprobs.tokens] == list(alone())
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == 12
    assert all(event.usage is None for event in events[:-1])


def test_prompts_times_choices(client):
    got = client.completions.create(**ASK | {"prompt": ["the cat", "a mat"], "n": 2})
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in got.choices[:2]] == [alone(seed=1), alone(seed=2)]
    assert got.usage.prompt_tokens == 12 and got.usage.completion_tokens == 48


def test_a_stream_of_several_choices_says_which_one_grows(client):
    texts = ["", "", ""]
    for event in client.completions.create(**ASK, n=3, stream=True):
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == [alone(seed=seed) for seed in (1, 2, 3)]


def test_stop_texts_end_it(client):
    stop = alone()[6:8]
    for got in (
        client.completions.create(**ASK, stop=stop).choices,
        client.completions.create(**ASK, stop=["never", stop]).choices,
    ):
        assert (got[0].text, got[0].finish_reason) == (alone().partition(stop)[0], "stop")


def test_logprobs_have_the_likeliest_tokens_and_offsets(client):
    got = client.completions.create(**ASK, logprobs=3).choices[0].logprobs
    assert got.tokens == list(alone()) and got.text_offset == list(range(12))
    for token, logprob, top in zip(got.tokens, got.token_logprobs, got.top_logprobs, strict=True):
        assert len(top) == 3 and logprob <= max(top.values()) + 1e-6 and top.get(token, logprob) == logprob


def test_an_echo_has_the_prompt_with_its_scores(client):
    got = client.completions.create(**ASK, logprobs=1, echo=True).choices[0]
    assert got.text == "the cat" + alone() and got.logprobs.tokens == list(got.text)
    assert got.logprobs.text_offset == list(range(19))
    assert got.logprobs.token_logprobs[0] is None and got.logprobs.token_logprobs[1] < 0
    scored = client.completions.create(**ASK | {"max_tokens": 0}, logprobs=1, echo=True)
    assert scored.choices[0].text == "the cat" and scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs == got.logprobs.token_logprobs[:7]
    streamed = client.completions.create(**ASK, echo=True, stream=True)
    assert "".join(event.choices[0].text for event in streamed) == "the cat" + alone()


def test_a_prompt_is_scored_once_for_all_its_choices(monkeypatch):
    scored = []
    monkeypatch.setattr("fastgpt.serve.app.score", lambda *args: scored.append(args) or score(*args))
    with asking(app_of()) as client:
        got = post(client, ASK | {"prompt": ["the cat", "a mat"], "n": 3, "echo": True, "logprobs": 1}).json()
    assert len(scored) == 2
    assert [choice["text"][:5] for choice in got["choices"]] == ["the c"] * 3 + ["a mat"] * 3
    assert len({str(choice["logprobs"]["token_logprobs"][:7]) for choice in got["choices"][:3]}) == 1


def test_fields_of_this_server_alone(client):
    got = client.completions.create(**ASK | {"temperature": 5.0}, extra_body={"top_k": 1, "repetition_penalty": 1.0})
    greedy = client.completions.create(**ASK | {"temperature": 0.0})
    assert got.choices[0].text == greedy.choices[0].text


def test_a_text_goes_on_beyond_the_context(client):
    got = client.completions.create(**ASK | {"max_tokens": 100})
    assert got.usage.completion_tokens == 100 and got.choices[0].text.startswith(alone())


def test_the_same_seed_gives_the_same_text_beside_others(client):
    asks = [ASK | {"seed": seed, "max_tokens": 20} for seed in (5, 6, 7, 5, 6, 7, 5, 6)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda ask: client.completions.create(**ask).choices[0].text, asks))
    assert texts == [alone(20, ask["seed"]) for ask in asks]


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"model": "dogs"}, openai.NotFoundError, "model"),
        ({"prompt": "t" * 33}, openai.BadRequestError, "prompt"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"best": 1}}, openai.BadRequestError, "best"),
        ({"suffix": "."}, openai.BadRequestError, "suffix"),
    ],
)
def test_errors_are_those_that_the_client_knows(client, fields, kind, param):
    with pytest.raises(kind) as error:
        client.completions.create(**ASK | fields)
    assert error.value.param == param


# ---- what is no request of that client ----


def post(client, body=None, **options):
    return client.post("/v1/completions", **({"json": ASK if body is None else body} | options))


def test_what_is_not_json_is_400():
    with asking(app_of()) as client:
        for body in (b"", b"{", b"\xff\xfe", b'{"prompt": NaN}', b'{"n": 1e999', b"[" * 100_000, b"1" * 10_000):
            got = post(client, content=body, headers={"Content-Type": "application/json"}, json=None)
            assert (got.status_code == 400 and "JSON" in got.text) or "nested" in got.text, body[:20]
            assert set(got.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_must_be_called_json():
    with asking(app_of()) as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            got = post(client, content=json.dumps(ASK), headers={"Content-Type": kind}, json=None)
            assert got.status_code == 415
        assert post(client, headers={"Content-Type": "Application/JSON; charset=utf-8"}).status_code == 200


def test_a_body_that_is_too_large_is_413():
    with asking(app_of(body_size=1000)) as client:
        assert post(client, ASK | {"user": "u" * 1000}).status_code == 413

        def parts():
            for _ in range(20):
                yield b" " * 100

        got = post(client, content=parts(), headers={"Content-Type": "application/json"}, json=None)
        assert got.status_code == 413 and "1,000 bytes" in got.json()["error"]["message"]


def test_a_body_that_does_not_come_is_408():
    with listening(app_of(body_timeout=0.2)) as address:
        host, _, port = address.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=60) as slow:
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_paths_and_methods_that_are_not_there():
    with asking(app_of()) as client:
        answer = client.post("/v1/chat/completions", json={})
        assert answer.status_code == 404 and "at /v1/completions" in answer.json()["error"]["message"]
        assert client.get("/v1/completions").status_code == 405
        assert client.delete("/v1/models").json()["error"]["type"] == "invalid_request_error"
        assert client.get("/health").json() == {"status": "ok"}


def test_an_answer_that_takes_too_long_is_504():
    with asking(app_of(timeout=1e-3, max_tokens=10**6)) as client:
        got = post(client, ASK | {"max_tokens": 10**6})
        assert got.status_code == 504 and got.json()["error"]["type"] == "server_error"
        streamed = post(client, ASK | {"max_tokens": 10**6, "stream": True})
        *_, error, done = [line for line in streamed.text.splitlines() if line]
        assert "0.001 seconds" in json.loads(error.removeprefix("data: "))["error"]["message"]
        assert done == "data: [DONE]"


def test_a_bigram_goes_on_from_the_end_of_a_prompt():
    bigram = MODELS["bigram"](GPTConfig(vocab_size=TOKENIZER.vocab_size, block_size=8)).eval()
    bigram.tokenizer = TOKENIZER
    with asking(app_of(bigram)) as client:
        asks = [ASK | {"prompt": prompt, "temperature": 0, "logprobs": 0} for prompt in ("the cat", "t")]
        whole, last = (post(client, ask).json()["choices"][0] for ask in asks)
        assert whole["text"] == last["text"]
        assert whole["logprobs"]["token_logprobs"] == last["logprobs"]["token_logprobs"]
        assert post(client, ASK | {"prompt": "t" * 9}).json()["error"]["code"] == "context_length_exceeded"


def test_a_full_queue_is_429_with_a_time_to_come_again():
    with asking(app_of(size=1, queue=1, max_tokens=10**9)) as client:
        engine = client.app.state.engine
        capacity, engine._queue = engine._queue, -1  # as if all places were taken
        got = post(client)
        assert (got.status_code, got.headers["Retry-After"]) == (429, "1")
        engine._queue = capacity
        assert post(client).status_code == 200


def test_a_model_that_fails_is_500_and_the_server_lives_on():
    model = small_model()
    with asking(app_of(model)) as client:
        weight = model.lm_head.weight.data.clone()
        model.lm_head.weight.data.fill_(torch.nan)
        got = post(client)
        assert got.status_code == 500 and "Traceback" not in got.text
        model.lm_head.weight.data.copy_(weight)
        assert post(client).json()["choices"][0]["text"] == alone()


def test_a_fault_of_this_package_is_500_without_its_traceback(monkeypatch):
    with asking(app_of()) as client:
        monkeypatch.setattr("fastgpt.serve.app.read", lambda *_: {}["a fault"])
        got = post(client)
        assert got.status_code == 500 and got.json()["error"]["type"] == "server_error" and "a fault" not in got.text


def test_a_client_that_goes_away_gives_up_its_place():
    """The only place: whoever comes next would wait for a billion tokens."""
    with (
        listening(app_of(size=1, queue=2, max_tokens=10**9)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        endless = client.completions.create(**ASK | {"max_tokens": 10**9}, stream=True)
        next(iter(endless))
        endless.close()
        assert client.completions.create(**ASK).choices[0].text == alone()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2).completions.create(**ASK | {"max_tokens": 10**9})
        assert client.completions.create(**ASK).choices[0].text == alone()


# ---- who may ask ----


def test_a_token_is_asked_for_where_there_is_one():
    with asking(app_of(token="schlüssel")) as client:
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic x"}, {"Authorization": "schl"}):
            got = post(client, headers=headers)
            assert got.status_code == 401 and got.json()["error"]["code"] == "invalid_api_key"
            assert client.get("/v1/models", headers=headers).status_code == 401
            assert client.get("/page/model", headers=headers).status_code == 401
        right = {"Authorization": "Bearer schlüssel".encode()}
        assert post(client, headers=right).status_code == client.get("/page/model", headers=right).status_code == 200
        assert client.get("/").status_code == client.get("/health").status_code == 200  # the page asks for the token


def test_a_path_in_the_host_header_is_no_way_around_the_token():
    with asking(app_of(host="0.0.0.0", token="t")) as client:
        for host in ("localhost/health?", "localhost/#", "localhost:80/health/"):
            assert client.get("/v1/models", headers={"Host": host}).status_code in (400, 401)


@pytest.mark.parametrize(
    ("header", "status"),
    [("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("LOCALHOST:1", 200),
     ("example.org", 400), ("127.0.0.1.example.org", 400), ("", 400)],
)  # fmt: skip
def test_this_machine_alone_answers_under_its_own_names(header, status):
    with asking(app_of()) as client:
        got = client.get("/v1/models", headers={"Host": header})
        assert got.status_code == status


def test_an_open_server_answers_under_any_name():
    with asking(app_of(host="0.0.0.0", token="t")) as client:
        got = client.get("/v1/models", headers={"Host": "example.org", "Authorization": "Bearer t"})
        assert got.status_code == 200


def test_no_other_site_is_let_in():
    with asking(app_of()) as client:
        got = client.options("/v1/completions", headers={"Origin": "http://example.org"})
        assert not any(name.lower().startswith("access-control") for name in got.headers)
        got = client.get("/v1/models", headers={"Origin": "http://example.org"})
        assert not any(name.lower().startswith("access-control") for name in got.headers)


def test_hosts():
    assert host_of("[::1]:80") == "::1" and host_of("A.b:1") == "a.b"
    assert is_loopback("127.8.9.1") and is_loopback("::1") and is_loopback("Localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org") and not is_loopback("::")
    assert allowed_hosts("192.168.0.1") is None and "127.0.0.2" in allowed_hosts("127.0.0.2")
