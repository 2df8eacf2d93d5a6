"""Paths as users bring them, and files that are written whole or not at all, in UTF-8 whatever the locale."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from fastgpt import files
from fastgpt.config import ConfigError
from fastgpt.files import (
    FileError,
    allow_open_files,
    atomic_path,
    expand_path,
    link_or_copy,
    make_output_folder,
    new_folder,
)


def test_a_really_full_disk(tmp_path):
    """/dev/full refuses every write: the error of the operating system itself, through safetensors' own writer."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with pytest.raises(FileError, match="cannot be written"), atomic_path(tmp_path / "x.json") as temporary:
        temporary.symlink_to("/dev/full")
        with open(temporary, "w") as file:
            file.write("x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Threads of one process, or two machines with equal process numbers: the last to end has its file there, whole."""
    path = tmp_path / "config.json"
    with atomic_path(path) as first:
        first.write_text("first", encoding="utf-8")
        with atomic_path(path) as second:
            second.write_text("second", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "second"
    assert path.read_text(encoding="utf-8") == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_link_falls_back_to_a_copy(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError("hard links are not supported")

    monkeypatch.setattr(files.os, "link", no_links)
    (tmp_path / "a").write_text("x")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "x"


def test_an_output_folder_is_made_or_refused_with_the_remedy(tmp_path):
    make_output_folder(tmp_path / "a" / "b")
    make_output_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == [], "what tried whether it can be written to is gone"
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"file: the output folder cannot be written: .*; give another --out"):
        make_output_folder(tmp_path / "file")


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "models" / "first"
    with pytest.raises(FileError, match=r"first.x: cannot be written$"), new_folder(folder) as temporary:
        (temporary / "x").write_text("half", encoding="utf-8")
        assert not folder.exists()
        raise FileError(f"{temporary / 'x'}: cannot be written")
    with pytest.raises(KeyboardInterrupt), new_folder(folder) as temporary:
        raise KeyboardInterrupt
    with pytest.raises(FileError, match=r"first: cannot be written: No space left"), new_folder(folder):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(folder.parent.iterdir()) == []
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    with new_folder(tmp_path / "link") as temporary:
        (temporary / "x").write_text("whole", encoding="utf-8")
    assert [path.name for path in folder.iterdir()] == ["x"] and list(folder.parent.iterdir()) == [folder]
    with pytest.raises(FileError, match=r"first: holds something already"), new_folder(folder):
        pass
    with pytest.raises(FileError, match=r"y: the output folder cannot be written: "), new_folder(folder / "x" / "y"):
        pass


def test_the_limit_of_open_files_is_raised_where_the_system_allows_it(monkeypatch) -> None:
    resource = pytest.importorskip("resource")
    limits = [1024, 4096]

    def set_limits(what, new):
        limits[:] = new

    monkeypatch.setattr(resource, "getrlimit", lambda what: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", set_limits)
    allow_open_files(500)
    assert limits == [1024, 4096]
    allow_open_files(2000)
    assert limits[0] >= 2100 and limits[1] == 4096
    with pytest.raises(FileError, match="4,000 files have to be open at once, and the system allows 4,096"):
        allow_open_files(4000)
    limits[1] = resource.RLIM_INFINITY
    allow_open_files(4000)
    assert limits[0] >= 4100


def test_home_folders_are_expanded(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_path("~/runs/é a") == expand_path(Path("~/runs/é a")) == tmp_path / "runs" / "é a"
    assert expand_path("~") == tmp_path
    for path in ("run", "a/~/b", "/x~", "a~"):
        assert expand_path(path) == Path(path)


def test_an_unknown_home_folder_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^'~no user/run': the home folder '~no user' is not known here") as error:
        expand_path("~no user/run")
    assert "\n" not in str(error.value)
    (tmp_path / "~notes.txt").touch()
    assert expand_path("~notes.txt") == Path("~notes.txt")


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8"}


def test_files_are_utf_8_whatever_the_locale(tmp_path) -> None:
    """Names, texts, tokenizers and settings, in a process that knows ASCII alone."""
    code = r"""
        import sys
        from pathlib import Path
        from fastgpt import GPT, GPTConfig
        from fastgpt.files import expand_path, readable
        from fastgpt.data.corpus import Corpus
        from fastgpt.training.run_folder import RunFolder, plot_loss

        folder = readable(sys.argv[1])
        assert folder == sys.argv[2].encode().decode("unicode-escape")
        corpus = Corpus.load(folder + "/\u00e9t\u00e9.txt", "bpe", vocab_size=260, block_size=2)
        assert "na\u00efve" in corpus.tokenizer.decode(corpus.val)
        model = GPT(GPTConfig(vocab_size=260, n_layer=1, n_head=1, n_embd=8))
        model.save_pretrained(folder + "/mod\u00e8le")
        assert GPT.from_pretrained(folder + "/mod\u00e8le").cfg == model.cfg
        RunFolder(expand_path(folder)).write_settings({"out": sys.argv[1]})
        run = RunFolder(expand_path(folder))
        run.metrics_path.write_text('{"step": 1, "split": "val", "loss": 2.0}', encoding="utf-8")
        assert plot_loss(run.metrics_path, run.path / "loss.png") is None
    """
    folder = tmp_path / "dossier é"
    folder.mkdir()
    (folder / "été.txt").write_text("Ça, c'est naïf: naïve.\n" * 50, encoding="utf-8")
    arguments = [str(folder), str(folder).encode("unicode-escape").decode("ascii")]
    environment = {**os.environ, **ASCII, "FASTGPT_CACHE": str(folder / "café")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")) == {"out": str(folder)}
    assert sorted(f.name for f in folder.iterdir()) == [
        "café",
        "config.toml",
        "loss.png",
        "metrics.jsonl",
        "modèle",
        "été.txt",
    ]


ROOT = Path(__file__).parent.parent
SOURCES = [file for place in ("fastgpt", "benchmarks", "triton_kernels") for file in (ROOT / place).rglob("*.py")]


def takes_the_locales_encoding(call: ast.Call) -> bool:
    """Whether `call` reads or writes text, and does not say in which encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if name == "open" and isinstance(call.func, ast.Name):
        mode = given.get("mode", call.args[1] if len(call.args) > 1 else ast.Constant("r"))
        return "encoding" not in given and "b" not in ast.literal_eval(mode)
    if name == "read_text" and call.args:  # of importlib.metadata: the name of a file, which is UTF-8
        return False
    text_output = "text" in given or "universal_newlines" in given
    return "encoding" not in given and (name in ("read_text", "write_text") or text_output)


def test_no_text_is_read_or_written_in_the_locales_encoding() -> None:
    """openai/gpt-2#28, karpathy/nanoGPT#711: what was read as cp1252 on one machine is UTF-8 on all others."""
    found = []
    for file in [*SOURCES, ROOT / "setup.py"]:
        calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        found += [f"{file.relative_to(ROOT)}:{call.lineno}" for call in calls if takes_the_locales_encoding(call)]
    assert len(SOURCES) > 40 and found == []


def test_what_takes_the_locales_encoding() -> None:
    def found(code: str) -> bool:
        return takes_the_locales_encoding(ast.parse(code, mode="eval").body)

    assert all(map(found, ("open(f)", "open(f, 'w')", "f.read_text()", "f.write_text(t)", "run(c, text=True)")))
    assert not any(map(found, ("open(f, 'rb')", "open(f, encoding=e)", "f.read_text(encoding=e)", "f.read_bytes()")))
