"""An app behind an address of this machine, a browser, and what a test of a page asks of both."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """The address at which `app` is served, by a thread of this process."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))  # any port that is free
        listening.listen()  # from here on a connection waits for the server
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=30)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window. Where there is none, tests are skipped, and with BROWSER_REQUIRED they fail."""
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        found = []
    if not found:
        missing = "the page is tested by Playwright in Chromium, and one of the two is not installed"
        (pytest.fail if os.environ.get("BROWSER_REQUIRED") else pytest.skip)(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def completion(*tokens: str, alternatives: dict[str, float] | None = None, end: str = "length") -> str:
    """The body of a streamed completion: each token with a probability of one half, and `alternatives` beside it."""
    events = []
    for token in tokens:
        top = {token: -0.6931, **(alternatives or {})}
        logprobs = {"tokens": [token], "token_logprobs": [-0.6931], "top_logprobs": [top], "text_offset": [0]}
        events.append({"index": 0, "text": token, "logprobs": logprobs, "finish_reason": None})
    events.append({"index": 0, "text": "", "logprobs": None, "finish_reason": end})
    return "".join(f"data: {json.dumps({'choices': [event]})}\n\n" for event in events) + "data: [DONE]\n\n"
