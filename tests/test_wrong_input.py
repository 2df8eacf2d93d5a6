"""Wrong input to every command, as newcomers give it: one line that names it and the remedy, and exit code 2 or 1."""

from __future__ import annotations

import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import SMALL
from fastgpt.cli import COMMANDS, Group, main

ENCODING = sys.getfilesystemencoding()
TRAIN = "train --data DATA --out OUT"
TINY = f"{TRAIN} --block-size 16"

# What is typed, the exit code, and the words that the line has to have, in their order. Words in capitals are places.
WRONG = [
    # --- a command that is none ---
    ("smaple", 2, ["unknown command 'smaple'", "did you mean 'sample'?"]),
    ("study dpeth", 2, ["unknown command 'dpeth'", "did you mean 'depth'?"]),
    ("data sohw", 2, ["unknown command 'sohw'", "did you mean 'show'?"]),
    ("fly", 2, ["unknown command 'fly'", f"there are {', '.join(COMMANDS)}"]),
    ("study", 2, ["needs a command after it", "depth"]),
    ("data", 2, ["needs a command after it", "show"]),
    ("--data DATA train", 2, ["a command comes first", "see fastgpt --help"]),
    ("--print-completion fish", 2, ["expected bash or zsh"]),
    # --- a typo in an option, a value without one, an option without a value ---
    ("train --dat DATA --out OUT", 2, ["--dat: no such option", "did you mean --data?"]),
    ("sample RUN --promt x", 2, ["--promt: no such option", "did you mean --prompt?", "fastgpt sample --help"]),
    ("eval RUN --strides 3", 2, ["--strides: no such option", "did you mean --stride?"]),
    ("serve RUN --prot 80", 2, ["--prot: no such option", "did you mean --port?"]),
    ("data show --layuot x", 2, ["did you mean --layout?"]),
    ("learn --stps 3", 2, ["did you mean --steps?"]),
    ("study depth --widht 3", 2, ["did you mean --width?", "fastgpt study depth --help"]),
    ("doctor --selftest", 2, ["did you mean --self-test?"]),
    ("parity --devcie cpu", 2, ["did you mean --device?"]),
    ("bench --qick", 2, ["did you mean --quick?"]),
    ("train --frobnicate 1", 2, ["--frobnicate: no such option", "see fastgpt train --help"]),
    ("train DATA", 2, ["every value belongs to an option", "did you mean --data DATA?"]),
    ("bench attention", 2, ["did you mean --only attention?"]),
    ("sample RUN --prompt --seed 3", 2, ["--prompt: expected one argument"]),
    ("train --data", 2, ["--data: expected one argument"]),
    (f"{TRAIN} --max-steps many", 2, ["--max-steps: expected an integer, got 'many'"]),
    (f"{TRAIN} --max-steps 1.5", 2, ["--max-steps: expected an integer, got '1.5'"]),
    ("sample RUN --top-p much", 2, ["--top-p: expected a number, got 'much'"]),
    # --- what a command needs ---
    ("train", 2, ["--out is missing: give a folder for the run", "see fastgpt train --help"]),
    ("train --resume", 2, ["--out is missing: give the folder of the run to go on with"]),
    ("sample", 2, ["--checkpoint is missing: give the folder of a run, which fastgpt train makes"]),
    ("eval", 2, ["--checkpoint is missing"]),
    ("serve", 2, ["--checkpoint is missing"]),
    ("eval RUN", 2, ["--data is missing: give a text file"]),
    ("export RUN", 2, ["--out is missing: give a folder for the model", "see fastgpt export --help"]),
    # --- values that a setting cannot have ---
    (f"{TRAIN} --preset gpt5", 2, ["preset: expected one of", "shakespeare-char-cpu"]),
    (f"{TRAIN} --model gtp", 2, ["model: expected one of gpt"]),
    (f"{TRAIN} --layout blcoks", 2, ["layout: expected one of blocks"]),
    (f"{TRAIN} --optimizer adam", 2, ["optimizer: expected one of adamw, muon"]),
    (f"{TRAIN} --n-embd 10 --n-head 4", 2, ["n_embd: expected a multiple of n_head=4"]),
    (f"{TRAIN} --dropout 1", 2, ["dropout: expected"]),
    (f"{TRAIN} --max-steps -1", 2, ["max_steps: expected"]),
    (f"{TRAIN} --dtype int8", 2, ["dtype: expected one of auto, float32"]),
    (f"{TRAIN} --preset gpt2 --lr 1e-5", 2, ["min_lr: expected at most lr=1e-05"]),
    (f"{TRAIN} --backend cudnn", 2, ["--backend: unknown backend 'cudnn'", "'native'"]),
    (f"{TRAIN} --vocab-size 99", 2, ["--vocab-size: the characters of the data", "--tokenizer bpe"]),
    (f"{TRAIN} --tokenizer bpe", 2, ["--vocab-size: --tokenizer bpe needs it, 512 for example"]),
    (f"{TRAIN} --tokenizer bpee", 1, ["'bpee': no such folder", "vocab.json"]),
    (f"{TRAIN} --device gpu", 1, ["device: 'gpu' cannot be used here: expected auto, cpu"]),
    (f"{TINY} --device vulkan", 1, ["device: 'vulkan' cannot be used here", "take auto or cpu"]),
    ("sample RUN --seed -1", 2, ["--seed: expected an integer in [0, 2**63), got -1"]),
    (f"data show --seed {2**63}", 2, ["--seed: expected an integer in [0, 2**63)"]),
    ("sample RUN --num-samples 0", 2, ["--num-samples: expected"]),
    ("sample RUN --top-k 0", 2, ["--top-k: expected an integer of at least 1"]),
    ("sample RUN --top-p 3", 2, ["--top-p: expected a number in (0, 1]"]),
    ("sample RUN --temperature -1", 2, ["--temperature: expected a number of at least 0"]),
    ("sample RUN --repetition-penalty 0", 2, ["--repetition-penalty: expected a number above 0, got 0.0"]),
    ("serve RUN --port 70000", 2, ["--port: expected an integer from 0 to 65535, got 70000"]),
    ("serve RUN --stride 99", 2, ["--stride: expected"]),
    ("sample RUN --stride 99", 2, ["--stride: expected at most 16"]),
    ("sample RUN --backend cudnn", 2, ["--backend: unknown backend 'cudnn'"]),
    ("export RUN --out OUT --format onxx", 2, ["--format: expected one of fastgpt, huggingface, onnx, torch, got"]),
    ("export RUN --out RUN", 2, ["--out: ", "already holds a model or a run; give another folder"]),
    ("compare RUN nowhere", 2, ["--runs: nowhere: no such folder"]),
    ("compare DATA", 2, ["--runs: ", "is a file; give the folder of the run"]),
    ("compare RUN --out curves.jpg", 2, ["--out: expected a file that ends in .png"]),
    (f"{TRAIN} --log tensorbord", 2, ["--log: unknown logger 'tensorbord'; expected tensorboard or wandb"]),
    ("eval RUN --data DATA --dtype fp8", 2, ["--dtype: expected one of auto, float32"]),
    ("data show --layout x", 2, ["layout: expected one of blocks"]),
    ("learn --data DATA --out OUT --steps 0", 2, ["steps: expected at least 1"]),
    ("learn --data DATA --out OUT --lr 0", 2, ["lr: expected a number above 0"]),
    ("study depth --data DATA --out STUDY --depths x", 2, ["depths: expected whole numbers above 0"]),
    ("study learning-rate --data DATA --out STUDY --rates 1,1", 2, ["rates: '1,1' gives a number twice"]),
    ("study parallelism --data DATA --out STUDY --steps 0", 2, ["steps: expected at least"]),
    ("study normalisation --data DATA --out STUDY --momenta 2", 2, ["momenta: expected numbers above 0"]),
    ("study recipe --data DATA --out STUDY --repeats 0", 2, ["repeats: expected at least 1"]),
    ("study embeddings RUN --out STUDY --analogy a", 2, ["analogy: expected"]),
    ("study attention RUN --out STUDY --layer 9", 1, ["--layer 9: the model has layers 1 to 1"]),
    ("parity --device gpu", 2, ["--device: expected cpu or cuda, got 'gpu'"]),
    ("bench --device tpu", 2, ["--device: expected auto, cpu or cuda"]),
    ("bench --only atention", 2, ["--only: there is no benchmarks/bench_atention.py", "attention"]),
    ("bench --report --only attention", 2, ["--only: is for measuring"]),
    ("bench --results x", 2, ["--results: is what --report reads"]),
    # --- prompts, and characters that nobody has seen ---
    ("sample RUN --prompt ''", 2, ["--prompt: is empty; give at least one character"]),
    ("sample RUN --stop ''", 2, ["--stop: is empty"]),
    ("study attention RUN --out STUDY --prompt ''", 1, ["--prompt: is empty"]),
    ("sample RUN --prompt ☃", 2, ["--prompt: character '☃' at position 0", "remove it"]),
    ("sample RUN --prompt=-x", 2, ["--prompt: character '-' at position 0"]),
    ("sample RUN --stop ☃", 2, ["--stop: character '☃' at position 0"]),
    ("study attention RUN --out STUDY --prompt ☃", 1, ["--prompt: character '☃'", "remove it"]),
    ("eval RUN --data SNOW", 1, ["character '☃'", "remove it"]),
    ("sample RUN --prompt caf\udce9", 2, [rf"'caf\udce9': is not {ENCODING} text; give UTF-8"]),
    # --- sampling before training, files that are missing or are something else ---
    ("sample runs/demo", 1, ["runs/demo: no such file or folder", "as fastgpt train writes it"]),
    ("serve runs/demo", 1, ["runs/demo: no such file or folder", "as fastgpt train writes it"]),
    ("eval runs/demo --data DATA", 1, ["runs/demo: no such file or folder"]),
    ("study attention runs/demo --out STUDY", 1, ["runs/demo: no such file or folder"]),
    ("sample DATA", 1, ["DATA: not a complete safetensors file"]),
    ("sample FOLDER", 1, ["holds no checkpoint", "expected the folder of a run"]),
    ("train --data missing.txt --out OUT", 1, ["'missing.txt' does not exist", "give a file, a folder, or one of"]),
    ("train --data=-x --out OUT", 1, ["'-x' does not exist"]),
    ("train --data '~no user/x' --out OUT", 2, ["--data: '~no user/x': the home folder '~no user' is not known"]),
    ("train --data EMPTY --out OUT", 1, ["empty"]),
    ("train --data SHORT --out OUT --block-size 64", 1, ["give a longer text or a smaller block_size"]),
    ("train --data BINARY --out OUT", 1, ["UTF-8"]),
    ("train --data '' --out OUT", 2, ["--data: is empty; give a path"]),
    ("train --data DATA --out ''", 2, ["--out: is empty; give a path"]),
    ("sample --checkpoint ''", 2, ["--checkpoint: is empty; give a path"]),
    (f"{TRAIN} --config none.toml", 2, ["--config none.toml: cannot be read"]),
    ("data show --config FOLDER", 2, ["cannot be read: Is a directory"]),
    ("data show --config EMPTY --config=EMPTY", 2, ["--config: is given more than once"]),
    ("eval RUN --data missing.txt", 1, ["'missing.txt' does not exist"]),
    ("data show --data missing.txt", 1, ["'missing.txt' does not exist"]),
    ("data prepare --data missing.txt --out OUT", 1, ["'missing.txt' does not exist"]),
    ("data prepare --data BINARY --out OUT", 1, ["BINARY' is not UTF-8: byte 0x"]),
    ("plan --gpus 0", 2, ["--gpus: expected an integer of at least 1, got 0"]),
    ("learn --data missing.txt --out OUT", 1, ["'missing.txt' does not exist"]),
    ("study depth --data missing.txt --out STUDY", 1, ["'missing.txt' does not exist"]),
    ("study embeddings --vectors missing --out STUDY", 1, ["--vectors missing: cannot be read"]),
    ("bench --nanogpt missing", 2, ["--nanogpt: missing does not exist"]),
    ("bench --report --results missing", 1, ["missing: no such file or folder"]),
    # --- folders that exist already, are missing, or cannot be written to ---
    ("train --data DATA --out RUN --block-size 16", 1, ["already holds a run; add --resume to go on, or give another"]),
    ("learn --data DATA --out LEARNED", 1, ["already holds a run; add --resume to go on, or give another --out"]),
    ("study depth --data DATA --out LEARNED", 1, ["already holds a report; give another --out"]),
    (f"{TRAIN} --resume", 1, ["holds no run to resume; leave --resume out to start one"]),
    ("learn --data DATA --out RUN", 1, ["already holds a run; add --resume to go on, or give another --out"]),
    ("learn --out RUN --resume", 2, ["--resume: RUN holds a run of fastgpt train; resume it by that command"]),
    ("train --data DATA --out STAGED --block-size 16", 1, ["already holds a run; add --resume to go on"]),
    ("train --out STAGED --resume", 2, ["--resume: STAGED holds a run of fastgpt learn; resume it by that command"]),
    ("learn --out OUT --resume", 1, ["holds no run to resume; leave --resume out to start one"]),
    ("train --out RUN --resume --n-layer 3", 1, ["field 'n_layer' is 1, not 3", "leave --n-layer out"]),
    ("train --out RUN --resume --preset gpt2", 2, ["--preset: the run in", "leave it out, or start another run"]),
    ("train --out RUN --resume --tokenizer bpe", 2, ["--tokenizer: the run in", "cannot be changed"]),
    ("train --data DATA --block-size 16 --out DATA", 1, ["the output folder cannot be written", "give another --out"]),
    ("learn --data DATA --out DATA", 1, ["the output folder cannot be written", "give another --out"]),
    ("study depth --data DATA --out DATA", 1, ["the output folder cannot be written", "give another --out"]),
    ("bench --only embedding --out DATA/rows.jsonl", 1, ["DATA/rows.jsonl: cannot be written"]),
    ("parity --out OUT/report.json", 2, ["expected a file in a folder that exists"]),
    ("parity --out /proc/report.json", 1, ["'/proc/report.json'"]),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, text_file) -> Path:
    """A finished run's folder."""
    out = tmp_path_factory.mktemp("run") / "first"
    assert main(["train", "--data", str(text_file), "--out", str(out), *SMALL]) == 0
    return out


