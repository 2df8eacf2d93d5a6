"""What the README and docs/ show is run or looked up: commands, examples, the map of files, links and figures."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fastgpt import GPT, GPTConfig, ops
from fastgpt.benchmarks.publish import performance, quotes, report
from fastgpt.benchmarks.publish.rows import read
from fastgpt.ops import reference
from fastgpt.ops.backend import OPS
from fastgpt.tokenizer import CharTokenizer
from readme_commands import README, SPEECH, blocks, check_output, quicker, shell_commands

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {
    path.name: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
}
WRITTEN_BY_HAND = ["README.md", "CONTRIBUTING.md", *(f"{page}.md" for page in ("getting-started", "backends", "scale"))]
WRITTEN_BY_HAND += ["benchmarks.md", "gpu.md", "patching.md", "exporting.md", "serving.md", "losses.md"]


def run(words: list[str], cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


# --- commands ---------------------------------------------------------------------------------------------------------

ELSEWHERE = ("parity", "bench")  # they are run by test_parity.py and test_bench_command.py
COMMANDS_OF = {  # the README's are run by test_package.py, after an install
    "getting-started.md": ["train", "sample", "train", "data", "data", "train", "sample", "eval", "train", "compare"],
    "backends.md": ["doctor"],
    "scale.md": ["data", "plan", "plan"],
}


@pytest.fixture
def small(tmp_path) -> Path:
    """A folder with one short text, which stands in for Shakespeare's."""
    (tmp_path / "shakespeare.txt").write_text(SPEECH * 40)
    return tmp_path


def shortened(words: list[str], folder: Path) -> list[str]:
    """The same `fastgpt` command on little text and in few steps; all else stays as the reader would type it."""
    command, options = words[1], words[2:]
    if command in ("learn", "study") and not {"--data", "--checkpoint"} & set(options):
        options += ["--data", "shakespeare"]  # which is the default
    if "--data" in options and not (folder / options[options.index("--data") + 1]).is_file():
        options[options.index("--data") + 1] = str(folder / "shakespeare.txt")
    return [sys.executable, "-m", "fastgpt", command, *quicker(options, command)]


@pytest.mark.parametrize("document", COMMANDS_OF)
def test_the_commands_of_a_document_run_in_order(document, small):
    text = DOCUMENTS[document]
    for settings in blocks("toml", text):
        (small / "run.toml").write_text(settings.replace('"tinyshakespeare"', '"shakespeare.txt"'))
    for code in blocks("python", text):
        if "shouts.jsonl" in code:  # the data of a command
            run([sys.executable, "-c", code], small)
    commands = [w for w in shell_commands(text) if w[0] == "fastgpt" and w[1] not in ELSEWHERE]
    assert [words[1] for words in commands] == COMMANDS_OF[document]
    for words in commands:
        output = run(shortened(words, small), small)
        check_output(words, output, small)


@pytest.mark.parametrize("document", WRITTEN_BY_HAND)
def test_every_command_is_one_that_exists(document):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in shell_commands(DOCUMENTS[document]):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), words
        elif words[0] == "pip":
            extras = (".", ".[plot,data]", ".[bench]", "fastgpt-kernels[serve]")
            assert words[1] == "install" and words[-1] in extras and words[2:-1] in ([], ["--no-build-isolation"])
        elif words[0] == "git":
            assert words == ["git", "clone", "$URL", "fastgpt", "&&", "cd", "fastgpt"]
        elif words[0] == "torchrun":  # tests of training run it
            assert words[(module := words.index("-m")) : module + 3] == ["-m", "fastgpt", "train"]
        elif words[0] == ".":
            assert words[1:] == [".venv/bin/activate"]
        elif words[0] != "fastgpt":
            assert Path(words[0]).name == "python" and words[1] == "-m", words


def test_make_demo_trains_and_samples_as_written(small):
    """The recipe of `make demo`, taken from make itself; only the text and the number of steps are smaller."""
    touched = ["-o", str(Path(".venv/installed"))]  # as if the environment existed
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


# --- examples ---------------------------------------------------------------------------------------------------------


