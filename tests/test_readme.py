"""What the README shows is run: its commands, its example, its file tree, and the targets of `make`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt.benchmarks.publish import quotes, report
from fastgpt.benchmarks.publish.rows import read
from fastgpt.ops.backend import OPS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SPEECH = "ROMEO. But soft, what light through yonder window breaks?\nJULIET. It is KING HENRY, 1599!\n\n"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def shell_commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(words: list[str], cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


def as_module(words: list[str]) -> list[str]:
    return [sys.executable, "-m", *words]


@pytest.fixture
def small(tmp_path) -> Path:
    """A folder in which `shakespeare` is one short file and a run is a few steps long."""
    (tmp_path / "shakespeare.txt").write_text(SPEECH * 40)
    return tmp_path


def shortened(words: list[str], folder: Path) -> list[str]:
    """The same command on little text and few steps; everything else stays as the reader would type it."""
    words = [str(folder / "shakespeare.txt") if w.endswith("shakespeare") and words[i] == "--data" else w
             for i, w in enumerate(words[1:])]  # fmt: skip
    words = [sys.executable, "-m", "fastgpt", *words]
    if words[3] == "train":
        if "--max-steps" in words:
            del words[(i := words.index("--max-steps")) : i + 2]
        words += ["--max-steps", "6" if "--resume" in words else "3", "--eval-batches", "1"]
    if words[3] == "learn":
        words += ["--steps", "1"]
    return words


def test_the_commands_of_the_readme_run_in_order(small):
    commands = [words for words in shell_commands() if words[0] == "fastgpt" and words[1] not in ("parity", "bench")]
    assert [words[1] for words in commands] == ["train", "sample", "train", "doctor", "data", "learn"]
    outputs = [run(shortened(words, small), small) for words in commands]
    assert "step 3:" in outputs[0]
    assert outputs[1].startswith("ROMEO. ") and len(outputs[1]) == len("ROMEO. ") + 200 + 1
    assert "step 6:" in outputs[2]
    assert "attention: runs on" in outputs[3]
    assert "blocks: 8 tokens" in outputs[4]
    assert "| scaled up |" in outputs[5] and (small / "runs/learn/report.html").exists()


def test_the_other_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in shell_commands():
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), words
        elif words[0] == "pip":
            extras = (".", ".[plot,data]", ".[bench]")
            assert words[1] == "install" and words[-1] in extras and words[2:-1] in ([], ["--no-build-isolation"])
        else:
            assert words[0] == "fastgpt"


def test_make_demo_trains_and_samples_as_written(small):
    """The recipe of `make demo`, taken from make itself; only the text and the number of steps are smaller."""
    touched = ["-o", str(Path(".venv/installed"))]  # as if the environment were there
    recipe = run(["make", "-n", *touched, "-C", str(ROOT), "demo"], ROOT)
    commands = [shlex.split(line) for line in recipe.splitlines() if "fastgpt" in line.split(" ")[0]]
    assert [words[1] for words in commands] == ["train", "sample"]
    for words in commands:
        output = run(shortened(words, small), small)
    assert output.startswith("KING HENRY. ")
    assert (small / "runs/demo/loss.png").exists()


def test_make_test_is_what_ci_runs():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    recipe = run(["make", "-n", "-o", ".venv/installed", "-C", str(ROOT), "test"], ROOT)
    for tool in ("ruff format --check", "ruff check", "mypy", "pytest"):
        assert tool in recipe


def test_the_example_prints_what_it_says(tmp_path):
    example, ops_alone = blocks("python")
    assert len(example.strip().splitlines()) <= 10
    (tmp_path / "example.py").write_text(example)
    nats, shape, explanation = run([sys.executable, "example.py"], tmp_path).splitlines()[:3]
    assert nats == "4.2 nats" and shape == "torch.Size([1, 12])" and explanation.startswith("attention: runs on")
    (tmp_path / "ops.py").write_text(ops_alone)
    run([sys.executable, "ops.py"], tmp_path)
    assert all(f"ops.{op}(" in ops_alone for op in OPS)


def test_the_file_tree_is_the_files():
    tree = README.split("## The files")[1].split("```")[1]
    listed = set(re.findall(r"^  ([\w/]+\.py) ", tree, flags=re.MULTILINE))
    package = ROOT / "fastgpt"
    there = {str(p.relative_to(package)) for p in package.rglob("*.py") if not p.name.startswith("__")}
    assert listed == there


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).is_file(), target


QUOTED = r"<!-- results: \S+ \S+ -->.*?<!-- end of results -->"
# A number with the unit of a time, a rate, a ratio or a loss.
FIGURE = r"\d[\d.,]*(?: ms| s| seconds| minutes|x| times| nats| tokens/s| GB/s| [GT]FLOP/s)\b"
RESULTS = ROOT / "benchmarks" / "results"


def test_what_is_quoted_is_what_was_measured():
    assert len(re.findall(QUOTED, README, flags=re.DOTALL)) == README.count("<!-- results: ") > 0
    assert quotes.with_quotes(README, RESULTS) == README, "make results"
    kernels = (ROOT / "docs" / "kernels-native.md").read_text(encoding="utf-8")
    assert "<!-- results: " in kernels and quotes.with_quotes(kernels, RESULTS) == kernels, "make results"
    for block in re.findall(QUOTED, README, flags=re.DOTALL):
        assert re.search(FIGURE, block) and re.search(r"torch \d", block) and re.search(r"commit\s[0-9a-f]{10}", block)


def test_no_figure_is_written_by_hand():
    written = re.sub(QUOTED, "", re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL), flags=re.DOTALL)
    assert re.findall(FIGURE, written) == []
    others = {
        "3.11": "Python",
        "0.8": "million parameters of the demo",
        "2.11": "PyTorch",
        "1.88": "nanoGPT's README",
        "1.1": "MB of data",
    }
    assert re.findall(r"\b\d+\.\d+\b", written) == list(others)


def test_the_results_page_is_what_the_rows_say():
    found = read([RESULTS])
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == report.markdown(found), "make results"
    pictures = {ROOT / "docs" / name for name in re.findall(r"\]\((results/\S+)\)", report.markdown(found))}
    assert pictures == set((ROOT / "docs" / "results").glob("*.png")), "all are there, and none is left over"
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
