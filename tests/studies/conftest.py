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


# Sizes at which a study takes a second or two; they show nothing else but that it runs.
TINY = {
    "depth": "--depths 1,3 --steps 3 --width 16",
    "normalisation": "--steps 6 --points 3 --coin-steps 10",
    "parallelism": "--contexts 8,16 --batches 1,2 --width 16 --seconds 0.05 --steps 3 --rates 1e-3,3e-3",
    "attention": "--steps 3",
    "embeddings": "--steps 3",
    "learning-rate": "--rates 1e-4,1e-2 --widths 16,32 --steps 4 --repeats 1",
    "recipe": "--most-steps 2 --eval-blocks 8 --variants 8",
}


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory, text_file):
    """study_folder(name): the folder that the study leaves with --quick at a tiny size. Each study runs once."""
    out = tmp_path_factory.mktemp("studies")

    @functools.cache
    def run(name: str) -> Path:
        more = TINY[name].split() + (["--prompt", "BE or not"] if name == "attention" else [])
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
