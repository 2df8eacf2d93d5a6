"""A study's report and its page: made from the results alone, and the committed page is up to date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastgpt.cli import main
from fastgpt.studies import STUDIES
from fastgpt.studies.page import Page, studies_page

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
    assert pictures and report.count("data:image/png") == len(pictures)
    assert "<table>" in report and found["torch"] in report


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_is_made_from_the_results_alone(study_folder, results, name):
    found = results(name)
    page = Page(found, pictures=False)
    report = (study_folder(name) / "report.html").read_text(encoding="utf-8")
    for part in page.parts:  # the pictures are in neither list
        assert part in report
    assert "| --- |" in page.text() or "---: |" in page.text()


def test_a_study_prints_its_table(text_file, tmp_path, capsys):
    arguments = ["--quick", "--data", str(text_file), "--out", str(tmp_path), "--rates", "1e-3", "--widths", "16"]
    assert main(["study", "learning-rate", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "| learning rate |" in printed and "the lowest loss" in printed and "report.html" in printed


def test_the_committed_page_is_that_of_the_committed_results():
    text, _ = studies_page(DOCS, pictures=False)
    assert (DOCS / "studies.md").read_text(encoding="utf-8") == text, "python -m fastgpt.studies.page docs"
    for name in STUDIES:
        assert (DOCS / "studies" / f"{name}.json").exists()
    pictures = {line.split("(images/")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert pictures == {file.name for file in (DOCS / "images").glob("study-*.png")}
