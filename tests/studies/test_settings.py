"""The settings of the studies: where they come from, and what --quick changes."""

from __future__ import annotations

import json

import pytest

from fastgpt.cli import main
from fastgpt.studies.settings import STUDIES, LearningRateSettings, question


def test_settings_come_from_command_line_then_file_then_quick(text_file, tmp_path):
    (tmp_path / "study.toml").write_text('quick = true\nrates = "1e-3"\nsteps = 3\n')
    arguments = ["--config", str(tmp_path / "study.toml"), "--steps", "2", "--data", str(text_file)]
    assert main(["study", "learning-rate", *arguments, "--out", str(tmp_path / "out")]) == 0
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    quick = LearningRateSettings.QUICK
    assert (settings["steps"], settings["rates"], settings["widths"]) == (2, "1e-3", quick["widths"])


@pytest.mark.parametrize("name", STUDIES)
def test_quick_changes_settings_that_exist(name):
    STUDIES[name](**STUDIES[name].QUICK)


def test_each_study_asks_a_question_of_its_own():
    questions = [question(name) for name in STUDIES]
    assert all(text.endswith("?") for text in questions) and len(set(questions)) == len(STUDIES)
