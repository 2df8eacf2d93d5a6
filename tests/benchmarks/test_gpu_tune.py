"""`make gpu-tune`: what is compiled, checked, timed and written; the rehearsal on Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from concurrent.futures import BrokenExecutor, Future

import pytest
import torch

from fastgpt.triton_kernels import tuned

gpu_tune = pytest.importorskip("fastgpt.benchmarks.gpu_tune")
pytest.importorskip("fastgpt.triton_kernels.attention")

from fastgpt.benchmarks.gpu_tune_subjects import SUBJECTS, Norm, subjects_for  # noqa: E402

ORIGIN = dict.fromkeys(("device", "driver", "torch", "triton", "date", "commit"), "a test")
CODE = {"registers": 128, "spilled_bytes": 0, "shared_bytes": 4096}
NORM = Norm("layer_norm.forward", {"width": 512})
ONE, TWO = {"ROWS": 1, "num_warps": 2}, {"ROWS": 2, "num_warps": 2}


def timed(ratio: float, p20: float) -> dict:
    return CODE | {"time_us": 1.0, "default_us": ratio, "ratio": ratio, "p20": p20, "p80": 2.0}


def test_every_kernel_has_a_subject_and_every_candidate_is_an_entry_that_a_table_may_have():
    assert {subject.kernel for subject in SUBJECTS} == tuned.KERNELS.keys()
    assert len({subject.name for subject in SUBJECTS}) == len(SUBJECTS)
    for arch in (90, 100):  # where everything fits; elsewhere a candidate that does not is dropped
        for subject in subjects_for(arch, []):
            small = subject.small()
            for choices in filter(None, [subject.default(arch), *subject.candidates(arch)]):
                for entry in (subject.entry(arch, choices), small.entry(arch, choices)):
                    assert tuple(entry.call) == tuned.KERNELS[entry.kernel].call
                    facts = {"time_us": 1.0, "default_us": 1.0} | ORIGIN
                    facts |= {"registers": 16, "shared_bytes": 0} if subject.compiled else {}
                    assert tuned.entry_of(entry.row() | facts).choices == choices
            assert subject.default(arch) not in subject.candidates(arch)
    assert not [s for s in subjects_for(100, []) if s.key.get("descriptors")]
    assert {s.kernel for s in subjects_for(90, ["attention.decode"])} == {"attention.decode"}


def test_what_spills_or_does_not_fit_is_dropped():
    attention = SUBJECTS[0]
    choices = attention.candidates(90)[0]
    assert gpu_tune.why_dropped(attention, 90, choices, CODE) is None
    assert gpu_tune.why_dropped(attention, 90, choices, CODE | {"spilled_bytes": 8}) == "spills 8 bytes"
    assert "shared_bytes: 232449" in gpu_tune.why_dropped(attention, 90, choices, CODE | {"shared_bytes": 232449})


def test_an_entry_is_written_only_for_a_gain_above_the_noise(tmp_path):
    log = gpu_tune.Log(tmp_path / "tune.jsonl", ORIGIN)
    log.add(NORM, ONE, "timed", **timed(1.019, 1.01))
    assert log.entries([NORM], 90) == []  # too little
    log.add(NORM, ONE, "timed", **timed(1.5, 0.99))
    assert log.entries([NORM], 90) == []  # noise
    log.add(NORM, ONE, "timed", **timed(1.1, 1.05))
    log.add(NORM, TWO, "wrong", why="a test", **timed(9.0, 9.0))
    [entry] = log.entries([NORM], 90)
    assert entry.choices == ONE and entry.facts["device"] == "a test" and entry.facts["default_us"] == 1.1
    plan = subjects_for(90, ["embedding"])[0].entry(90, {"chunk": 64}, {"time_us": 1.0, "default_us": 2.0} | ORIGIN)
    gpu_tune.write_tables(tmp_path, [entry, plan], ORIGIN)
    assert tuned.read(tmp_path / "tuned.toml").entries == {entry.key: entry}
    assert tuned.read(tmp_path / "tuned_cuda.toml").entries == {plan.key: plan}
    # A table that is copied over the package's own goes on explaining the keys.
    package = tuned.DEFAULT.parent
    for name in gpu_tune.TABLES:
        explained = gpu_tune.explanation_of_keys(name)
        assert any(line.startswith("#   [[entry]]") for line in explained) and "no entry yet" not in "".join(explained)
        assert "\n".join(explained) in (tmp_path / name).read_text(encoding="utf-8")
        assert "\n".join(explained) in (package / name).read_text(encoding="utf-8")
    gpu_tune.write_tables(tmp_path, [], ORIGIN)
    assert tuned.read(*(tmp_path / name for name in gpu_tune.TABLES)).entries == {}


@pytest.mark.parametrize("value", ['a "quoted" \\ text', "Größe", 0.1, 1e-7, 123456789, True])
def test_values_are_written_as_toml_reads_them(value):
    assert tomllib.loads(gpu_tune._toml({"key": value})) == {"entry": [{"key": value}]}


def test_the_log_goes_on_where_it_was_and_forgets_what_another_machine_or_commit_measured(tmp_path):
    file = tmp_path / "tune.jsonl"
    gpu_tune.Log(file, ORIGIN).add(NORM, ONE, "begun", **CODE)
    with file.open("a") as written:
        written.write('[]\n{"subject": "cut o')
    again = gpu_tune.Log(file, ORIGIN | {"date": "another day"})
    assert again.has(NORM, ONE) and not again.has(NORM, TWO)
    assert not gpu_tune.Log(file, ORIGIN | {"commit": "another"}).has(NORM, ONE)
    again.add(NORM, ONE, "right", **CODE)
    assert not gpu_tune.Log(file, ORIGIN).has(NORM, ONE), "it was not timed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off")
def test_wrong_results_are_found(monkeypatch):
    timer = gpu_tune.MadeUpTimer()
    check = gpu_tune.Check(NORM, timer)
    assert check.why_wrong(None) is None and check.why_wrong(TWO) is None
    right, calls = type(NORM).results, []

    def off_by(name, amount, after=0):
        def results(self, inputs):
            calls.append(name)
            found = right(self, inputs)
            if len(calls) > after:
                found[name] = found[name] + amount
            return found

        calls.clear()
        return results

    for name, amount, after, words in (
        ("out", 0.1, 0, "out: error"),
        ("d weight", 1.0, 0, "d weight: error"),
        ("h", float("nan"), 0, "h: error"),
        ("d x", 1e-3, 1, "d x: other bits in a second run"),
    ):
        monkeypatch.setattr(Norm, "results", off_by(name, amount, after))
        assert words in check.why_wrong(TWO)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels in csrc/ are compared for the CPU")
def test_a_gradient_of_cross_entropy_that_is_off_by_a_twentieth_is_found(monkeypatch):
    subject = subjects_for(90, ["cross_entropy"])[0]
    check = gpu_tune.Check(subject, gpu_tune.MadeUpTimer())
    assert check.why_wrong(None) is None
    right = type(subject).results
    off = lambda self, inputs: {name: x * 1.05 if name == "d logits" else x for name, x in right(self, inputs).items()}  # noqa: E731
    monkeypatch.setattr(type(subject), "results", off)
    assert "d logits: error" in check.why_wrong(subject.candidates(90)[0])


def test_a_candidate_whose_launch_raises_is_wrong_and_the_others_go_on(tmp_path):
    class Check:
        timer = gpu_tune.MadeUpTimer()

        def why_wrong(self, choices):
            if choices == ONE:
                raise TypeError("a launcher of Triton\nmore")

    log = gpu_tune.Log(tmp_path / "tune.jsonl", ORIGIN)
    assert list(gpu_tune._right(NORM, log, [(ONE, CODE), (TWO, CODE)], Check())) == [(TWO, CODE)]
    rows = {row["outcome"]: row for row in log.rows.values()}
    assert rows["wrong"]["why"] == "TypeError: a launcher of Triton" and rows["right"]["choices"] == TWO


def test_a_dead_compiler_neither_ends_the_sweep_nor_drops_candidates(tmp_path, monkeypatch, capsys):
    """A process that compiles is killed, by a lack of memory say: what it compiled, and all that waited, has failed."""

    class Pool:
        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, *args):
            future = Future()
            future.set_exception(BrokenExecutor("a process was terminated abruptly"))
            return future

        def shutdown(self, cancel_futures):
            pass

    monkeypatch.setattr(gpu_tune, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(gpu_tune, "unavailable", lambda backend, device: None)
    log = gpu_tune.Log(tmp_path / "tune.jsonl", ORIGIN)
    subjects = subjects_for(90, ["layer_norm.forward"])[:2]
    assert not gpu_tune.tune(subjects, gpu_tune.MadeUpTimer(), log, tmp_path, 1, float("inf"), 2)
    assert log.rows == {} and capsys.readouterr().out.count("not tuned: BrokenExecutor: a process was term") == 2


def test_bad_use_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    there = ["--out", str(tmp_path)]
    no_folder = ["--out", str(tmp_path / "file" / "below"), "--dry-run"]
    for wrong in ([*there, "--jobs", "0"], [*there, "--kernels", "softmax"], no_folder, []):
        with pytest.raises(SystemExit) as stopped:
            gpu_tune.main(wrong)
        assert stopped.value.code == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_tune.main(["--out", str(tmp_path)]) == 1
    assert "there is no CUDA device; --dry-run rehearses without one" in capsys.readouterr().err


def test_the_rehearsal_compiles_checks_and_writes_a_table(tmp_path):
    """In a process of its own, whose kernels are interpreted; it starts others, which compile."""
    command = [sys.executable, "-m", "fastgpt.benchmarks.gpu_tune", "--out", str(tmp_path), "--dry-run", "--quick"]
    command += ["--jobs", "2", "--time-limit", "3000"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {}
    for line in (tmp_path / "tune.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["subject"], str(row["choices"])] = row
    assert {row["subject"].split()[0] for row in rows.values()} == tuned.KERNELS.keys()
    assert len(rows) == 2 * len(tuned.KERNELS)
    assert {row["outcome"] for row in rows.values()} <= {"timed", "dropped"}, rows
    table = tuned.read(*(tmp_path / name for name in gpu_tune.TABLES))
    assert len(table.entries) >= len(tuned.KERNELS) - 1
    assert {entry.facts["device"] for entry in table.entries.values()} == {tuned.MADE_UP}
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0 and again.stdout == done.stdout  # nothing is done twice
