"""Each file in examples/ runs as its first lines say, on little text and in few steps."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

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
    of_the_model = {"embedding", "layer_norm", "attention", "add_layer_norm", "activation", "linear_cross_entropy"}
    assert set(re.findall(r"^(\w+): runs on ", said, flags=re.MULTILINE)) == of_the_model
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


def test_finetune_teaches_a_task_to_a_model_that_knows_the_language(run_example, tmp_path):
    words = itertools.product(("my lord", "good night", "the sun"), ("says", "weeps", "dreams"), ("no more", "of Rome"))
    speeches = [f"{name}:\n{' '.join(line)}.\n" for line in words for name in ("ROMEO", "QUEEN")]
    (tmp_path / "plays.txt").write_text("\n".join(speeches * 4), encoding="utf-8")
    few = ("--examples", 30, "--plays-steps", 15, "--steps", 2)
    said = run_example("finetune.py", "--data", "plays.txt", "--out", "out", *few)

    (examples, *_) = map(json.loads, (tmp_path / "out" / "examples.jsonl").read_text().splitlines())
    assert re.fullmatch("(ROMEO|QUEEN) says:", examples["prompt"]) and re.fullmatch(
        r" [\w ]+\.", examples["completion"]
    )
    before = {}  # the validation loss of each run before its first step
    for name in ("plays", "tuned", "new"):
        rows = map(json.loads, (tmp_path / "out" / name / "metrics.jsonl").read_text().splitlines())
        before[name] = next(row["loss"] for row in rows if row["split"] == "val")
        assert len(re.findall(rf"^{name}: '(ROMEO|QUEEN) says:", said, flags=re.MULTILINE)) == 2
    assert before["tuned"] < before["new"]


@pytest.mark.parametrize("name", ["own_model.py", "finetune.py"])
def test_a_text_that_is_not_there_is_said_in_one_line(name, run_example, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_example(name, "--data", "missing.txt")
    assert stopped.value.code == 2
    assert "--data: 'missing.txt' does not exist" in capsys.readouterr().err.splitlines()[-1]


def test_finetune_says_what_its_text_has_to_have(run_example, tmp_path):
    (tmp_path / "prose.txt").write_text("Once upon a time.\n" * 20)
    with pytest.raises(SystemExit, match="no line has a speaker's name alone"):
        run_example("finetune.py", "--data", "prose.txt")


# ---- the notebook ----

NOTEBOOK = EXAMPLES / "shakespeare.ipynb"
BOOK = json.loads(NOTEBOOK.read_text(encoding="utf-8")) if NOTEBOOK.exists() else {"cells": []}
SMALLER = {'TEXT = "shakespeare"': "TEXT = {text!r}", "STEPS = 1000": "STEPS = 12"}


def cells(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in BOOK["cells"] if cell["cell_type"] == kind]


def test_the_notebook_runs_from_the_first_cell_to_the_last(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("ROMEO.\nBut, soft! what light\nis the east?\n\n" * 100, encoding="utf-8")
    plots = pytest.importorskip("matplotlib.pyplot")
    plots.switch_backend("Agg")
    code = "\n".join(cells("code"))
    code = re.sub(r"^ +[!%].*$", "    raise AssertionError", code, flags=re.MULTILINE)  # no URL: nothing is installed
    for written, small in SMALLER.items():
        assert code.count(written) == 1
        code = code.replace(written, small.format(text=str(text)))
    names: dict = {}
    exec(compile(code, NOTEBOOK.name, "exec"), names)
    said = capsys.readouterr().out
    assert names["validation"][-1][1] < names["validation"][0][1]
    assert "ROMEO.\n" in said and "attention: runs on " in said and "linear_cross_entropy: runs on " in said
    (curves,), panels = (plots.figure(number).axes for number in plots.get_fignums())
    assert {len(line.get_xdata()) for line in curves.lines} == {12, 2}
    assert len(panels) == names["config"].n_head and all(panel.images for panel in panels)
    plots.close("all")


def test_the_notebook_is_clean_and_its_links_lead_somewhere():
    assert (BOOK["nbformat"], BOOK["nbformat_minor"]) == (4, 5)
    for cell in BOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert len({cell["id"] for cell in BOOK["cells"]}) == len(BOOK["cells"])
    links = [link for text in cells("markdown") for link in re.findall(r"\]\(([^):#]+)[^):]*\)", text)]
    assert links and all((EXAMPLES / link).exists() for link in links)


def test_the_notebook_is_valid_by_the_formats_own_schema():
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
