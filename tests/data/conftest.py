"""A text, and an empty cache, for the tests of data."""

from __future__ import annotations

import pytest

from helpers import PANGRAM


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTGPT_CACHE", str(folder))
    return folder


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(PANGRAM, encoding="utf-8")
    return file
