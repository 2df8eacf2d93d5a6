"""Exports, each run without FastGPT: as the documentation shows it, and what is said where none can be made."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgpt
from command_line import TEXT
from fastgpt import GPT, GPTConfig, exporting
from fastgpt.baselines import MODELS
from fastgpt.checkpoint import CheckpointError
from fastgpt.cli import main
from fastgpt.exporting import BOUND, ExportError, export
from fastgpt.files import FileError
from fastgpt.tokenizer import CharTokenizer
from readme_commands import blocks, shell_commands

PAGE = Path(__file__).resolve().parent.parent / "docs" / "exporting.md"
SHAPE = {"block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8}


def made(kind: str = "gpt", **options):
    tokenizer = CharTokenizer("".join(sorted(set(TEXT + "ROMEO. "))))
    torch.manual_seed(0)
    model = MODELS[kind](GPTConfig(vocab_size=tokenizer.vocab_size, **{**SHAPE, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.tokenizer = tokenizer
    return model


@pytest.mark.skipif(not PAGE.is_file(), reason="the source tree is not here")
def test_the_examples_of_the_page_generate_the_models_text_without_fastgpt(tmp_path, monkeypatch, capfd) -> None:
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    page = PAGE.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    model = made()
    model.save_pretrained("runs/shakespeare")
    *commands, _ = shell_commands(page)  # the last one is for transformers, which has a test below
    for words in commands:
        assert words[:2] == ["fastgpt", "export"] and main(words[1:]) == 0, shlex.join(words)
        said = capfd.readouterr()
        assert "compared with the model at (B, T) = (1, 1), (3, 1), (2, 7), (1, 8): no logit differs by" in said.out
        assert not said.err, "the exporters of PyTorch are quiet"
        assert sorted(file.suffix for file in Path(words[4]).iterdir() if "json" not in file.suffix) in (
            [".onnx"],
            [".pt2"],
        )
    own, *examples, _ = blocks("python", page)
    exec(own, {})
    assert (tmp_path / "models/shakespeare/model.pt2").read_bytes() == (
        tmp_path / "models/shakespeare-torch/model.pt2"
    ).read_bytes()
    assert len(examples) == 2
    expected = model.generate_text("ROMEO. ", max_new_tokens=100, temperature=0.0)
    code = "\n".join(["import sys", "sys.modules['fastgpt'] = None", *examples])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{expected}\n" * 2
    capfd.readouterr()
    for place in ("models/shakespeare-onnx", "models/shakespeare-torch/model.pt2"):
        assert main(["sample", place, "--max-new-tokens", "1"]) == 1
        assert "holds no model that FastGPT reads; give the run or the folder" in capfd.readouterr().err


@pytest.mark.skipif(not PAGE.is_file(), reason="the source tree is not here")
def test_the_example_of_the_page_generates_with_transformers(tmp_path, monkeypatch, capfd) -> None:
    pytest.importorskip("transformers")
    page = PAGE.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    model = made()
    model.save_pretrained("runs/shakespeare")
    *_, words = shell_commands(page)
    assert main(words[1:]) == 0
    capfd.readouterr()
    *_, example = blocks("python", page)
    exec(example, {})
    n_new = SHAPE["block_size"] - len("ROMEO. ")
    expected = model.generate_text("ROMEO. ", max_new_tokens=n_new, temperature=0.0)
    assert capfd.readouterr().out == f"{expected}\n"


def test_a_recurrent_model_as_onnx_is_one_loop_of_standard_operations(tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    found = export(made("gru"), tmp_path / "model", "onnx")
    assert found.difference < found.bound == BOUND and (1, SHAPE["block_size"] + 1) in found.sizes
    written = onnx.load(tmp_path / "model" / "model.onnx")
    assert [(opset.domain, opset.version) for opset in written.opset_import] == [("", exporting.ONNX_OPSET)]
    assert [node.op_type for node in written.graph.node].count("Scan") == 1
    shape = [dim.dim_param for dim in written.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["B", "T"]
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["max_length"] is None and config["model"] == "gru" and config["opset"] == exporting.ONNX_OPSET


def test_transformers_reads_what_is_compared_and_stays_as_it_was(tmp_path, capfd) -> None:
    logging = pytest.importorskip("transformers").utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    found = export(made(), tmp_path / "model", "huggingface")
    assert 0.0 < found.difference < found.bound
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    said = capfd.readouterr()
    assert not said.out and not said.err


def test_without_transformers_its_format_is_written_and_not_compared(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    made().save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--format", "huggingface"]) == 0
    assert "not compared with the model: transformers, which reads this format, is not" in capsys.readouterr().out
    assert isinstance(fastgpt.load(tmp_path / "out")[0], GPT)


@pytest.mark.parametrize("found", [lambda logits: logits + 1e-3, lambda logits: logits[:, :-1]], ids=["off", "short"])
def test_an_export_that_computes_something_else_is_none(tmp_path, monkeypatch, found) -> None:
    model = made("bigram")
    monkeypatch.setitem(exporting._RUNNERS, "torch", lambda folder: lambda idx: found(model(idx)[0]))
    with pytest.raises(
        ExportError, match=r"^format: the export as torch cannot be made: at B=1, T=1 its logits differ"
    ):
        export(model, tmp_path / "model", "torch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("kind", ["bigram", "gpt"])
def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path, kind) -> None:
    """PyTorch's writer of .pt2 files calls std::terminate where it is destroyed after an error of its file."""
    (tmp_path / "model.pt2").symlink_to("/dev/full")
    with pytest.raises(FileError, match=r"model.pt2: cannot be written: No space left on device$"):
        exporting.write(made(kind, n_embd=64), tmp_path, "torch")


