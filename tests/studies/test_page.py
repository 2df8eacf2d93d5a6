"""Pages are made from results alone, and the committed page is up to date; the words and panels that pages share."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from fastgpt.cli import main
from fastgpt.studies.page import (
    Page,
    counted,
    duration,
    find_row,
    listed,
    loss_text,
    or_nan,
    studies_page,
    together,
)
from fastgpt.studies.settings import STUDIES, AttentionSettings
from figures import faults

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_leaves_a_report_results_and_pictures(study_folder, results, name):
    found = results(name)
    assert found["study"] == name and found["settings"]["quick"] is True and found["rows"]
    for fact in ("device", "threads", "python", "torch", "fastgpt", "commit", "date", "seconds"):
        assert fact in found
    assert str(study_folder(name)) not in json.dumps(found), "no path of this machine"
    report = (study_folder(name) / "report.html").read_text(encoding="utf-8")
    pictures = list((study_folder(name)).glob("*.png"))
    # A model that has hardly been trained attends to everything alike, and such maps are not drawn.
    assert pictures or (name == "attention" and "No picture of" in report)
    assert report.count("data:image/png") == len(pictures)
    assert "<table>" in report and found["torch"] in report


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_is_made_from_the_results_alone(study_folder, results, name):
    found = results(name)
    page = Page(found, pictures=False)
    report = (study_folder(name) / "report.html").read_text(encoding="utf-8")
    for part in page.parts:  # the pictures are in neither list
        assert part in report
    assert "-- |" in page.text() or "-: |" in page.text()


def test_a_study_prints_its_table(text_file, tmp_path, capsys):
    arguments = ["--quick", "--data", str(text_file), "--out", str(tmp_path), "--rates", "1e-3", "--widths", "16"]
    arguments += ["--steps", "2"]
    assert main(["study", "learning-rate", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "| learning rate |" in printed and "the lowest loss" in printed
    assert re.search(r"report\.html: (less than a second|\d+ seconds?) of measuring", printed)


def test_the_committed_page_is_that_of_the_committed_results():
    text, _ = studies_page(DOCS, pictures=False)
    assert (DOCS / "studies.md").read_text(encoding="utf-8") == text, "python -m fastgpt.studies.page docs"
    for name in STUDIES:
        assert (DOCS / "studies" / f"{name}.json").exists()
    pictures = {line.split("(images/")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert pictures == {file.name for file in (DOCS / "images").glob("study-*.png")}


@pytest.mark.parametrize("name", STUDIES)
def test_the_pictures_can_be_read(name, results, monkeypatch):
    """Those of the committed results, and those of a small run, where fewer may be worth drawing."""
    pytest.importorskip("matplotlib")
    found: list[list[str]] = []
    monkeypatch.setattr(Page, "figure", lambda self, figure, name, caption: found.append(faults(figure)))
    Page(json.loads((DOCS / "studies" / f"{name}.json").read_text(encoding="utf-8")))
    assert found
    Page(results(name))
    assert not any(found), found


def test_a_preview_says_what_is_smaller(results):
    found = results("attention")
    assert "Preview: measured with --quick" in Page(found, pictures=False).text()
    assert f"steps {found['settings']['steps']} (in full: {AttentionSettings().steps})" in Page(found, False).text()
    assert "prompt BE" not in Page(found, pictures=False).text(), "a prompt is no size"
    found["settings"]["quick"] = False
    assert "Preview" not in Page(found, pictures=False).text()


def test_sentences_and_one_picture_come_before_all_numbers(results):
    for name in STUDIES:
        kinds = [kind for kind, text in Page(results(name), pictures=False).blocks]
        before = kinds[: kinds.index("mark")]
        assert before in (["words", "words", "picture", "words"], ["words", "words", "words", "words"])


def test_a_table_that_is_wider_than_the_terminal_is_left_to_the_report(results):
    page = Page(results("normalisation"), pictures=False)
    assert "| step |" in page.text() and "| step |" in page.text(columns=250)
    narrow = page.text(columns=60)
    assert "| step |" not in narrow and "The report has a table here" in narrow
    assert max(map(len, narrow.splitlines())) <= 60


def test_numbers_in_words():
    assert [duration(seconds) for seconds in (0.0, 0.6, 28.4, 60.0, 388.0)] == [
        "less than a second",
        "1 second", "28 seconds", "1 min 0 s", "6 min 28 s",
    ]  # fmt: skip
    assert together([2]) == "2" and together([2, 6, 16]) == "2, 6 and 16"
    assert [counted(n, "row") for n in (0, 1, 8)] == ["0 rows", "1 row", "8 rows"]
    assert listed(["a", "b"]) == "a, b" and listed([]) == "none" and listed([], "no row") == "no row"
    assert loss_text(1.23456) == "1.235" and loss_text(None) == "not finite"


def test_a_row_is_found_by_all_of_its_values():
    rows = [{"depth": 2, "norm": "pre"}, {"depth": 2, "norm": "post"}]
    assert find_row(rows, depth=2, norm="post") is rows[1] and find_row(rows, depth=2) is rows[0]
    with pytest.raises(StopIteration):
        find_row(rows, depth=3)


def test_a_loss_that_is_missing_leaves_a_gap():
    first, second = or_nan([1.5, None])
    assert first == 1.5 and math.isnan(second)
