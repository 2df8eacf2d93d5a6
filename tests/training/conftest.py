"""Small texts for the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgpt.data.corpus import Corpus
from small_runs import TEXT


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def corpus(text_file) -> Corpus:
    return Corpus.load(text_file, "char", block_size=16)


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> Corpus:
    path = tmp_path_factory.mktemp("data") / "names.txt"
    words = {word for word in TEXT.split() if len(word) > 1} | {"a" * n for n in range(2, 16)}
    path.write_text("\n".join(sorted(words)))
    return Corpus.load(path, "char", block_size=16, layout="names")