@pytest.fixture
def places(run, text_file, tmp_path, monkeypatch) -> dict[str, Path]:
    """What the words in capitals stand for; the working directory is an empty folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    found = {"DATA": text_file, "RUN": run, "FOLDER": here}
    names = ("out", "study", "learned", "staged", "empty", "short", "binary", "snow")
    found |= {name.upper(): tmp_path / name for name in names}
    (found["STAGED"] / "stages").mkdir(parents=True)
    found["LEARNED"].mkdir()
    (found["LEARNED"] / "results.json").write_text("{}")
    found["EMPTY"].write_text("")
    found["SHORT"].write_text("ab")
    found["BINARY"].write_bytes(b"\xff\xfe\x00abc" * 50)
    found["SNOW"].write_text("☃" * 50, encoding="utf-8")
    return found


def placed(text: str, places: dict[str, Path]) -> str:
    return re.sub(rf"\b({'|'.join(places)})\b", lambda match: str(places[match[1]]), text)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("typed", "code", "words"), WRONG, ids=[repr(row[0]) for row in WRONG])
def test_wrong_input_is_answered_in_one_line_with_the_remedy(typed, code, words, places, capsys):
    before = files(places["RUN"])
    assert main([placed(word, places) for word in shlex.split(typed)]) == code
    said = capsys.readouterr().err
    assert said.startswith("fastgpt") and said.count("\n") == 1, "one line"
    assert re.search(".*".join(re.escape(placed(part, places)) for part in words), said), said
    assert files(places["RUN"]) == before and not places["OUT"].exists()


def test_every_command_is_given_wrong_input():
    commands = {name for name, command in COMMANDS.items() if not isinstance(command, Group)}
    groups = {(name, part) for name, group in COMMANDS.items() if isinstance(group, Group) for part in group.commands}
    typed = [row[0].split() for row in WRONG]
    assert commands <= {words[0] for words in typed} and groups <= {tuple(words[:2]) for words in typed}


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
@pytest.mark.parametrize("command", ["train --block-size 16", "learn", "study depth"])
def test_a_folder_without_permission_is_named(command, text_file, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert main([*command.split(), "--data", str(text_file), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert (
        "the output folder cannot be written: Permission denied; give another --out" in said and said.count("\n") == 1
    )


def test_a_disk_without_room_is_one_line(text_file, tmp_path):
    """No file may have more than 1000 bytes, which a checkpoint has."""
    words = [sys.executable, "-m", "fastgpt", "train", "--data", str(text_file), "--out", str(tmp_path / "out"), *SMALL]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    (line,) = [line for line in done.stderr.splitlines() if "warning" not in line]
    assert done.returncode == 1 and re.search("cannot be written: .*File too large", line)


def test_a_narrow_terminal_leaves_the_line_whole(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    assert main(["sample", "--promt", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