def test_what_cannot_be_exported_is_named(tmp_path) -> None:
    for model, format, error, words in (
        (made(), "pickle", ValueError, "format: expected one of fastgpt, huggingface, onnx, torch, got 'pickle'"),
        (made("lstm"), "huggingface", ValueError, "model: is a lstm, and only a gpt can be exported as huggingface"),
        (made(norm="post"), "huggingface", ValueError, "format: GPT-2 has norm='pre', this model has 'post'"),
        (made().train(), "torch", ValueError, "model: is in training mode, where it drops out"),
        (made().bfloat16(), "torch", ValueError, r"model: \S+ is bfloat16 on cpu; an export is made of float32 on the"),
        (torch.nn.Linear(2, 2), "torch", TypeError, "model: expected a model of fastgpt, got Linear"),
    ):
        with pytest.raises(error, match=f"^{words}"):
            export(model, tmp_path / "model", format)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_pytorch_cannot_trace_is_told_in_one_line(tmp_path) -> None:
    model = made("bigram")
    model.hidden = lambda idx, cache=None: model.table(idx) * float(idx.sum())  # a number that depends on the tokens
    with pytest.raises(ExportError, match=r"^format: PyTorch cannot export this model as torch: \w+: .+$") as error:
        export(model, tmp_path / "model", "torch")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_before_it_works(tmp_path, monkeypatch, capsys) -> None:
    made(norm="post").save_pretrained(tmp_path / "post")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    for words, code, said in (
        ("post --out new --format onnx", 2, "--format: onnx needs onnxruntime, which is not installed: pip install"),
        ("post --out new --format huggingface", 2, "--format: GPT-2 has norm='pre', this model has 'post'"),
        ("post --out full --format torch", 1, "full: holds something already; give another folder"),
        ("post --out full/notes.txt --format torch", 1, "notes.txt: the output folder cannot be written"),
    ):
        monkeypatch.chdir(tmp_path)
        assert main(["export", *words.split()]) == code
        assert said in (line := capsys.readouterr().err) and line.count("\n") == 1, line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "post"]


def test_a_folder_with_an_export_is_not_read_as_a_model(tmp_path) -> None:
    export(made("bigram"), tmp_path / "model", "torch")
    for read in (fastgpt.load, GPT.from_pretrained):
        with pytest.raises(
            CheckpointError, match=r"is an export for torch.export.load, and holds no model that FastGPT"
        ):
            read(tmp_path / "model")
