"""The facts that belong to a result: the device's name, the versions, and the commit of the sources."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastgpt import __version__, machine

CPU = torch.device("cpu")


def test_facts_of_this_machine():
    found = machine.facts(CPU)
    assert (found["torch"], found["fastgpt"]) == (torch.__version__, __version__)
    assert found["driver"] is None and found["cuda"] is None and found["device"] and found["threads"] >= 1


def test_generations_of_one_name_are_two_devices():
    """A virtual machine may call every generation of a maker's processors by one name; on Arm there is no name."""
    lines = "vendor_id : M\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n"
    names = {machine.processor_name(lines.format(family, model)) for family, model in ((25, 17), (26, 2))}
    assert names == {"AMD EPYC (family 25, model 17)", "AMD EPYC (family 26, model 2)"}
    assert machine.processor_name("model name : Intel(R) Xeon(R)\n") == "Intel(R) Xeon(R)"
    assert machine.processor_name("CPU architecture: 8\n") is None and machine.processor_name("") is None


def test_a_system_without_proc_cpuinfo_still_has_a_name(monkeypatch):
    monkeypatch.setattr(machine, "_cpuinfo", lambda: "")
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "arm64")
    assert machine.device_name(CPU) == "arm64" and machine.clocks_mhz(CPU) is None


def test_a_device_is_a_file_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert machine.device_slug(torch.device("cuda")) == "nvidia-h100-80gb-hbm3"
    slug = machine.device_slug(CPU)
    assert slug == slug.lower() and " " not in slug and slug.endswith("-cores")


def test_clocks(monkeypatch):
    monkeypatch.setattr(machine, "_cpuinfo", lambda: "cpu MHz\t: 2000.5\nother : 1\ncpu MHz\t: 3000.0\n")
    assert machine.clocks_mhz(CPU) == 2500.2
    for answer, expected in (("1980 MHz", 1980.0), ("[N/A]", None), (None, None)):
        monkeypatch.setattr(machine, "_nvidia_smi", lambda field, answer=answer: answer)
        assert machine.clocks_mhz(torch.device("cuda")) == expected


def test_versions_of_packages(tmp_path, monkeypatch):
    (tmp_path / "nightly_module.py").write_text('__version__ = "1.2"\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert machine.package_version("torch") == torch.__version__
    assert machine.package_version("nightly_module") == "1.2", "its distribution has another name"
    assert machine.package_version("not_a_package") is None


# ---- the commit ----


@pytest.fixture
def tree(tmp_path) -> Path:
    """A source tree with two files that git does not track yet."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    tree = tmp_path / "tree"
    (tree / "fastgpt").mkdir(parents=True)
    (tree / "fastgpt" / "machine.py").write_text("1\n")
    (tree / "benchmarks" / "results").mkdir(parents=True)
    (tree / "benchmarks" / "results" / "rows.jsonl").write_text("1\n")
    machine.commit.cache_clear()
    yield tree
    machine.commit.cache_clear()


def git(folder: Path, *words: str) -> str:
    name = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *name, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit_all(folder: Path) -> str:
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "files")
    return git(folder, "rev-parse", "HEAD")


def test_the_commit_of_a_source_tree_and_whether_it_has_changed(tree):
    head = commit_all(tree)
    (tree / "notes.txt").write_text("not tracked\n")
    (tree / "benchmarks" / "results" / "rows.jsonl").write_text("2\n")
    assert machine.commit(tree) == head and len(head) == 40
    (tree / "fastgpt" / "machine.py").write_text("2\n")
    machine.commit.cache_clear()
    assert machine.commit(tree) == head + "+"


def test_sources_without_a_repository_of_their_own_have_no_commit(tree):
    assert machine.commit(tree) is None
    machine.commit.cache_clear()
    commit_all(tree.parent)
    assert machine.commit(tree) is None, "another project's repository tracks them"


def test_sources_that_were_copied_without_their_history_may_be_told_their_commit(tree, monkeypatch):
    monkeypatch.setenv("FASTGPT_COMMIT", "0123456789abcdef")
    assert machine.commit(tree) == "0123456789abcdef"
    machine.commit.cache_clear()
    head = commit_all(tree)
    assert machine.commit(tree) == head, "the repository knows better"


def test_short_commits():
    assert machine.short_commit("0123456789abcdef") == "0123456789"
    assert machine.short_commit("0123456789abcdef+") == "0123456789+" and machine.short_commit(None) is None
