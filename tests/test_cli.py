"""The command line as a user meets it: what is printed, where files go, and the exit codes 0, 2 and 1."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt import __version__
from fastgpt.cli import COMMANDS, main
from fastgpt.ops.backend import OPS
from fastgpt.train import read_metrics

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 30
SMALL = "--block-size 16 --n-layer 1 --n-head 2 --n-embd 16 --batch-size 4 --max-steps 6 --eval-interval 3".split()
SMALL += "--eval-batches 1 --log-interval 3 --device cpu".split()


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, text_file) -> Path:
    """A finished run's folder; the tests below read it and leave it as it is."""
    out = tmp_path_factory.mktemp("run") / "first"
    assert main(["train", "--data", str(text_file), "--out", str(out), *SMALL]) == 0
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_leaves_the_files_of_the_design(run):
    assert set(files(run)) == {
        "config.toml",
        "metrics.jsonl",
        "loss.png",
        "checkpoint/latest.safetensors",
        "checkpoint/best.safetensors",
    }


def test_sample_prints_the_prompt_and_repeats_with_the_seed(run, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        arguments = f"--prompt All --max-new-tokens 40 --seed {seed} --device cpu".split()
        assert main(["sample", "--checkpoint", str(run), *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("All") and len(texts[0]) == 3 + 40 + 1


def test_sample_takes_a_file_and_every_sampling_option(run, capsys):
    file = run / "checkpoint" / "latest.safetensors"
    arguments = "--max-new-tokens 5 --temperature 0 --top-k 3 --top-p 0.9".split()
    assert main(["sample", "--checkpoint", str(file), *arguments]) == 0
    assert len(capsys.readouterr().out) == 1 + 5 + 1


def test_settings_come_from_command_line_then_file_then_preset(text_file, tmp_path, capsys):
    import tomllib

    config = tmp_path / "run.toml"
    config.write_text(
        f'preset = "shakespeare-char-cpu"\ndata = "{text_file}"\nout = "{tmp_path / "out"}"\n'
        "n_layer = 1\nn_embd = 8\nn_head = 2\nmax_steps = 2\nbatch_size = 3\neval_batches = 1\ndropout = 0\n"
    )
    assert main(["train", "--config", str(config), "--n-embd", "12"]) == 0
    stored = tomllib.loads((tmp_path / "out" / "config.toml").read_text())
    assert (stored["n_embd"], stored["n_layer"], stored["block_size"]) == (12, 1, 64)
    capsys.readouterr()
    settings = tmp_path / "sample.toml"
    settings.write_text(f'checkpoint = "{tmp_path / "out"}"\nmax_new_tokens = 3\n')
    assert main(["sample", "--config", str(settings)]) == 0
    assert len(capsys.readouterr().out) == 1 + 3 + 1


def test_resume_goes_on_and_keeps_the_new_settings(text_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train", "--data", str(text_file), "--out", str(out), *SMALL]) == 0
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--max-steps", "9", "--lr", "0.002"]) == 0
    said = capsys.readouterr().out
    assert "max_steps: 6 -> 9, which the learning rate's schedule follows" in said and "lr: 0.001 -> 0.002" in said
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl") if r["split"] == "val"] == [0, 3, 6, 9]
    assert main(["train", "--out", str(out), "--resume"]) == 0, "a finished run is simply done"
    assert read_metrics(out / "metrics.jsonl")[-1]["step"] == 9
    capsys.readouterr()
    same = text_file.with_name("same.txt")
    same.write_text(text_file.read_text())
    changes = ["--max-steps", "5", "--data", str(same), "--backend", "torch"]
    assert main(["train", "--out", str(out), "--resume", *changes]) == 0
    said = capsys.readouterr().out
    assert "max_steps: 9 -> 5, but step 9 is reached already: there is nothing to do" in said
    assert f"data: {text_file} -> {same}" in said and "backend: auto -> torch" in said and "out:" not in said


def test_bpe_tokenizer(text_file, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--tokenizer", "bpe", "--vocab-size", "300", *SMALL]
    assert main(["train", "--data", str(text_file), "--out", str(out), *arguments]) == 0
    capsys.readouterr()
    assert main(["sample", "--checkpoint", str(out), "--prompt", "naïve ☃", "--max-new-tokens", "10"]) == 0
    assert capsys.readouterr().out.startswith("naïve ☃"), "bytes can spell any text"


def test_a_text_too_short_for_so_many_tokens_is_said(text_file, tmp_path, capsys):
    arguments = ["--tokenizer", "bpe", "--vocab-size", "30000", *SMALL]
    assert main(["train", "--data", str(text_file), "--out", str(tmp_path / "out"), *arguments]) == 0
    assert "tokens, not 30000: no further pair occurs twice in the text" in capsys.readouterr().out


def test_backend_option(text_file, tmp_path, capsys):
    arguments = ["train", "--data", str(text_file), "--out", str(tmp_path / "a"), *SMALL]
    assert main([*arguments, "--backend", "torch"]) == 0


def test_a_start_that_failed_does_not_block_the_next(text_file, tmp_path, monkeypatch):
    arguments = ["train", "--data", str(text_file), "--out", str(tmp_path / "out"), *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr("fastgpt.train.Trainer.run", lambda self: (_ for _ in ()).throw(RuntimeError("no luck")))
        assert main(arguments) == 1
    assert main(arguments) == 0


def test_a_run_is_read_from_python(run):
    from fastgpt import GPT
    from fastgpt.checkpoint import Checkpoint

    model = GPT.from_pretrained(run)
    saved = Checkpoint.load(run / "checkpoint" / "best.safetensors").part("model")
    assert all((saved[name] == p).all() for name, p in model.named_parameters())


def test_sample_names_a_folder_of_weights_without_tokenizer(run, tmp_path, capsys):
    from fastgpt import GPT

    GPT.from_pretrained(run).save_pretrained(tmp_path)
    assert main(["sample", "--checkpoint", str(tmp_path)]) == 1
    assert "holds a model without a tokenizer" in capsys.readouterr().err


def test_doctor_names_every_op_and_backend(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in (*OPS, "torch", "triton", "native", "Python", "CPU:", "GPU:"):
        assert word in text


def test_help_version_and_no_command(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastgpt {__version__}\n"
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert "--help" in capsys.readouterr().out


BAD_USAGE = [
    (["fly"], "unknown command 'fly'"),
    (["train"], "--data is missing"),
    (["train", "--data", "x"], "--out is missing"),
    (["train", "--data", "DATA", "--out", "OUT", "--preset", "gpt5"], "preset: expected one of"),
    (["train", "--data", "DATA", "--out", "OUT", "--n-embd", "10", "--n-head", "4"], "n_embd: expected a multiple"),
    (["train", "--data", "DATA", "--out", "OUT", "--dropout", "1"], "dropout: expected"),
    (["train", "--data", "DATA", "--out", "OUT", "--max-steps", "-1"], "max_steps: expected"),
    (["train", "--data", "DATA", "--out", "OUT", "--dtype", "int8"], "dtype: expected"),
    (["train", "--data", "DATA", "--out", "OUT", "--max-steps", "many"], "max-steps"),
    (["train", "--data", "DATA", "--out", "OUT", "--frobnicate", "1"], "--frobnicate"),
    (["train", "--data", "DATA", "--out", "OUT", "--config", "none.toml"], "--config none.toml: cannot be read"),
    (["sample"], "--checkpoint is missing"),
    (["sample", "--checkpoint", "RUN", "--prompt", ""], "--prompt: is empty"),
    (["sample", "--checkpoint", "RUN", "--top-k", "0"], "top_k: expected"),
    (["sample", "--checkpoint", "RUN", "--temperature", "-1"], "temperature: expected"),
    (["sample", "--checkpoint", "RUN", "--backend", "cudnn"], "--backend: unknown backend 'cudnn'"),
    (["train", "--data", "DATA", "--out", "OUT", "--backend", "cudnn"], "--backend: unknown backend 'cudnn'"),
    (["train", "--data", "DATA", "--out", "OUT", "--vocab-size", "99"], "--vocab-size: the characters of the data"),
    (["train", "--data", "DATA", "--out", "OUT", "--lr", "1e-5"], "min_lr: expected at most lr=1e-05"),
    (["train", "--out", "RUN", "--resume", "--preset", "gpt2"], "--preset: the run in"),
    (["train", "--out", "RUN", "--resume", "--tokenizer", "bpe"], "--tokenizer: the run in"),
]

FAILED = [
    (["train", "--data", "missing.txt", "--out", "OUT"], "'missing.txt' does not exist"),
    (["train", "--data", "DATA", "--out", "RUN", "--block-size", "16"], "already holds a run; add --resume"),
    (["train", "--data", "DATA", "--out", "OUT", "--resume"], "holds no run to resume"),
    (["train", "--out", "RUN", "--resume", "--n-layer", "3"], "field 'n_layer' is 1, not 3"),
    (["train", "--data", "DATA", "--out", "OUT", "--block-size", "16", "--device", "tpu9"], "device: 'tpu9'"),
    (["train", "--data", "EMPTY", "--out", "OUT"], "empty"),
    (["train", "--data", "SHORT", "--out", "OUT", "--block-size", "64"], "block"),
    (["train", "--data", "BINARY", "--out", "OUT"], "UTF-8"),
    (["sample", "--checkpoint", "missing"], "missing: no such file"),
    (["sample", "--checkpoint", "DATA"], "not a complete safetensors file"),
    (["sample", "--checkpoint", "RUN", "--prompt", "☃"], "character '☃' at position 0"),
    (["sample", "--checkpoint", "FOLDER"], "holds no checkpoint; expected the folder of a run"),
]


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [(*case, 2) for case in BAD_USAGE] + [(*case, 1) for case in FAILED],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_errors_are_one_line_with_the_right_code_and_change_nothing(
    arguments, message, code, run, text_file, tmp_path, capsys
):
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("ab")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00abc" * 50)
    places = {"DATA": text_file, "RUN": run, "OUT": tmp_path / "out", "FOLDER": tmp_path}
    places |= {name.upper(): tmp_path / name for name in ("empty", "short", "binary")}
    before = files(run)
    assert main([str(places.get(a, a)) for a in arguments]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    if "Unrecognized" not in captured.err and "Error parsing" not in captured.err and "unknown command" not in message:
        assert captured.err.count("\n") == 1, "one line"
    assert files(run) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize = 3\n", "unknown setting 'batchsize'"),
        ("lr = \n", "not a TOML file"),
        ('lr = "fast"\n', "lr: expected a number, got 'fast'"),
        ("bias = 1\n", "bias: expected true or false"),
        ("data = 3\n", "data: expected text"),
    ],
)
def test_bad_settings_files(text, message, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(text)
    arguments = ["--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out")]
    if "data" not in text:
        arguments += ["--data", "x.txt"]
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_read_only_folder_is_named(text_file, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert main(["train", "--data", str(text_file), "--out", str(tmp_path / "out"), *SMALL]) == 1
    assert "the output folder cannot be written: Permission denied" in capsys.readouterr().err


def test_an_output_path_that_is_a_file_is_named(text_file, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    assert main(["train", "--data", str(text_file), "--out", str(tmp_path / "file"), *SMALL]) == 1
    assert "file: the output folder cannot be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_output_into_a_closed_pipe_is_not_a_traceback(run):
    sample = shlex.join([sys.executable, "-m", "fastgpt", "sample", "--checkpoint", str(run), "--max-new-tokens=3000"])
    done = subprocess.run(["sh", "-c", f"{sample} | head -c 5"], capture_output=True, text=True)
    assert done.stderr == "" and len(done.stdout) == 5
