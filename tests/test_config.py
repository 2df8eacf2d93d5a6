"""Settings: paths and numbers as users bring them."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import tomllib
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch

from fastgpt.config import ConfigError, GPTConfig, TrainConfig, expand_path


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
        from fastgpt.config import expand_path, readable
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


def equal_and_plain(config, expected) -> bool:
    """Equal, of Python's own types, and what the files hold of it is read back as the same."""
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    assert all(type(v) in (int, float, bool, str, type(None)) for v in plain.values())
    assert json.loads(json.dumps(plain)) == plain
    toml = {name: value for name, value in plain.items() if value is not None}
    assert tomllib.loads(tomli_w.dumps(toml)) == toml
    return config == expected


def test_numbers_of_other_libraries() -> None:
    class Eleven:
        def __index__(self) -> int:
            return 11

    for three in (np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)):
        config = GPTConfig(vocab_size=Eleven(), n_head=three, n_embd=3 * three, bias=np.bool_(False))
        assert equal_and_plain(config, GPTConfig(vocab_size=11, n_head=3, n_embd=9, bias=False))
    for quarter in (np.float32(0.25), np.float16(0.25), Fraction(1, 4), Decimal("0.25"), torch.tensor(0.25)):
        assert equal_and_plain(GPTConfig(dropout=quarter), GPTConfig(dropout=0.25))
        assert equal_and_plain(
            TrainConfig(target_loss=quarter, seed=np.uint64(2**62)), TrainConfig(target_loss=0.25, seed=2**62)
        )
    assert equal_and_plain(TrainConfig(lr=np.int8(1)), TrainConfig(lr=1.0))
    assert equal_and_plain(GPTConfig(norm=np.str_("post")), GPTConfig(norm="post"))


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("n_layer", True, "an integer"),
        ("n_layer", np.bool_(True), "an integer"),
        ("n_layer", torch.tensor(True), "an integer"),
        ("n_layer", np.float64(2), "an integer"),
        ("n_layer", "2", "an integer"),
        ("n_layer", None, "an integer"),
        ("dropout", False, "a number"),
        ("dropout", 0.1j, "a number"),
        ("dropout", "0.1", "a number"),
        ("dropout", np.complex64(0), "a number"),
        ("dropout", np.float32("nan"), "a finite number"),
        ("dropout", Decimal("Infinity"), "a finite number"),
        ("dropout", 10**400, "a number"),
        ("bias", np.int64(1), "true or false"),
        ("norm", 1, "text"),
    ],
)
def test_what_is_no_such_value_is_refused(setting, value, expected) -> None:
    with pytest.raises(ConfigError, match=f"^{setting}: expected {expected}, got ") as error:
        GPTConfig(**{setting: value})
    assert repr(value) in str(error.value)
