"""A browser for the tests of a page, and completions as a server streams them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


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
