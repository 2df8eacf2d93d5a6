"""What an outcome of a self-test holds for, and where it is kept. tests/ops/test_self_test.py has damaged files."""

from __future__ import annotations

import json
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from fastgpt.ops import kept_outcomes
from fastgpt.ops.kept_outcomes import Outcome, keep, read

CPU = torch.device("cpu")
GPU = torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    kept_outcomes.machine.cache_clear()
    kept_outcomes._say_once.cache_clear()
    yield tmp_path / "cache"
    kept_outcomes.machine.cache_clear()


@pytest.fixture
def a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")


def test_outcomes_are_added_and_read(empty_cache) -> None:
    passed, failed = Outcome(True, "error 1e-7"), Outcome(False, "error 0.1, é")
    keep(CPU, "a", passed)
    keep(CPU, "b", failed)
    assert read(CPU) == {"a": passed, "b": failed}
    (file,) = (empty_cache / "self-tests").iterdir()
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["machine"] == kept_outcomes.machine(CPU) and list(content["outcomes"]) == ["a", "b"]


def test_what_an_outcome_holds_for(monkeypatch, a_gpu) -> None:
    monkeypatch.setattr(kept_outcomes, "_driver", lambda: "driver 580")
    machine = kept_outcomes.machine(GPU)
    assert machine is not None and (machine["device"], machine["driver"]) == ("GPU 1, sm_90", "driver 580")
    assert machine["torch"] == torch.__version__ and set(machine) >= {"fastgpt", "triton", "kernels"}
    assert kept_outcomes.machine(torch.device("cuda", 0)) != machine


def test_without_a_known_driver_nothing_is_kept(monkeypatch, a_gpu, empty_cache) -> None:
    monkeypatch.setattr(kept_outcomes, "_driver", lambda: "")
    keep(GPU, "a", Outcome(True, ""))
    assert read(GPU) == {} and not empty_cache.exists()


def test_the_driver_names_itself(monkeypatch) -> None:
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:07:15 UTC 2025"
    monkeypatch.setattr(Path, "read_text", lambda *args, **options: line + "\nGCC version: 12\n")
    assert kept_outcomes._driver() == line


def test_without_that_line_nvidia_smi_is_asked(monkeypatch) -> None:
    def no_file(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", no_file)
    answer = subprocess.CompletedProcess((), 0, stdout="580.65.06\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: answer)
    assert kept_outcomes._driver() == "580.65.06"
    monkeypatch.setattr(subprocess, "run", no_file)
    assert kept_outcomes._driver() == ""


def test_the_kernels_hash_changes_with_the_tuned_table() -> None:
    from fastgpt.triton_kernels import tuned

    before = kept_outcomes._hash_of_kernels()
    assert before == kept_outcomes._hash_of_kernels() and len(before) == 16
    entry = tuned.Entry(90, "layer_norm.forward", {"width": 64}, {"ROWS": 4, "num_warps": 4})
    with tuned.use(tuned.Table.of(entry)):
        assert kept_outcomes._hash_of_kernels() != before


def test_two_processes_that_write_at_once_leave_a_whole_file(empty_cache) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: keep(CPU, f"variant {i}", Outcome(True, "")), range(12)))
    kept = read(CPU)
    assert kept and set(kept) <= {f"variant {i}" for i in range(12)}
    assert len(list((empty_cache / "self-tests").iterdir())) == 1


def test_an_unknown_home_folder_is_said_once(monkeypatch) -> None:
    monkeypatch.setenv("FASTGPT_CACHE", "~nobody-has-this-name/cache")
    with pytest.warns(UserWarning, match="outcomes of self-tests are not kept.*; set FASTGPT_CACHE to a writable"):
        keep(CPU, "a", Outcome(True, ""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep(CPU, "a", Outcome(True, ""))
        assert read(CPU) == {}
