"""OpenAI's /v1/completions: what a request may ask for, and how its answer looks, whole or as a stream of events.

The fields are those of https://platform.openai.com/docs/api-reference/completions, and two more that clients pass as
`extra_body`: top_k and repetition_penalty. A field that this server does not know is refused, rather than ignored.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import as_int_argument
from ..draw import checked_settings, log_probabilities
from ..generate_batch import Drawn
from ..generate_text import prompt_tokens
from ..language_model import LanguageModel
from ..tokenizer import Tokenizer
from .engine import Piece, Token
from .errors import ApiError, wrong_value

MOST_STOPS, MOST_LOGPROBS, MOST_CHOICES = 16, 20, 128
# What these ask for cannot be had here. Their usual values ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
}
_FIELDS = frozenset(
    "model prompt max_tokens temperature top_p top_k repetition_penalty n best_of stream stream_options stop seed "
    "logprobs echo user".split()
) | set(_REFUSED)


@dataclass(frozen=True)
class Limits:
    """Of one request. A server has others, on how many requests there are at a time."""

    name: str  # the model that is served
    context_size: int | None  # tokens; a prompt must fit
    max_tokens: int  # of a completion
    capacity: int  # texts that the engine takes


@dataclass(frozen=True)
class Asked:
    """A request whose fields are known to be right."""

    prompts: list[list[int]]  # token ids
    shown: list[str]  # the prompts as text
    n: int
    max_tokens: int
    settings: dict[str, Any]  # of `Batch.add`
    seed: int
    stops: list[str]
    logprobs: int | None
    echo: bool
    is_stream: bool
    with_usage: bool  # as the last event of a stream

    @property
    def n_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def read(body: Any, limits: Limits, tokenizer: Tokenizer, layout: str) -> Asked:
    """Check a request's fields. Raises ApiError naming the first that is wrong."""
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is JSON of the wrong kind: expected an object, got {_kind(body)}")
    for name in body:
        if name not in _FIELDS:
            raise ApiError(400, f"{name[:80]}: this server has no such parameter", param=name[:80])
    for name, usual in _REFUSED.items():
        if body.get(name) not in usual:
            raise ApiError(400, f"{name}: this server does not have it; leave it out", param=name)
    _check_model(body.get("model"), limits.name)
    try:
        return _read(body, limits, tokenizer, layout)
    except ValueError as error:
        raise wrong_value(error) from None


def _check_model(asked: Any, name: str) -> None:
    if asked is not None and not isinstance(asked, str):
        raise ApiError(400, f"model: expected a string, got {_kind(asked)}", param="model")
    if asked is not None and asked != name:
        raise model_not_found(asked, name)


def model_not_found(asked: str, name: str) -> ApiError:
    message = f"the model {asked[:200]!r} does not exist; this server has {name!r}"
    return ApiError(404, message, param="model", code="model_not_found")


def _read(body: dict[str, Any], limits: Limits, tokenizer: Tokenizer, layout: str) -> Asked:
    prompts = [_tokens(prompt, limits, tokenizer, layout) for prompt in _prompts(body.get("prompt"))]
    n = _integer(body, "n", 1, 1, MOST_CHOICES)
    if body.get("best_of") not in (None, n):
        raise ValueError("best_of: this server does not have it; leave it out, or give n")
    if len(prompts) * n > limits.capacity:
        raise ValueError(f"n: {len(prompts)} prompts of {n} choices are more than the {limits.capacity} of this server")
    echo = _boolean(body, "echo")
    max_tokens = _integer(body, "max_tokens", 16, 0 if echo else 1, limits.max_tokens)
    settings = {name: body[name] for name in ("top_k", "top_p", "temperature", "repetition_penalty") if name in body}
    settings = {name: value for name, value in settings.items() if value is not None}
    logprobs = None if body.get("logprobs") is None else _integer(body, "logprobs", 0, 0, MOST_LOGPROBS)
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"stream_options: expected an object, got {_kind(options)}")
    seed = body.get("seed")
    return Asked(
        prompts=prompts,
        shown=[tokenizer.decode(prompt) for prompt in prompts],
        n=n,
        max_tokens=max_tokens,
        settings=checked_settings(**settings)._asdict() | {"logprobs": logprobs},
        seed=secrets.randbits(62) if seed is None else as_int_argument("seed", seed),
        stops=_stops(body.get("stop")),
        logprobs=logprobs,
        echo=echo,
        is_stream=_boolean(body, "stream"),
        with_usage=_boolean(options or {}, "include_usage"),
    )


def _prompts(given: Any) -> Sequence[Any]:
    """The prompts, each a text or a list of token ids."""
    if isinstance(given, list) and given and all(isinstance(part, (str, list)) for part in given):
        return given
    return [given]


