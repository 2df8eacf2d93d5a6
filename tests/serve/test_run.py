"""`fastgpt serve` as a process: it says where it listens, and ends when it is asked to."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastgpt.cli import main
from fastgpt.serve import run
from served_models import app_of, listening, small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "cats"
    small_model().save_pretrained(path)
    return path


def start(folder, *options: str) -> tuple[subprocess.Popen, dict[str, str]]:
    """The process, and what it said: the words before each colon."""
    command = [sys.executable, "-m", "fastgpt", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    said = {}
    for line in process.stdout:
        name, _, rest = line.strip().partition(": ")
        said[name] = rest
        if line.startswith("Ctrl-C"):
            return process, said
    raise AssertionError(process.communicate()[1])


def ask(address: str, **headers: str):
    request = urllib.request.Request(f"{address}v1/models", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_it_answers_and_ends_without_an_error(folder):
    process, said = start(folder)
    assert ask(said["page"])["data"][0]["id"] == "cats"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "stopped\n", "")


def test_other_machines_need_a_token(folder):
    process, said = start(folder, "--host", "0.0.0.0", "--name", "felines")
    try:
        address = said["page"]  # one that works here, which 0.0.0.0 does not everywhere
        assert address.startswith("http://127.0.0.1:") and "this machine's name" in said["from another machine"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(address)
        assert ask(address, Authorization=f"Bearer {said['token']}")["data"][0]["id"] == "felines"
    finally:
        process.terminate()
        assert process.communicate(timeout=60) == ("stopped\n", "") and process.returncode == 0


def test_a_port_that_is_taken_is_said_in_one_line(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(folder), "--port", port]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"--port {port}: cannot listen there: the port is taken" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "70000"], "--port: expected an integer from 0 to 65535"),
        (["--max-batch", "0"], "--max-batch: expected an integer from 1"),
        (["--max-queue", "-1"], "--max-queue: expected an integer from 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens: expected an integer of at least 1"),
        (["--stride", "0"], "--stride: expected an integer of at least 1"),
        (["--timeout", "0"], "--timeout: expected a number of seconds above 0"),
        (["--timeout", "nan"], "timeout: expected a finite number"),
        (["--token", ""], "--token: is empty"),
        (["--host", ""], "--host: is empty"),
    ],
)
def test_a_wrong_option_is_named(folder, options, words, capsys):
    assert main(["serve", str(folder), *options]) == 2
    assert words in capsys.readouterr().err


def test_without_the_server_library_the_extra_is_named(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(folder)]) == 1
    assert "pip install 'fastgpt-kernels[serve]'" in capsys.readouterr().err


def test_a_stride_that_is_too_long_is_named(folder, capsys):
    assert main(["serve", str(folder), "--stride", "33"]) == 2
    assert "--stride: expected at most 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sent", [b"", b"GET /health HTTP/1.1\r\nHost: loc", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET"]
)
def test_who_sends_no_headers_is_cut_off(sent, monkeypatch):
    monkeypatch.setattr(run, "HEADERS_WITHIN_S", 0.2)
    with listening(app_of(), run._patient(H11Protocol)) as address:
        host, _, port = address.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=60) as silent:
            silent.sendall(sent)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while part := silent.recv(10_000):
                    received += part
            assert received.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")


def test_a_long_answer_is_not_cut_off(monkeypatch):
    monkeypatch.setattr(run, "HEADERS_WITHIN_S", 1e-3)
    ask = {"prompt": "the", "max_tokens": 300}
    with listening(app_of(), run._patient(H11Protocol)) as address:
        body, headers = json.dumps(ask).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.loads(answer.read())["usage"]["completion_tokens"] == 300


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no time for what is not read")
def test_connections_have_a_time_in_which_what_is_sent_is_read():
    with run._listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname(), timeout=60):
        accepted, _ = listener.accept()
        with accepted:
            got = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert got == run.READ_WITHIN_S * 1000
