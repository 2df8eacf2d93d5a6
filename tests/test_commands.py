"""The commands as a user meets them: what is printed, where files go, and the exit codes 0, 2 and 1."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgpt
from command_line import SMALL
from fastgpt import commands
from fastgpt.checkpoint import Checkpoint
from fastgpt.cli import main
from fastgpt.ops.backend import OPS
from fastgpt.settings import TrainSettings
from fastgpt.training.processes import ALONE, Processes
from fastgpt.training.run_folder import read_metrics
from sharded_checkpoints import write_sharded


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


@pytest.mark.parametrize("form", ["file", "directory"])
@pytest.mark.parametrize("format", ["fastgpt", "huggingface"])
def test_export_writes_a_folder_with_the_same_model(run, tmp_path, capsys, form, format):
    best = run / "checkpoint" / "best.safetensors"
    if form == "directory":
        best = write_sharded(Checkpoint.load(best), tmp_path / "checkpoint" / "step-00000006", is_best=True)
    source, out = best.parent.parent, tmp_path / "model"
    assert main(["export", str(source), "--out", str(out), "--format", format]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: a model (gpt) of ")
    assert files(out).keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    (before, letters), (after, same_letters) = fastgpt.load(run), fastgpt.load(out)
    assert same_letters.to_json() == letters.to_json()
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    assert main(["export", str(source), "--out", str(out)]) == 2
    assert "--out: " in capsys.readouterr().err


def test_only_a_gpt_is_exported_as_a_saved_model(text_file, tmp_path, capsys):
    bigram = tmp_path / "bigram"
    assert main(["train", "--data", str(text_file), "--out", str(bigram), "--model", "bigram", *SMALL]) == 0
    capsys.readouterr()
    assert main(["export", str(bigram), "--out", str(tmp_path / "model")]) == 2
    assert "--checkpoint: " in (said := capsys.readouterr().err) and "only a gpt can be exported as fastgpt" in said
    assert not (tmp_path / "model").exists()


def test_samples_end_at_a_text_and_are_printed_one_after_the_other(run, capsys):
    arguments = "--prompt All --max-new-tokens 200 --seed 1 --device cpu".split()
    assert main(["sample", str(run), *arguments, "--num-samples", "3", "--stop", "e"]) == 0
    said = capsys.readouterr().out
    parts = re.split(r"--- sample (\d) of 3 ---\n", said)
    assert parts[0] == "" and parts[1::2] == ["1", "2", "3"]
    assert all(text.startswith("All") and text.endswith("\n") and "e" not in text for text in parts[2::2])


def test_several_prompts_are_continued_in_their_order_each_to_its_own_stop(run, tmp_path, capsys):
    options = "--max-new-tokens 60 --seed 1 --device cpu --num-samples 2 --repetition-penalty 1.2".split()
    both = ["--prompt", "All", "--prompt=those who", "--stop", "e", "--stop", " w"]
    assert main(["sample", str(run), *options, *both]) == 0
    said = capsys.readouterr().out
    parts = re.split(r"--- sample (\d) of 4 ---\n", said)
    assert parts[1::2] == ["1", "2", "3", "4"]
    for text, prompt in zip(parts[2::2], ["All", "All", "those who", "those who"], strict=True):
        new = text.removeprefix(prompt)
        assert new != text and "e" not in new and " w" not in new and new.endswith("\n")
    file = tmp_path / "sample.toml"
    file.write_text('prompt = ["All", "those who"]\nstop = ["e", " w"]\n', encoding="utf-8")
    assert main(["sample", str(run), *options, "--config", str(file)]) == 0
    assert capsys.readouterr().out == said
    for wrong, message in (
        (["--prompt", "a", "--prompt", ""], "--prompt: is empty; give at least one character"),
        (["--stop", ""], "--stop: is empty; give at least one character"),
        (["--prompt", "All", "--prompt", "#"], "--prompt: character '#' at position 0"),
        (["--repetition-penalty", "0"], "--repetition-penalty: expected a number above 0, got 0.0"),
        ([*both, "--cuda-graph"], "--cuda-graph: a graph belongs to texts of one length"),
    ):
        assert main(["sample", str(run), *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    file.write_text("prompt = 3\n", encoding="utf-8")
    assert main(["sample", str(run), "--config", str(file)]) == 2
    assert "prompt: expected text, or a list of texts, got 3" in capsys.readouterr().err


def test_a_model_without_line_ends_needs_a_prompt(tmp_path, capsys):
    (tmp_path / "words.txt").write_text("to be or not to be " * 99)
    assert main(["train", "--data", str(tmp_path / "words.txt"), "--out", str(tmp_path / "out"), *SMALL]) == 0
    assert main(["sample", str(tmp_path / "out"), "--max-new-tokens", "3"]) == 2
    assert "--prompt is missing: the text that the model knows has no line's end" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "out"), "--max-new-tokens", "3", "--prompt", "to"]) == 0


def test_resume_goes_on_and_keeps_the_new_settings(text_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train", "--data", str(text_file), "--out", str(out), *SMALL]) == 0
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--max-steps", "9", "--lr", "0.002"]) == 0
    said = capsys.readouterr().out
    assert "max_steps: 6 -> 9, which the learning rate's schedule follows" in said and "lr: 0.016 -> 0.002" in said
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl") if r["split"] == "val"] == [0, 3, 6, 9]
    before = files(out)
    assert main(["train", "--out", str(out), "--resume"]) == 0
    finished = (
        f"the run in {out} is finished: it has reached step 9 of --max-steps 9; a larger --max-steps goes on with it"
    )
    assert capsys.readouterr().out == finished + "\n" and files(out) == before
    assert main(["train", "--out", str(out), "--resume", "--max-steps", "12", "--target-loss", "9"]) == 0
    assert "is finished: it has reached --target-loss 9; a lower --target-loss goes on" in capsys.readouterr().out
    assert main(["train", "--out", str(out), "--resume", "--n-layer", "2"]) == 1
    assert "field 'n_layer' is 1, not 2: a resumed run keeps it; leave --n-layer out" in capsys.readouterr().err
    same = text_file.with_name("same.txt")
    same.write_text(text_file.read_text())
    changes = ["--max-steps", "5", "--data", str(same), "--backend", "torch"]
    assert main(["train", "--out", str(out), "--resume", *changes]) == 0
    said = capsys.readouterr().out
    assert "max_steps: 9 -> 5, but step 9 is reached already: there is nothing to do" in said
    assert f"data: {text_file} -> {same}" in said and "backend: auto -> torch" in said and "out:" not in said


def test_the_command_that_resumes_starts_as_many_processes(monkeypatch):
    assert commands._program(ALONE) == "fastgpt"
    assert commands._program(Processes(0, 4)) == "torchrun --nproc-per-node 4 -m fastgpt"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # on each of two machines, whose addresses it does not know
    assert commands._program(Processes(0, 4)) == "torchrun [its options, as before] -m fastgpt"


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


def test_the_environments_backend_counts_where_no_option_names_one(run, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastgpt.ops.backend._override", "triton")  # as FASTGPT_BACKEND=triton sets it
    train = ["train", "--data", str(text_file), "--out", str(tmp_path / "out"), *SMALL]
    sample = ["sample", "--checkpoint", str(run), "--max-new-tokens", "2"]
    monkeypatch.setattr("fastgpt.ops.backend._accepted", {"auto"})
    monkeypatch.setattr("fastgpt.ops.backend.unavailable", lambda name, device: "a test" if name == "triton" else None)
    said = "FASTGPT_BACKEND: 'triton' can serve no op on cpu: a test; take 'auto', or another backend"
    for command in (train, sample, ["learn"], ["study", "depth"]):
        assert main([*command, "--device", "cpu"]) == 1
        assert capsys.readouterr().err.rstrip().endswith(said)
    assert main([*sample, "--backend", "torch"]) == 0, "an option comes before the environment"


def test_a_backend_that_can_serve_nothing_is_refused_before_the_data_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastgpt.ops.backend._accepted", {"auto"})
    monkeypatch.setattr("fastgpt.ops.backend.unavailable", lambda name, device: "it is not built")
    nowhere = ["--data", str(tmp_path / "nowhere.txt"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for command in (["train", *nowhere], ["sample", "--checkpoint", str(tmp_path / "nowhere")]):
        assert main([*command, "--device", "cpu", "--backend", "native"]) == 1
        said = "--backend: 'native' can serve no op on cpu: it is not built; take 'auto', or another backend"
        assert capsys.readouterr().err == f"fastgpt {command[0]}: {said}\n"
    assert not (tmp_path / "out").exists()


def test_a_start_that_failed_does_not_block_the_next(text_file, tmp_path, monkeypatch):
    arguments = ["train", "--data", str(text_file), "--out", str(tmp_path / "out"), *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr("fastgpt.training.loop.Trainer.run", lambda self: (_ for _ in ()).throw(RuntimeError("no luck")))
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


def test_output_into_a_closed_pipe_is_not_a_traceback(run):
    sample = shlex.join([sys.executable, "-m", "fastgpt", "sample", "--checkpoint", str(run), "--max-new-tokens=3000"])
    sample += " --backend torch"  # without the extension, `auto` says so on stderr
    done = subprocess.run(["sh", "-c", f"{sample} | head -c 5"], capture_output=True, text=True)
    assert done.stderr == "" and len(done.stdout) == 5


def test_files_may_begin_with_a_byte_order_mark(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    for file in (copy / "config.toml", tmp_path / "more.toml"):
        text = file.read_text(encoding="utf-8") if file.exists() else "max_steps = 7\n"
        file.write_text("\ufeff" + text, encoding="utf-8")
    assert main(["train", "--out", str(copy), "--resume", "--config", str(tmp_path / "more.toml")]) == 0
    assert "max_steps: 6 -> 7" in capsys.readouterr().out


def test_a_missing_value_is_not_the_next_option(run, capsys):
    assert main(["sample", "--checkpoint", str(run), "--prompt", "--seed", "3"]) == 2
    assert "--prompt" in capsys.readouterr().err


def test_the_largest_seed_works(run, text_file, tmp_path, capsys):
    seed = str(2**63 - 1)
    assert main(["train", "--data", str(text_file), "--out", str(tmp_path / "out"), "--seed", seed, *SMALL]) == 0
    assert main(["sample", "--checkpoint", str(run), "--seed", seed, "--max-new-tokens", "2"]) == 0
    assert main(["data", "show", "--seed", seed]) == 0


def test_a_bpe_tokenizer_without_its_size_is_bad_usage(text_file, tmp_path, capsys):
    assert main(["train", "--data", str(text_file), "--out", str(tmp_path / "run"), "--tokenizer", "bpe", *SMALL]) == 2
    assert capsys.readouterr().err == "fastgpt train: --vocab-size: --tokenizer bpe needs it, 512 for example\n"


def test_a_prompt_that_a_study_cannot_encode_is_named(text_file, tmp_path, capsys):
    arguments = ["--quick", "--prompt", "#", "--data", str(text_file), "--out", str(tmp_path / "study")]
    assert main(["study", "attention", *arguments]) == 1
    assert capsys.readouterr().err.startswith("fastgpt study: --prompt: character '#'")


def test_processes_that_train_together_prefer_the_same_backend(monkeypatch):
    compared = []
    monkeypatch.setattr(Processes, "check_same", lambda self, settings: compared.append(settings))
    with fastgpt.use_backend("torch"):  # as FASTGPT_BACKEND does
        for given in ({}, {"backend": "native"}):
            commands._check_processes(TrainSettings(out="run", **given), ALONE)
    assert [settings["backend"] for settings in compared] == ["torch", "native"]
    assert compared[0]["seed"] == TrainSettings.seed
