"""The files of levers: what is read, and that an error names the file and the entry."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastgpt.benchmarks.publish import levers
from fastgpt.benchmarks.publish.rows import ResultsError

ROOT = Path(__file__).resolve().parents[2]
# The example of the module's docstring.
ENTRY = re.search(r"( +\[\[lever\]\].*?)\n\n?$", levers.__doc__, re.DOTALL)[1]


def test_the_example_of_the_docstring_is_a_lever(tmp_path):
    (tmp_path / "norms.toml").write_text(f"{ENTRY}\n{ENTRY}")
    (tmp_path / "linear.toml").write_text(ENTRY.replace("0.9  ", '"a third less"'))
    found = levers.read_levers(tmp_path)
    assert list(found) == ["linear", "norms"] and len(found["norms"]) == 2
    (lever,) = found["linear"]
    assert (lever.predicted, lever.before, lever.after, lever.unit) == ("a third less", 1.3, 0.95, "ms")
    assert lever.kept and lever.lines == 12 and lever.commit == "0123456" and lever.name.startswith("the input")
    assert levers.read_levers(tmp_path / "nothing") == {}


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("before = 1.3", 'before = "1.3"', "before: expected a number above 0, got '1.3'"),
        ("after = 0.95", "after = 0", "after: expected a number above 0, got 0"),
        ("after = 0.95", "after = nan", "after: expected a number above 0, got nan"),
        ("predicted = 0.9", "predicted = true", "predicted: expected a number above 0, or text, got True"),
        ("kept = true", "kept = 1", "kept: expected true or false, got 1"),
        ("lines = 12", "lines = 1.5", "lines: expected a whole number, got 1.5"),
        ('unit = "ms"', 'unit = ""', "unit: expected text, got ''"),
        ('unit = "ms"', "", "unit: is missing"),
        ('unit = "ms"', 'unit = "ms"\nspeed = 1', "speed: is no key of a lever"),
        ('commit = "0123456"', 'commit = "main"', "commit: expected the hash of a commit, got 'main'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, old, new, message):
    assert old in ENTRY
    (tmp_path / "norms.toml").write_text(f"{ENTRY}\n{ENTRY.replace(old, new)}")
    with pytest.raises(ResultsError) as error:
        levers.read_levers(tmp_path)
    assert (
        str(error.value)
        == f"{tmp_path / 'norms.toml'}, lever 2 (the input's gradient is added inside the kernel): {message}"
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("[[lever", "cannot be read: "),
        ("", "expected entries [[lever]] and nothing else"),
        ("lever = 3", "expected entries [[lever]] and nothing else"),
        (f"title = 'x'\n{ENTRY}", "expected entries [[lever]] and nothing else"),
        ("lever = [3]", "lever 1: expected a table of keys, got 3"),
        ("[[lever]]\nname = 3", "lever 1: "),
    ],
)
def test_a_file_that_holds_no_levers_is_named(tmp_path, text, message):
    (tmp_path / "norms.toml").write_text(text)
    with pytest.raises(ResultsError, match=re.escape("norms.toml") + ".*" + re.escape(message)):
        levers.read_levers(tmp_path)


def test_the_committed_levers_can_be_read():
    levers.read_levers(ROOT / "benchmarks" / "results" / "levers")
