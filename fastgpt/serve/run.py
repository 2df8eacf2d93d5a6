"""`fastgpt serve`: read the model, listen, and answer until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..language_model import LanguageModel
from ..loading import find_model, load
from ..settings import ServeSettings, UsageError
from ..tokenizer import Tokenizer

MOST_CONNECTIONS = 512
END_WITHIN_S = 3  # once it is to stop: what is still being answered then is cut off
HEADERS_SIZE = 2**15  # bytes
HEADERS_WITHIN_S = 10
EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # what listens on all of a machine's, and one to reach it by
READ_WITHIN_S = 60  # what is sent to a client, or the client is cut off


def serve(settings: ServeSettings, device: Any, on_backend: contextlib.AbstractContextManager) -> None:
    """Serve the model of settings.checkpoint on `device`; returns once it was asked to stop."""
    assert settings.checkpoint is not None
    try:
        import starlette  # noqa: F401
        import uvicorn
        from uvicorn.protocols.http.h11_impl import H11Protocol
    except ImportError as error:
        raise ImportError(f"serving needs {error.name}: pip install 'fastgpt-kernels[serve]'") from None
    from .app import Options, create_app, is_loopback
    from .engine import Engine

    place = find_model(settings.checkpoint)
    model, tokenizer = load(settings.checkpoint, dropout=0.0)
    model.to(device).eval()
    stride = _stride(model, settings.stride)
    sizes = {"size": settings.max_batch, "queue": settings.max_queue}
    try:
        engine = Engine(model, tokenizer, **sizes, stride=stride, context=on_backend)
    except ValueError as error:  # a stride that the model cannot have, or a model that does not generate
        raise UsageError(f"--{error}" if str(error).startswith("stride:") else str(error)) from None
    token = settings.token
    if token is None and not is_loopback(settings.host):
        token = secrets.token_urlsafe(24)
    options = Options(settings.host, token, settings.max_new_tokens, settings.timeout)
    name = settings.name or place.resolve().name
    app = create_app(model, tokenizer, engine, name=name, run=_run_of(place), options=options)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=END_WITHIN_S,
        h11_max_incomplete_event_size=HEADERS_SIZE,
        http=_patient(H11Protocol),
        ws="none",
        server_header=False,
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            engine.begin_to_stop()  # so that what is being answered ends
            super().handle_exit(sig, frame)

    with contextlib.closing(_listen(settings.host, settings.port)) as listener, _ended_by_signals():
        _say(listener, settings.host, name, tokenizer, model, token)
        Server(config).run(sockets=[listener])
    print("stopped", flush=True)


def _patient(protocol: type) -> type:
    """A connection's `protocol` that waits for a request's headers, but not for ever.

    uvicorn has a time for the next request on a connection, and none for the first byte or for half of the headers: who
    opens many connections and stays silent would shut out everyone else.
    """

    class Patient(protocol):  # type: ignore[misc]
        waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, error: Exception | None) -> None:
            self._stop_watching()
            super().connection_lost(error)

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_watching()  # the headers are there
            elif self.waiting is None:
                self.waiting = self.loop.call_later(HEADERS_WITHIN_S, self._give_up)

        def _stop_watching(self) -> None:
            if self.waiting is not None:
                self.waiting.cancel()
                self.waiting = None

        def _give_up(self) -> None:
            self.waiting = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

    return Patient


def _stride(model: LanguageModel, asked: int | None) -> int | None:
    """How many tokens leave a full context at once: half of it, so that most tokens of a long text are cached."""
    limit = model.context_size
    return max(limit // 2, 1) if asked is None and limit is not None else asked


def _run_of(place: Path) -> Path | None:
    """The folder of the run that a checkpoint is in, which has the losses."""
    for folder in (place, *place.parents[:2]):
        if (folder / "metrics.jsonl").is_file():
            return folder
    return None


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to the address. Raises OSError in words."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason = "the port is taken; give another one, or 0 for one that is free"
        raise OSError(f"--host {host} --port {port}: cannot listen there: {reason}") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux; its connections have it, too
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, READ_WITHIN_S * 1000)
    return listener


def _say(
    listener: socket.socket, host: str, name: str, tokenizer: Tokenizer, model: LanguageModel, token: str | None
) -> None:
    port = listener.getsockname()[1]
    reached = EVERY_ADDRESS.get(host, host)
    shown = f"[{reached}]" if ":" in reached else reached
    print(f"{name}: a {model.kind} of {model.num_parameters():,} parameters on {next(model.parameters()).device}")
    print(f"page: http://{shown}:{port}/")
    print(f"OpenAI's interface: http://{shown}:{port}/v1  (model {name!r})")
    if reached != host:
        print(f"from another machine: this machine's name or address in place of {reached}")
    if token is not None:
        print(f"token: {token}")
    print("Ctrl-C ends it", flush=True)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the server, and with it the command, without an error.

    uvicorn raises a signal once more after it has ended, for the handlers that were there before.
    """
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
