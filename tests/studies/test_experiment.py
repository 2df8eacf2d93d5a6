"""What the studies share: lists of numbers, trained models, and errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastgpt.cli import main
from fastgpt.config import ConfigError
from fastgpt.studies.experiment import numbers


def trained(kind: str, text_file: Path, folder: Path) -> str:
    settings = "--block-size 16 --n-layer 1 --n-head 2 --n-embd 16 --batch-size 4 --max-steps 2 --eval-batches 1"
    run = ["--data", str(text_file), "--out", str(folder / kind), "--model", kind, "--device", "cpu"]
    assert main(["train", *run, *settings.split()]) == 0
    return str(folder / kind)


def test_studies_of_a_trained_model(tmp_path, text_file):
    run = trained("gpt", text_file, tmp_path)
    for name, more in (("embeddings", ["--words", "B e"]), ("attention", ["--prompt", "TO BE"])):
        assert main(["study", name, "--checkpoint", run, *more, "--out", str(tmp_path / name)]) == 0
        assert json.loads((tmp_path / name / "results.json").read_text())["settings"]["checkpoint"] == "gpt"


def test_studies_of_models_without_attention_or_embedding(tmp_path, text_file, capsys):
    lstm, bigram = (trained(kind, text_file, tmp_path) for kind in ("lstm", "bigram"))
    out = ["--out", str(tmp_path / "out")]
    assert main(["study", "embeddings", "--checkpoint", lstm, "--out", str(tmp_path / "lstm-embeddings")]) == 0
    assert main(["study", "attention", "--checkpoint", lstm, *out]) == 1
    assert "kind 'lstm', which has no attention" in capsys.readouterr().err
    assert main(["study", "embeddings", "--checkpoint", bigram, *out]) == 1
    assert "kind 'bigram' has no token embedding" in capsys.readouterr().err


def test_numbers():
    assert numbers("depths", "2,8", int) == [2, 8] and numbers("rates", "1e-3", float) == [1e-3]
    for bad in ("", "2,", "2,2", "-1", "0", "1.5", "nan", "many"):
        with pytest.raises(ConfigError, match="depths"):
            numbers("depths", bad, int)
    with pytest.raises(ConfigError, match="rates"):
        numbers("rates", "inf", float)


BAD_USAGE = [
    ([], "'study' needs a command after it; there are depth, "),
    (["sleep"], "unknown command 'sleep'; there are depth, "),
    (["depth", "--depths", "2,x"], "depths: expected whole numbers above 0"),
    (["depth", "--repeats", "1"], "repeats: expected at least 2, got 1"),
    (["learning-rate", "--rates", "0"], "rates: expected numbers above 0"),
    (["learning-rate", "--seed", "-1"], "seed: expected"),
    (["normalisation", "--momenta", "2"], "momenta: expected numbers above 0 and at most 1"),
    (["parallelism", "--contexts", ""], "contexts: expected whole numbers"),
    (["parallelism", "--seconds", "nan"], "seconds: expected a finite number, got nan"),
    (["depth", "--lr", "nan"], "lr: expected a finite number"),
    (["embeddings", "--analogy", "king-man"], "analogy: expected"),
    (["embeddings", "--neighbours", "0"], "neighbours: expected at least 1"),
    (["embeddings", "--vectors", "x", "--checkpoint", "y"], "not both"),
    (["attention", "--steps", "0"], "steps: expected at least 1"),
]
FAILED = [
    (["depth", "--data", "missing.txt"], "'missing.txt' does not exist"),
    (["depth", "--data", "ONE"], "has one distinct character"),
    (["learning-rate", "--data", "SHORT"], "a block of 64 needs 65"),
    (["depth", "--device", "tpu9"], "device: 'tpu9'"),
    (["depth", "--out", "ONE"], "cannot be written"),
    (["attention", "--prompt", ""], "--prompt: is empty"),
    (["attention", "--prompt", "☃"], "character '☃' at position 0"),
    (["attention", "--prompt", "o" * 65], "65 tokens do not fit the model's context of 64"),
    (["attention", "--layer", "5"], "--layer 5: the model has layers 1 to 4"),
    (["attention", "--checkpoint", "missing"], "missing: no such file"),
    (["embeddings", "--vectors", "VECTORS", "--analogy", "kinng - man + woman"],
     "no word 'kinng' among the 5 of vectors.txt; spelled nearly so: 'king', 'kings'"),
    (["embeddings", "--vectors", "VECTORS", "--words", "xyzzy"], "none is spelled nearly so"),
    (["embeddings", "--vectors", "missing"], "cannot be read: No such file"),
    (["embeddings", "--vectors", "FOLDER"], "is a folder"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [(*case, 2) for case in BAD_USAGE] + [(*case, 1) for case in FAILED],
    ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else "",
)
def test_errors_are_one_line_with_the_right_code(arguments, message, code, text_file, vectors, tmp_path, capsys):
    (tmp_path / "one").write_text("a" * 1000)
    (tmp_path / "short").write_text("ab" * 20)
    places = {"ONE": tmp_path / "one", "SHORT": tmp_path / "short", "VECTORS": vectors, "FOLDER": tmp_path}
    arguments = [str(places.get(a, a)) for a in arguments]
    if len(arguments) > 1:
        arguments += ["--quick"]
        arguments += [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        arguments += [] if "--data" in arguments else ["--data", str(text_file)]
    assert main(["study", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out" / "results.json").exists()