def _tokens(prompt: Any, limits: Limits, tokenizer: Tokenizer, layout: str) -> list[int]:
    if prompt is None or prompt == "" or prompt == []:
        if tokenizer.end_of_text is None or layout != "blocks":
            raise ValueError("prompt: is empty; give at least one character")
        return [tokenizer.end_of_text]  # which comes before each text that such a model has seen
    if isinstance(prompt, str):
        ids = prompt_tokens(tokenizer, prompt, layout)[0].tolist()
    elif isinstance(prompt, list):
        ids = [as_int_argument("prompt", token, 0) for token in prompt]
        if (largest := max(ids)) >= tokenizer.vocab_size:
            raise ValueError(f"prompt: expected token ids below {tokenizer.vocab_size}, got {largest}")
    else:
        raise ValueError(f"prompt: expected a string, a list of strings, or token ids, got {_kind(prompt)}")
    if limits.context_size is not None and len(ids) > limits.context_size:
        message = f"prompt: this model's context is {limits.context_size} tokens, and the prompt has {len(ids)}"
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")
    return ids


def _stops(given: Any) -> list[str]:
    stops = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("stop: expected a string or a list of strings")
    if len(stops) > MOST_STOPS:
        raise ValueError(f"stop: expected at most {MOST_STOPS} strings, got {len(stops)}")
    return [stop for stop in stops if stop]


def _integer(body: dict[str, Any], name: str, usual: int, least: int, most: int) -> int:
    if body.get(name) is None:
        return usual
    value = as_int_argument(name, body[name], least)
    if value > most:
        raise ValueError(f"{name}: expected at most {most}, got {value}")
    return value


def _boolean(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name}: expected true or false, got {_kind(value)}")
    return bool(value)


def _kind(value: Any) -> str:
    """The name of a value's type in JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# ---- the answer ----


@dataclass
class Choice:
    """One of the texts of an answer, as it grows."""

    index: int
    shown: str = ""  # the text so far
    tokens: list[Token] = field(default_factory=list)
    n_drawn: int = 0
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.shown += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish

    def take(self) -> tuple[str, list[Token]]:
        """What has come since the last time."""
        taken = self.shown, self.tokens
        self.shown, self.tokens = "", []
        return taken


class Answer:
    """The bodies of one answer: `whole` for all of it, `event` for a part of a stream."""

    def __init__(self, asked: Asked, name: str, tokenizer: Tokenizer) -> None:
        self._asked, self._tokenizer = asked, tokenizer
        self._head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}
        self._head["model"] = name

    def whole(self, choices: Iterable[dict[str, Any]], n_drawn: int) -> dict[str, Any]:
        return {**self._head, "choices": list(choices), "usage": self.usage(n_drawn)}

    def event(self, choices: Iterable[dict[str, Any]], n_drawn: int | None = None) -> bytes:
        """A part of a stream. The usage, where it was asked for, comes with the last one, which has no choice."""
        body = {**self._head, "choices": list(choices)}
        if self._asked.with_usage:
            body["usage"] = None if n_drawn is None else self.usage(n_drawn)
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()

    def usage(self, n_drawn: int) -> dict[str, int]:
        n_prompt = self._asked.n_prompt_tokens
        return {"prompt_tokens": n_prompt, "completion_tokens": n_drawn, "total_tokens": n_prompt + n_drawn}

    def choice(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        logprobs = None if self._asked.logprobs is None else self._logprobs(tokens)
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, list[Any]]:
        names = [self.name(token.drawn.token) for token in tokens]
        return {
            "tokens": names,
            "token_logprobs": [token.drawn.logprob for token in tokens],
            "top_logprobs": [self._top(token.drawn) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, drawn: Drawn) -> dict[str, float] | None:
        """None for the first token of an echoed prompt, which nothing predicts."""
        if drawn.logprob is None:
            return None
        return {self.name(token): logprob for token, logprob in drawn.top}

    def name(self, token: int) -> str:
        """A token's text, or its bytes where they are a part of a character."""
        if token >= self._tokenizer.vocab_size:
            return "\ufffd"
        raw = self._tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@torch.no_grad()
def score(model: LanguageModel, prompt: Sequence[int], n_top: int) -> list[Drawn]:
    """For each token of a prompt its log-probability after those before it, and the `n_top` likeliest in its place."""
    idx = torch.tensor([prompt], device=next(model.parameters()).device)
    logits = model(idx)[0][0]  # (T, V)
    found = [Drawn(prompt[0])]
    for token, row in zip(prompt[1:], logits, strict=False):  # nothing is known of what follows the last
        log_probs = log_probabilities(row[None])[0]
        values, ids = log_probs.topk(min(n_top, len(log_probs)))
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
        found.append(Drawn(token, float(log_probs[token]), top))
    return found


def echoed(prompt: Sequence[int], scores: Sequence[Drawn], tokenizer: Tokenizer) -> list[Token]:
    """The prompt's tokens with their log-probabilities, and where each begins in the text."""
    begins = [len(tokenizer.decode(list(prompt[:n]))) for n in range(len(prompt))]
    return [Token(drawn, begin) for drawn, begin in zip(scores, begins, strict=True)]
