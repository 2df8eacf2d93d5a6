"""Every module has its tests where CONTRIBUTING.md says that they are."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# A module's path below fastgpt/ or, for the other two folders, below the repository.
MODULES = sorted(
    module.relative_to(parent)
    for parent, folder in ((ROOT / "fastgpt", "."), (ROOT, "triton_kernels"), (ROOT, "benchmarks"))
    for module in (parent / folder).rglob("*.py")
    if not module.stem.startswith("__")
)


def begin_alike(a: str, b: str) -> bool:
    return a == b or a.startswith(f"{b}_") or b.startswith(f"{a}_")


def files_of(module: Path) -> list[Path]:
    """The test files of a module, or of its package where the package has no folder of tests."""
    folder = TESTS / module.parent
    if not folder.is_dir():
        return files_of(module.parent)
    return [file for file in folder.glob("test_*.py") if begin_alike(file.stem, f"test_{module.stem}")]


@pytest.mark.skipif(not (ROOT / "triton_kernels").is_dir(), reason="the source tree is not here")
def test_every_module_has_a_test_file() -> None:
    assert MODULES
    missing = [str(module) for module in MODULES if not files_of(module)]
    assert not missing, "CONTRIBUTING.md says where the tests of a module are; none are there for " + ", ".join(missing)


def test_the_rule_finds_the_right_files() -> None:
    assert begin_alike("test_layouts_blocks", "test_layouts") and begin_alike("test_bench", "test_bench_attention")
    assert not begin_alike("test_linear", "test_lines") and not begin_alike("test_attention", "test_at")


def test_the_longest_files_are_there(request) -> None:
    conftest = request.config.pluginmanager.get_plugin(str(TESTS / "conftest.py"))
    assert [file for file in conftest.LONGEST if not (TESTS / file).is_file()] == []
