"""A text, the studies run at a small size, and a file of vectors."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from fastgpt.cli import main


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("ROMEO: But, soft! what light 3 through\nyonder window breaks? Be or not TO BE.\n" * 40)
    return path


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory, text_file):
    """study_folder(name): the folder that the study leaves at its --quick size. Each study runs once."""
    out = tmp_path_factory.mktemp("studies")

    @functools.cache
    def run(name: str) -> Path:
        more = ["--prompt", "BE or not"] if name == "attention" else []
        arguments = ["--quick", "--data", str(text_file), "--out", str(out / name), "--device", "cpu", *more]
        assert main(["study", name, *arguments]) == 0
        return out / name

    return run


@pytest.fixture
def results(study_folder):
    """results(name): what the study measured, read anew at each call because tests change it."""
    return lambda name: json.loads((study_folder(name) / "results.json").read_text())


VECTORS = "king 1 1 0\nqueen 1 0 1\nman 0 1 0\nwoman 0 0 1\nkings 0.9 1 0.1\n"


@pytest.fixture
def vectors(tmp_path) -> Path:
    path = tmp_path / "vectors.txt"
    path.write_text(VECTORS)
    return path
