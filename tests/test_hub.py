"""Models by name, from a stand-in for the Hugging Face Hub: nothing here reaches a network."""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest

from fastgpt import hub
from fastgpt.files import FileError


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """The repositories that were asked for, with the files that each call fetched; it serves files of a GPT-2."""
    calls: list[tuple[str, list[str]]] = []
    files = {"config.json": '{"model_type": "gpt2"}', "model.safetensors": "", "vocab.json": "", "onnx/a.onnx": ""}
    files |= {"pytorch_model.bin": "", "README.md": ""}

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        if repository == "nobody/nothing":
            raise ConnectionError("the hub\nis not there")
        wanted = [name for name in files if any(fnmatch(name, pattern) for pattern in allow_patterns)]
        calls.append((repository, wanted))
        folder = tmp_path / "hub" / repository
        folder.mkdir(parents=True, exist_ok=True)
        for name in wanted:
            text = '{"model_type": "llama"}' if repository.endswith("llama") else files[name]
            (folder / name).write_text(text)
        return str(folder)

    stand_in = ModuleType("huggingface_hub")
    stand_in.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    return calls


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("gpt2-xl", "openai-community/gpt2-xl"),
        ("distilgpt2", "distilbert/distilgpt2"),
        ("someone/gpt2-of-mine", "someone/gpt2-of-mine"),
    ],
)
def test_a_name_is_fetched_with_the_files_that_are_read(here, fetched, tmp_path, name, repository):
    assert hub.model_place(name) == tmp_path / "hub" / repository
    assert fetched == [(repository, ["config.json"]), (repository, ["model.safetensors", "vocab.json"])]


def test_what_exists_here_counts_before_a_name(here, fetched):
    (here / "gpt2").mkdir()
    with pytest.warns(UserWarning, match=r"gpt2: the folder .*here.gpt2 is read, not the model of that name"):
        assert hub.model_place("gpt2").samefile(here / "gpt2")
    assert hub.model_place("runs/demo") == Path("runs/demo"), "a run, before there is one"
    (here / "runs" / "demo").mkdir(parents=True)
    for path in ("runs/demo", here / "runs" / "demo", "runs/typo", "a/b/c", "gpt3", "./a/b", "../gpt2", "/gpt2"):
        assert str(hub.model_place(path)) == str(path).removeprefix("./"), "a path, perhaps one that is missing"
    assert not fetched


def test_what_cannot_be_fetched_is_said_in_one_line(here, fetched, monkeypatch):
    with pytest.raises(
        FileError, match=r"nobody/nothing cannot be fetched .*connection.* \(ConnectionError the hub is"
    ) as error:
        hub.model_place("nobody/nothing")
    assert "\n" not in str(error.value)
    with pytest.raises(FileError, match="a/llama: is a model of type 'llama'; FastGPT reads 'gpt2'"):
        hub.model_place("a/llama")
    assert fetched == [("a/llama", ["config.json"])], "its weights are left where they are"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import then fails
    with pytest.raises(FileError, match=r"gpt2: is neither .* here, .*pip install huggingface_hub, or"):
        hub.model_place("gpt2")