def test_the_examples_print_what_they_say(tmp_path):
    example, ops_alone = blocks("python")
    assert len(example.strip().splitlines()) <= 10
    (tmp_path / "example.py").write_text(example)
    nats, shape, explanation = run([sys.executable, "example.py"], tmp_path).splitlines()[:3]
    assert nats == "4.2 nats" and shape == "torch.Size([1, 12])" and explanation.startswith("attention: runs on")
    (tmp_path / "ops.py").write_text(ops_alone)
    run([sys.executable, "ops.py"], tmp_path)
    assert all(f"ops.{op}(" in ops_alone for op in OPS)


def test_the_example_of_backends_runs(tmp_path):
    (example,) = blocks("python", DOCUMENTS["backends.md"])
    (tmp_path / "example.py").write_text(example)
    assert run([sys.executable, "example.py"], tmp_path).startswith("attention: runs on")


def test_the_examples_of_losses_run(capsys):
    options, preferences = blocks("python", DOCUMENTS["losses.md"])
    exec(options, {})
    assert re.fullmatch(r"[\d.]+ nats, \d+% of the targets are the likeliest token\n", capsys.readouterr().out)
    exec(preferences, {})
    assert float(capsys.readouterr().out) > 0


def test_the_extras_are_explained():
    """Those that a reader asks for; `dev` is for those who work on FastGPT."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    table = DOCUMENTS["getting-started.md"].split("| extra | installs")[1].split("\n\n")[0]
    explained = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(explained) == sorted(set(extras) - {"dev"})


def test_the_examples_of_loading_generate_text_and_save(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = GPT(GPTConfig(vocab_size=13, n_layer=1, n_head=1, n_embd=8, block_size=8))
    model.tokenizer = CharTokenizer("\n .EIJLMORTUs")
    model.save_pretrained("runs/shakespeare")
    for example in blocks("python", DOCUMENTS["getting-started.md"]):
        exec(example, {})
    assert capsys.readouterr().out.startswith("ROMEO. ")
    assert (tmp_path / "out" / "config.json").exists() and (tmp_path / "out" / "tokenizer.json").exists()


# --- the map of files -------------------------------------------------------------------------------------------------


def listed_files() -> list[str]:
    """The names of Python files in the README's tree, each with its folders. A line's names are in the folder it names,
    or else in the folder above it."""
    listed: list[str] = []
    folders: list[str] = []
    for line in README.split("## Files")[1].split("```text\n")[1].split("```")[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        first = line.split()[0]
        if first.endswith("/"):
            folders.append(first)
        listed += ["".join(folders) + name for name in re.findall(r"[\w*]+\.py\b", line)]
    return listed


def test_the_map_lists_every_python_file_once():
    found = [path for name in listed_files() for path in ROOT.glob(name)]
    assert len(found) == len(set(found)), "a file is listed twice"
    folders = ("fastgpt", "triton_kernels", "benchmarks", "examples")
    there = {p for folder in folders for p in (ROOT / folder).rglob("*.py")}
    assert {str(p.relative_to(ROOT)) for p in there - set(found) if not p.name.startswith("__")} == set(), "not listed"
    for name in listed_files():
        assert any(ROOT.glob(name)), f"{name}: listed, but there is no such file"


def test_the_folders_of_the_map_exist():
    tree = README.split("## Files")[1].split("```text\n")[1].split("```")[0]
    for folder in re.findall(r"^([\w]+/)", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in tree, f"docs/{page.name} is not listed"


def test_everything_of_an_op_is_where_the_map_says():
    """`X` in the README's table stands for an op's name; add_layer_norm is in the files of layer_norm."""
    table = README.split("## Files")[1].split("```text")[0]
    paths = re.findall(r"`([\w/*.]+\.py|[\w/]+X\*)`", table)
    assert len(paths) >= 8
    stems = [op for op in OPS if op != "add_layer_norm"]
    for path in paths:
        found = [stem for stem in stems if any(ROOT.glob(path.replace("X", stem)))]
        assert found, path
        if path in ("fastgpt/ops/X.py", "tests/ops/test_X.py", "benchmarks/bench_X.py"):
            assert found == stems, path
    for op in OPS:
        assert callable(getattr(ops, op)) and callable(getattr(reference, op))


# --- links and figures ------------------------------------------------------------------------------------------------


def anchor(heading: str) -> str:
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_sections_that_links_name_exist(document):
    """test_docs.py looks for the files."""
    folder = ROOT if document in ("README.md", "CONTRIBUTING.md") else ROOT / "docs"
    for path, section in re.findall(r"\]\(([^)#:]*\.md)#([^)]+)\)", DOCUMENTS[document]):
        headings = re.findall(r"^#+ (.+)$", (folder / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert section in map(anchor, headings), f"{path}#{section}"


QUOTED = r"<!-- results: \S+ \S+ -->.*?<!-- end of results -->"
PLANNED = r"<!-- plan of [\d ]+ GPUs: .*? -->.*?<!-- end of plan -->"
# A number with the unit of a time, a rate, a ratio or a loss.
FIGURE = r"\d[\d.,]*(?: ms| s| seconds| minutes|x| times| nats| tokens/s| GB/s| [GT]FLOP/s)\b"
RESULTS = ROOT / "benchmarks" / "results"


def test_every_result_is_quoted_somewhere():
    quoted = re.findall(r"<!-- results: (\S+) \S+ -->", "".join(DOCUMENTS.values()))
    assert set(quoted) == set(quotes.QUOTES)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_quoted_is_what_was_measured(document):
    text = DOCUMENTS[document]
    found = re.findall(QUOTED, text, flags=re.DOTALL)
    assert len(found) == text.count("<!-- results: ")
    assert len(re.findall(PLANNED, text, flags=re.DOTALL)) == text.count("<!-- plan of ")
    assert quotes.with_quotes(text, RESULTS) == text, "make results"
    for block in found:
        if quotes.NOT_MEASURED in block:
            continue
        assert re.search(FIGURE, block) and re.search(r"torch\s\d", block) and re.search(r"commit\s[0-9a-f]{10}", block)


DECIMALS = {  # the only ones in the words of a document, and what each is
    "README.md": {"3.11": "Python", "1.20": "an example of a ratio"},
    "CONTRIBUTING.md": {"1.5": "GB of memory for a worker of pytest"},
    "getting-started.md": {
        "3.11": "Python",
        "2.11": "PyTorch",
        "0.8": "million parameters of the demo",
        "0.004": "an example of a learning rate",
        "0.128": "a learning rate times a width",
        "1.88": "nanoGPT's README",
        "1.1": "MB of data",
        "0.6": "the package shakespeare",
    },
    "backends.md": {"8.0": "compute capability"},
    "benchmarks.md": {},
    "patching.md": {},
    "losses.md": dict.fromkeys(("2204.02311", "2408.00118", "2305.18290"), "an article on arXiv"),
    "exporting.md": {},
    "serving.md": {"0.0": "a part of an address"},
    "scale.md": {},
    "gpu.md": {"8.0": "compute capability", "3.11": "Python", "3.12": "Python", "2.11": "torch", "3.6": "triton"},
}


@pytest.mark.parametrize("document", WRITTEN_BY_HAND)
def test_no_figure_is_written_by_hand(document):
    text = re.sub(f"{QUOTED}|{PLANNED}", "", DOCUMENTS[document], flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(FIGURE, text) == []
    assert set(re.findall(r"\b\d+\.\d+\b", text)) == set(DECIMALS[document])


def test_the_readme_is_short():
    assert len(README.splitlines()) < 200


def test_the_performance_page_is_what_the_rows_and_the_levers_say():
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8") == performance.markdown(RESULTS), (
        "make results"
    )
    expected = {ROOT / "docs" / "images" / f"{picture.name}.png" for picture in performance.pictures(RESULTS)}
    assert expected == set((ROOT / "docs" / "images").glob("performance-*.png")), "all are there, and none is left over"


def test_no_measured_row_is_faster_than_its_ceiling():
    """Rows that do not name their ceiling were measured before it followed the sizes of the work."""
    faster = [row for row in read([RESULTS]).rows if row.ceiling and row.roofline_fraction > 1.0]
    assert [(*row.case, row.implementation, row.ceiling) for row in faster] == []


def test_the_results_page_is_what_the_rows_say():
    found = read([RESULTS])
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == report.markdown(found), "make results"
    pictures = {ROOT / "docs" / name for name in re.findall(r"\]\((results/\S+)\)", report.markdown(found))}
    assert pictures == set((ROOT / "docs" / "results").glob("*.png")), "all are there, and none is left over"
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
