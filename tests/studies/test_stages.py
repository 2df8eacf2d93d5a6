"""The stages from bigram to GPT: what each one changes, and the code that shows it."""

from __future__ import annotations

import dataclasses
import importlib
from itertools import pairwise
from pathlib import Path

import pytest

from fastgpt.config import GPTConfig
from fastgpt.model import Block
from fastgpt.studies import learn
from fastgpt.studies.stages import LADDER, STAGES, code_of, config_of, find_stage, statements_using

ROOT = Path(__file__).resolve().parents[2]


def test_each_stage_changes_one_idea_and_the_last_is_a_gpt():
    assert [s.name for s in STAGES if s.after is None] == ["bigram"]
    for s in STAGES[1:]:
        before, now = (dataclasses.asdict(config_of(x, 65)) for x in (find_stage(s.after), s))
        assert {k for k, v in now.items() if before[k] != v} == set(s.changes), s.name
        assert (s.model != find_stage(s.after).model) != bool(s.changes), "either the model changes or its settings"
    assert all(find_stage(b).after == a for a, b in pairwise(LADDER))
    assert config_of(STAGES[-1], 65) == GPTConfig(
        vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.1, tie_weights=False
    )


def test_the_budget_is_one():
    settings = learn.LearnSettings(steps=50)
    configs = [learn.train_config_of(settings, s, config_of(s, 65)) for s in STAGES]
    tokens = {c.batch_size * config_of(s, 65).block_size for c, s in zip(configs, STAGES, strict=True)}
    assert tokens == {learn.TOKENS_PER_STEP}
    rest = {dataclasses.replace(c, batch_size=1, lr=1.0, min_lr=0.1) for c in configs}
    assert len(rest) == 1
    assert {c.lr for c in configs[:-1]} == {0.015} and configs[-1].lr == 0.003


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_the_code_shown_is_the_source_at_that_line(stage):
    """It fails where a function or a name that the stage is about was renamed."""
    found = code_of(stage)
    assert found
    for file, number, text in found:
        assert (ROOT / "fastgpt" / file).read_text(encoding="utf-8").splitlines()[number - 1].strip() == text.strip()


def test_statements_are_found_however_the_source_is_formatted(tmp_path, monkeypatch):
    """The functions of two files with the same statements, one of them on many lines."""
    plain = "def f(x, size):\n    y = g(x, width=size.width)\n    if y.width:\n        return y\n    return x.height\n"
    broken = plain.replace("g(x, width=size.width)", "g(\n        x,\n        width=size.width,\n    )")
    monkeypatch.setattr("fastgpt.studies.stages.PACKAGE", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, source in (("plain_source", plain), ("broken_source", broken)):
        (tmp_path / f"{name}.py").write_text(source)
    first = importlib.import_module("plain_source").f
    second = importlib.import_module("broken_source").f
    assert statements_using(first, ["width"]) == [("plain_source.py", 2, "y = g(x, width=size.width)")]
    lines = ["y = g(", "    x,", "    width=size.width,", ")"]
    assert statements_using(second, ["width"]) == [("broken_source.py", 2 + i, line) for i, line in enumerate(lines)]
    assert [line for _, _, line in statements_using(first, ["height", "y"])][1:] == ["return y", "return x.height"]


def test_a_name_that_is_gone_is_an_error():
    with pytest.raises(LookupError, match=r"Block\.forward in model\.py: no statement uses gone, missing"):
        statements_using(Block.forward, ["missing", "attn", "gone"])
