"""The documents: a link leads to a file that is there, and a class or function that is named is in that file."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

import fastgpt
from fastgpt.benchmarks.publish import performance, pictures, report
from fastgpt.benchmarks.publish.rows import read
from figures import faults

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROWS = ROOT / "benchmarks" / "results"
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
FILE = re.compile(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|h|cpp|cu|cuh|toml|md|json|yml))`")
DOTTED = re.compile(r"`(fastgpt(?:\.\w+)+)`")
BUILT = ("fastgpt._C", "fastgpt._C_cuda", "fastgpt._build_info")  # by setup.py, from csrc/


@functools.cache
def symbols(path: Path) -> set[str]:
    """The classes, functions and constants of a Python file; a method as Class.method."""
    found: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def broken_links(document: Path, text: str) -> list[str]:
    """What of the links in `text` leads nowhere."""
    problems = []
    for shown, target, anchor in LINK.findall(text):
        if re.match(r"\w+:", target):
            continue  # the web
        path = (document.parent / target).resolve()
        if not path.exists():
            problems.append(f"{target}: no such file")
        elif path.suffix == ".py":
            if anchor:
                problems.append(f"{target}{anchor}: a line's number goes stale; name a class or a function instead")
            symbol = re.fullmatch(r"`([\w.]+)`", shown)
            if symbol and "/" not in symbol[1] and symbol[1] not in symbols(path):
                problems.append(f"{target}: has no {symbol[1]}")
    return problems


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_to_what_they_name(document):
    assert broken_links(document, document.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_picture_has_a_text_that_stands_for_it(document):
    for text, picture in re.findall(r"!\[(.*?)\]\((.*?)\)", document.read_text(encoding="utf-8")):
        assert len(text.split()) > 1, picture


def test_the_pictures_of_the_rows_can_be_read():
    figures = {picture.name: pictures.case_roofline_figure(picture.roofline) for picture in performance.pictures(ROWS)}
    for table in report.all_tables(read([ROWS])):
        if table.picture and table.draw and table.picture.endswith(("attention", "train-step", "roofline")):
            figures[table.picture] = table.draw()
    found = {name: faults(figure) for name, figure in figures.items()}
    assert found and not any(found.values()), found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_files_that_are_named_are_there(document):
    """In backticks, from the root of the repository or from the package."""
    for name in FILE.findall(document.read_text(encoding="utf-8")):
        if "X" in name:
            continue  # it stands for an op's name, and test_readme.py looks the files up
        in_a_users_folder = name.startswith("runs/")
        assert in_a_users_folder or (ROOT / name).exists() or (ROOT / "fastgpt" / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_modules_and_functions_that_are_named_are_there(document):
    """`fastgpt.ops.attention` and the like, in backticks."""
    for name in DOTTED.findall(document.read_text(encoding="utf-8")):
        assert name in BUILT or exists(name), name


def exists(name: str) -> bool:
    """Whether a dotted name is a module of the package, something that is defined in one, or a public name."""
    parts = name.split(".")
    if parts[0] == "fastgpt" and parts[1:] in [[public] for public in fastgpt.__all__]:
        return True
    if parts[1] in ("triton_kernels", "benchmarks"):  # they are installed into the package from beside it
        del parts[0]
    for n in range(len(parts), 0, -1):
        file = ROOT.joinpath(*parts[:n])
        module = next((path for path in (file.with_suffix(".py"), file / "__init__.py") if path.is_file()), None)
        if module is not None:
            return n == len(parts) or ".".join(parts[n:]) in symbols(module)
    return False


def test_what_is_gone_is_noticed():
    page = ROOT / "docs" / "page.md"
    for text, problem in (
        ("[`GPT`](../fastgpt/gone.py)", "../fastgpt/gone.py: no such file"),
        ("[`GTP`](../fastgpt/model.py)", "../fastgpt/model.py: has no GTP"),
        ("[`GPT.gone`](../fastgpt/model.py)", "../fastgpt/model.py: has no GPT.gone"),
        ("[`GPT`](../fastgpt/model.py#L3)", "../fastgpt/model.py#L3: a line's number goes stale; "),
    ):
        (found,) = broken_links(page, text)
        assert found.startswith(problem)
    assert broken_links(page, "[`GPT.hidden`](../fastgpt/model.py) [a page](https://example.org/x.py#L3)") == []
    assert exists("fastgpt.config.GPTConfig.preset") and not exists("fastgpt.config.GTP") and not exists("gone.x")
