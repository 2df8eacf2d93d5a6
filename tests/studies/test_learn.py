"""`fastgpt learn`: the report of the stages, and the page and figures that are committed."""

from __future__ import annotations

import copy
import dataclasses
import html
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from fastgpt.cli import main
from fastgpt.model import Block
from fastgpt.studies import learn
from fastgpt.studies.learn_page import curves, final_losses, findings, is_side_branch, refreshed, table_rows
from fastgpt.studies.stages import LADDER, STAGES, code_of, config_of, find_stage
from figures import faults

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "from-bigram-to-gpt.md"
RESULTS = json.loads(PAGE.with_suffix(".json").read_text(encoding="utf-8"))
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 20


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """Steps of 128 tokens, short samples, and a token cache of one's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learn, "TOKENS_PER_STEP", 128)
        patch.setattr(learn, "SAMPLE_TOKENS", 20)
        patch.setenv("FASTGPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def out(small, text_file, tmp_path_factory) -> Path:
    """What `fastgpt learn --quick` leaves, after two steps a stage."""
    out = tmp_path_factory.mktemp("learn") / "out"
    assert main(["learn", "--data", str(text_file), "--out", str(out), "--quick", "--steps", "2"]) == 0
    return out


def test_a_stage_whose_code_is_gone_stops_the_command_before_it_trains(monkeypatch, text_file, tmp_path):
    gone = dataclasses.replace(STAGES[-1], code=((Block.forward, "gone"),))
    monkeypatch.setattr(learn, "STAGES", (*STAGES[:-1], gone))
    with pytest.raises(LookupError, match="gone"):
        learn.run(learn.LearnSettings(data=str(text_file), out=str(tmp_path / "out"), steps=1))
    assert not (tmp_path / "out").exists()


def test_learn_writes_a_report_of_every_stage(out):
    assert {p.name for p in out.iterdir()} == {
        "report.html",
        "results.json",
        "losses.png",
        "curves.png",
        "stages",
        "config.toml",
    }
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    lr = learn.LearnSettings.QUICK["lr"]
    assert results["settings"] == {"data": "text.txt", "quick": True, "steps": 2, "lr": lr, "seed": 1337}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "2 steps of 128 characters" in page and "Preview: measured with --quick" in page
    for row, s in zip(results["stages"], STAGES, strict=True):
        assert row["name"] == s.name and f". {s.name}</h2>" in page
        assert row["curve"][-1] == [2, row["loss"]] and len(row["sample"]) == 20
        for file, number, text in code_of(s):
            assert html.escape(f"{file}:{number}") in page and html.escape(text) in page
    assert "n_head: 1 -&gt; 4" in page and "model: bigram -&gt; positional-bigram" in page


def test_a_report_is_not_overwritten(out, text_file, capsys):
    before = (out / "report.html").read_bytes()
    assert main(["learn", "--data", str(text_file), "--out", str(out)]) == 1
    assert "already holds a run; add --resume to go on, or give another --out" in capsys.readouterr().err
    assert (out / "report.html").read_bytes() == before


def test_a_resumed_learn_trains_what_is_missing_and_ends_in_the_same_losses(out, text_file, tmp_path, capsys):
    parts = tmp_path / "parts"
    shutil.copytree(out, parts)
    for gone in (parts / "results.json", parts / "report.html"):
        gone.unlink()
    shutil.rmtree(parts / "stages" / "scaled-up")
    capsys.readouterr()
    assert main(["learn", "--out", str(parts), "--resume"]) == 0
    said = capsys.readouterr().out
    assert said.count("step 2: train loss") == 1, "the stage that was missing, with the settings of the others"
    whole, again = (json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in (out, parts))
    assert [row["loss"] for row in whole["stages"]] == [row["loss"] for row in again["stages"]]
    assert whole["settings"] == again["settings"]


def test_a_learn_that_is_resumed_without_a_run_is_refused(tmp_path, capsys):
    assert main(["learn", "--out", str(tmp_path), "--resume"]) == 1
    assert "holds no run to resume; leave --resume out to start one" in capsys.readouterr().err


def test_a_stage_can_be_sampled_from(out, capsys):
    for name in ("bigram", "position", "layer-norm-pre"):
        assert main(["sample", "--checkpoint", str(out / "stages" / name), "--max-new-tokens", "5"]) == 0
        assert len(capsys.readouterr().out) == 1 + 5 + 1


@pytest.mark.parametrize(
    ("text", "options", "message", "code"),
    [
        ("a" * 5000, [], "has one distinct character, 'a'", 1),
        ("abc" * 50, [], "a block of 64 needs 65", 1),
        (TEXT, ["--steps", "-1"], "steps: expected", 2),
        (TEXT, ["--steps", "0"], "steps: expected", 2),
        (TEXT, ["--lr", "0"], "lr: expected", 2),
        (TEXT, ["--device", "tpu9"], "device: 'tpu9'", 1),
    ],
)
def test_bad_input(text, options, message, code, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    command = ["learn", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), *options]
    assert main(command) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_findings_follow_the_numbers():
    assert "the loss falls with every stage." in findings(RESULTS)[0]
    other = copy.deepcopy(RESULTS)
    losses = {row["name"]: row for row in other["stages"]}
    losses["many heads"]["loss"] = losses["one head"]["loss"] + 0.1
    losses["+ dropout"]["loss"] = losses["+ layer norm, pre"]["loss"] - 0.25
    losses["+ layer norm, post"]["loss"] = losses["+ layer norm, pre"]["loss"] - 0.5
    losses["scaled up"]["loss"] = 9.0
    said = findings(other)
    assert 'does not fall with every stage: "many heads" (' in said[0]
    assert "the loss of post-norm is 0.500 lower than that of pre-norm" in said[2]
    assert "Dropout costs 0." in findings(RESULTS)[3] and "Dropout gains 0.250" in said[3]
    assert " lower." in findings(RESULTS)[4] and "higher: a larger model needs more than" in said[4]
    other["settings"]["steps"] = 1
    said = findings(other)
    assert "although the text was read less than 0.1 times." in said[3] and said[4].endswith(
        "needs more than 1 step to get ahead."
    )


def test_on_tinyshakespeare_the_ladder_falls_to_the_gpt():
    losses = {row["name"]: row["loss"] for row in RESULTS["stages"]}
    assert RESULTS["characters"] == 65 and RESULTS["training_tokens"] == 1_003_854
    assert 2.45 <= losses["bigram"] <= 2.55
    assert abs(losses["bigram"] - RESULTS["counted_bigram"]) < 0.03
    assert all(losses[b] < losses[a] for a, b in pairwise(LADDER))
    assert losses["scaled up"] == min(losses.values())
    for row in RESULTS["stages"]:
        assert row["config"] == dataclasses.asdict(config_of(find_stage(row["name"]), 65))


def test_the_numbers_of_the_page_are_those_of_the_results():
    """After a change of either: python -m fastgpt.studies.learn_page docs"""
    text = PAGE.read_text(encoding="utf-8")
    assert refreshed(text, RESULTS) == text
    assert refreshed(text.replace("2.482", "9.999"), RESULTS) == text
    with pytest.raises(LookupError, match="<!-- results -->"):
        refreshed(text.replace("<!-- results -->", ""), RESULTS)
    for name, *_, loss, _ in table_rows(RESULTS):
        assert re.search(rf"^\| {re.escape(name)} +\|.* {loss} \|", text, flags=re.MULTILINE)


def test_the_picture_of_the_losses_has_a_point_for_each_stage_and_post_norm_aside():
    figure = final_losses(RESULTS)
    assert faults(figure) == []
    (axes,) = figure.axes
    assert not axes.patches, "no bars: theirs would have to begin at 0"
    points = {(line.get_xdata()[0], line.get_marker()) for line in axes.lines if len(line.get_xdata()) == 1}
    assert points == {(row["loss"], "D" if row["name"] == "+ layer norm, post" else "o") for row in RESULTS["stages"]}
    assert [stage.name for stage in STAGES if is_side_branch(stage.name)] == ["+ layer norm, post"]
    ways = [text.arrow_patch.get_linestyle() for text in axes.texts if getattr(text, "arrow_patch", None)]
    assert len(ways) == len(STAGES) - 1 and len(set(ways)) == 2, "each stage is joined to what it builds on"


def test_the_curves_are_labelled_at_their_ends_and_told_apart():
    figure = curves(RESULTS)
    assert faults(figure) == []
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {stage.name for stage in STAGES}
    styles = {(line.get_marker(), line.get_linestyle()) for line in axes.lines}
    assert len(styles) == len(axes.lines) == len(STAGES), "without their colours, too"
    assert min(min(line.get_xdata()) for line in axes.lines) > 0


def test_a_sample_is_wrapped_where_the_page_does_not_wrap_it():
    results = copy.deepcopy(RESULTS)
    results["stages"][0]["sample"] = "ab cd " * 40
    text = refreshed(PAGE.read_text(encoding="utf-8"), results)
    assert max(map(len, text.split("`bigram` writes:")[1].split("```")[1].splitlines())) <= 80


def test_the_pictures_are_small():
    for name in ("losses", "curves"):
        picture = (ROOT / "docs" / "images" / f"learn-{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) < 100_000
