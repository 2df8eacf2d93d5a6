"""The application: its routes, what may be asked of it, and by whom.

    GET  /v1/models, /v1/models/NAME    the model that is served
    POST /v1/completions                continuations of prompts, whole or streamed (completions.py)
    GET  /health                        whether the server answers
    GET  /                              a page to try the model on (page.py)

Whoever can reach the address can use the model, unless there is a token. A browser lets the pages of other sites reach
this machine, too. So a request to this machine alone has to name it in its Host header, which a page cannot choose, and
a body has to be called JSON, which a browser sends to another site only where that site allows it; this one does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..language_model import LanguageModel
from ..tokenizer import Tokenizer
from . import page
from .completions import Answer, Asked, Choice, Limits, echoed, model_not_found, read, score
from .engine import Engine, Piece, Text
from .errors import ApiError, wrong_value

WHAT_IS_THERE = "a model here goes on with a text, at /v1/completions"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Options:
    """What the server accepts.

    host: the address that it listens on. token: what requests must bring; None for none. timeout: seconds until an
    answer must be complete. body_size: bytes of a request's body, body_timeout: seconds until it must be there.
    """

    host: str = "127.0.0.1"
    token: str | None = None
    max_tokens: int = 4096
    timeout: float = 600.0
    body_size: int = 2**20
    body_timeout: float = 10.0


def create_app(
    model: LanguageModel,
    tokenizer: Tokenizer,
    engine: Engine,
    *,
    name: str,
    run: Path | None = None,
    options: Options | None = None,
) -> Starlette:
    """The application that serves `model`, in evaluation mode, under `name`. It starts the engine, and stops it.

    run: the folder of the run that the model comes from, whose losses the page shows.
    """
    options = options or Options()
    # A bigram sees one token, and goes on from the last one of a text that it was trained on.
    longest = None if model.context_size is None else max(model.context_size, model.cfg.block_size)
    limits = Limits(name, longest, options.max_tokens, engine.capacity)
    server = _Server(model, tokenizer, engine, limits, options)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(engine.stop)

    app = Starlette(
        routes=[
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.model),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/health", lambda request: JSONResponse({"status": "ok"})),
            *page.routes(model, tokenizer, engine, name=name, run=run, max_tokens=options.max_tokens),
        ],
        exception_handlers={
            ApiError: _answer_error,
            ValueError: lambda request, error: _answer_error(request, wrong_value(error)),
            HTTPException: _answer_http_error,
            Exception: _answer_fault,
        },
        lifespan=lifespan,
    )
    app.state.engine = engine
    app.add_middleware(_Guard, options=options)
    return app


class _Server:
    """The routes of the interface."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, engine: Engine, limits: Limits, options: Options
    ) -> None:
        self._model, self._tokenizer, self._engine = model, tokenizer, engine
        self._limits, self._options = limits, options
        self._described = {"id": limits.name, "object": "model", "created": int(time.time()), "owned_by": "fastgpt"}

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described]})

    async def model(self, request: Request) -> Response:
        asked = request.path_params["name"]
        if asked != self._limits.name:
            raise model_not_found(asked, self._limits.name)
        return JSONResponse(self._described)

    async def completions(self, request: Request) -> Response:
        body = request.scope["json"]
        asked = await asyncio.to_thread(read, body, self._limits, self._tokenizer, self._model.layout)
        texts, pieces = self._texts(asked)
        answer = Answer(asked, self._limits.name, self._tokenizer)
        choices = [Choice(index) for index in range(len(texts))]
        deadline = asyncio.get_running_loop().time() + self._options.timeout
        if asked.echo:
            await _unless_gone(request, self._echo(asked, choices, deadline))
        if asked.max_tokens:
            self._engine.submit(texts)
        else:
            for choice in choices:
                choice.finish = "length"
        grown = self._grow(asked, texts, pieces, choices, deadline)
        if asked.is_stream:
            return StreamingResponse(
                self._stream(answer, asked, choices, grown),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        await _unless_gone(request, _exhaust(grown))
        found = [answer.choice(choice.index, *choice.take(), choice.finish) for choice in choices]
        return JSONResponse(answer.whole(found, sum(choice.n_drawn for choice in choices)))

    async def _echo(self, asked: Asked, choices: list[Choice], deadline: float) -> None:
        """Let each choice begin with its prompt, which is scored once for all of them."""
        for number, (prompt, shown) in enumerate(zip(asked.prompts, asked.shown, strict=True)):
            tokens = await self._scores(asked, prompt, deadline)
            for choice in choices[number * asked.n : (number + 1) * asked.n]:
                choice.add(Piece(shown, tokens))

    async def _scores(self, asked: Asked, prompt: list[int], deadline: float) -> list:
        if asked.logprobs is None:
            return []
        try:
            async with asyncio.timeout_at(deadline):
                scores = await self._engine.call(score, self._model, prompt, asked.logprobs)
        except TimeoutError:
            raise self._too_late() from None
        except Exception as error:
            raise _of_engine(error) from error
        return echoed(prompt, scores, self._tokenizer)

    def _too_late(self) -> ApiError:
        return ApiError(504, f"not complete within {self._options.timeout:g} seconds")

    def _texts(self, asked: Asked) -> tuple[list[Text], asyncio.Queue]:
        """The texts to be continued, and the queue of (index, piece) that the engine's thread fills."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue = asyncio.Queue()

        def deliver(index: int, piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # of a loop that has been closed
                loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

        texts = []
        for index, prompt in enumerate(_repeated(asked.prompts, asked.n)):
            seed = (asked.seed + index) % 2**63  # choices of one request shall differ
            text = Text(prompt, asked.max_tokens, asked.settings, seed, asked.stops, partial(deliver, index))
            texts.append(text)
        return texts, pieces

    async def _grow(
        self, asked: Asked, texts: list[Text], pieces: asyncio.Queue, choices: list[Choice], deadline: float
    ) -> AsyncGenerator[Choice, None]:
        """Yield each choice when it has got something, until all are complete. Who stops asking cancels the rest."""
        offsets = [len(shown) if asked.echo else 0 for shown in _repeated(asked.shown, asked.n)]
        left = len(texts) if asked.max_tokens else 0
        try:
            while left:
                try:
                    async with asyncio.timeout_at(deadline):
                        index, piece = await pieces.get()
                except TimeoutError:
                    raise self._too_late() from None
                if piece.error is not None:
                    raise _of_engine(piece.error)
                shifted = [token._replace(offset=token.offset + offsets[index]) for token in piece.tokens]
                choices[index].add(piece._replace(tokens=shifted))
                choices[index].n_drawn = texts[index].n_drawn
                left -= piece.finish is not None
                yield choices[index]
        finally:
            self._engine.cancel(texts)

    async def _stream(
        self, answer: Answer, asked: Asked, choices: list[Choice], grown: AsyncGenerator[Choice, None]
    ) -> AsyncIterator[bytes]:
        """The events of an answer. An error after the first is an event, too."""
        async with contextlib.aclosing(grown) as grown:
            try:
                for choice in choices:
                    if asked.echo:
                        yield answer.event([answer.choice(choice.index, *choice.take(), choice.finish)])
                async for choice in grown:
                    text, tokens = choice.take()
                    if text or tokens or choice.finish:
                        yield answer.event([answer.choice(choice.index, text, tokens, choice.finish)])
                if asked.with_usage:
                    yield answer.event([], sum(choice.n_drawn for choice in choices))
            except ApiError as error:
                yield f"data: {json.dumps(error.body(), ensure_ascii=False)}\n\n".encode()
            yield b"data: [DONE]\n\n"


def _repeated(values: Sequence[Any], n: int) -> list[Any]:
    """Each value n times, as the choices of a request are ordered."""
    return [value for value in values for _ in range(n)]


async def _exhaust(grown: AsyncGenerator[Choice, None]) -> None:
    async with contextlib.aclosing(grown) as grown:
        async for _ in grown:
            pass


async def _unless_gone(request: Request, work: Awaitable[None]) -> None:
    """Await `work`, which is cancelled when the client goes away. Raises ClientDisconnect then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        await task
    finally:
        for other in (task, gone):
            other.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await other


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _of_engine(error: BaseException) -> ApiError:
    """The model or the machine failed, not the request."""
    return error if isinstance(error, ApiError) else ApiError(500, f"the model failed: {error}", code="model_failed")


# ---- errors ----


async def _answer_error(request: Request, error: Any) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _answer_http_error(request: Request, error: Any) -> Response:
    """Starlette's own: a path that is not there, or a method that it does not have."""
    path = request.scope["path"][:200]
    nothing = f"there is nothing at {path}" + (f"; {WHAT_IS_THERE}" if path.startswith("/v1/") else "")
    words = {404: nothing, 405: f"{request.method} is not for this path"}
    found = ApiError(error.status_code, words.get(error.status_code, str(error.detail)))
    return JSONResponse(found.body(), found.status, headers=error.headers)


async def _answer_fault(request: Request, error: Exception) -> Response:
    """A fault of this package. Starlette shows its traceback on the server's console, and the client nothing of it."""
    found = ApiError(500, "an internal error; the server's console has it")
    return JSONResponse(found.body(), found.status)


# ---- who may ask, and what ----


class _Guard:
    """Checks each request before its route: host, token, kind of body, its size and how long it takes to come."""

    def __init__(self, app: Callable[..., Awaitable[None]], options: Options) -> None:
        self._app, self._options = app, options
        self._hosts = allowed_hosts(options.host)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            self._check_host(request)
            self._check_token(request)
            if request.method == "POST":
                scope["json"] = _json(await self._body(request))  # where the routes find it
        except ApiError as error:
            headers = {**error.headers, "Connection": "close"}  # what was not read of the body is not a request
            await JSONResponse(error.body(), error.status, headers=headers)(scope, receive, send)
        except ClientDisconnect:
            pass
        else:
            with contextlib.suppress(ClientDisconnect):
                await self._app(scope, receive, send)

    def _check_host(self, request: Request) -> None:
        if self._hosts is not None and host_of(request.headers.get("host", "")) not in self._hosts:
            raise ApiError(400, "Host: this server answers under the names of this machine alone")

    def _check_token(self, request: Request) -> None:
        token, path = self._options.token, request.scope["path"]  # the path in request.url has the Host header in it
        if token is None or not path.startswith(("/v1", "/page")):
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), token.encode()):
            message = "the token is missing or wrong; give the server's as an Authorization header: Bearer TOKEN"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "Content-Type: expected application/json")
        most = self._options.body_size
        too_large = ApiError(413, f"the body is larger than {most:,} bytes")
        length = request.headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit() and len(length) < 20) or int(length) > most:
            raise too_large
        body = bytearray()
        try:
            with anyio.fail_after(self._options.body_timeout):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, "the body did not come in time") from None
        return bytes(body)


def allowed_hosts(host: str) -> frozenset[str] | None:
    """The names in Host headers that a server on this machine alone answers to; None where it answers to any."""
    return frozenset({*LOOPBACK, host.lower()}) if is_loopback(host) else None


def is_loopback(host: str) -> bool:
    """Whether the address `host` reaches this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(header: str) -> str:
    """The name in a Host header, without the port: "[::1]:8000" is "::1"."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]


def _json(body: bytes) -> Any:
    """The value in a body. Raises ApiError for what is no JSON, or has numbers that JSON does not have."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number in JSON")

    try:
        return json.loads(body, parse_constant=refuse)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:  # of JSON, of UTF-8, or of a number of too many digits
        raise ApiError(400, f"the body is not JSON: {error}"[:300]) from None
