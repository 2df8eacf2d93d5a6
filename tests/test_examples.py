"""Each file in examples/ runs as its first lines say, on little text and in few steps."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.ops.backend import OPS

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the source tree is not here")


@pytest.fixture
def run_example(monkeypatch, tmp_path, capsys):
    """`run_example("own_model.py", "--steps", 3)`: what it prints, in an empty folder."""

    def run(name: str, *options: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


# `eager` traces the whole model, as the usual backend does, and compiles nothing.
QUICKLY = ("--steps", 12, "--seconds", 0.001, "--compiler", "eager")


def test_own_model_is_explained_checked_timed_and_trained(run_example, text_file):
    said = run_example("own_model.py", "--data", text_file, *QUICKLY)
    assert set(re.findall(r"^(\w+): runs on ", said, flags=re.MULTILINE)) == set(OPS) - {"cross_entropy"}
    assert len(re.findall(r"an error of \S+ in the loss, and of at most \S+ in a gradient", said)) == 2
    assert re.findall(r"^(.*): \S+ ms a step$", said, flags=re.MULTILINE) == [
        *("fastgpt", "fastgpt, compiled", "PyTorch", "PyTorch, compiled")
    ]
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+) nats", said, flags=re.MULTILINE)]
    assert losses[-1] < losses[0]


def test_own_model_notices_an_op_that_is_wrong(run_example, text_file, monkeypatch):
    from fastgpt import ops

    right = ops.activation
    monkeypatch.setattr(ops, "activation", lambda x: right(x) * (1 + 1e-4))
    monkeypatch.setattr(torch, "compile", None)  # it is not reached
    with pytest.raises(AssertionError, match="where PyTorch's is"):
        run_example("own_model.py", "--data", text_file, *QUICKLY)
