"""A small model behind `fastgpt serve`'s application: in this process, or listening on a free port."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import torch
import uvicorn

from fastgpt import GPT, GPTConfig
from fastgpt.serve.app import Options, create_app
from fastgpt.serve.engine import Engine
from fastgpt.tokenizer import BPETokenizer, CharTokenizer

TEXT = "the cat sat on the mat\n"
TOKENIZER = CharTokenizer.train(TEXT)
NAME = "cats"


def small_model(
    tokenizer: CharTokenizer | BPETokenizer = TOKENIZER, block_size: int = 32, layout: str = "blocks"
) -> GPT:
    torch.manual_seed(0)
    shape = {"block_size": block_size, "n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.0}
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.tokenizer, model.layout = tokenizer, layout
    return model


def app_of(model: GPT | None = None, *, size: int = 4, queue: int = 8, **options):
    model = model or small_model()
    engine = Engine(model, model.tokenizer, size=size, queue=queue, stride=max(model.context_size // 2, 1))
    return create_app(model, model.tokenizer, engine, name=NAME, options=Options(**options))


@contextlib.contextmanager
def listening(app, http="h11") -> Iterator[str]:
    """The address of a server of `app`, which is stopped in the end."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, ws="none", http=http
    )
    server = uvicorn.Server(config)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0), backlog=128)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
