"""Several processes that train one model: the same trajectory as one process, in each of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import failing_processes
import parallel_runs as parallel
from fastgpt.cli import main
from fastgpt.config import ConfigError, TrainConfig
from fastgpt.training import TrainingError
from fastgpt.training.graph import is_graphed
from fastgpt.training.parallel import check_parallel
from fastgpt.training.processes import ALONE, Processes
from fastgpt.training.step import Precision
from parallel_runs import CASES, written
from small_runs import TEXT


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The files of the data, the folder of the runs of one process, and what it knows at their ends."""
    folder = tmp_path_factory.mktemp("alone")
    words = {word for word in TEXT.split() if len(word) > 1} | {"a" * n for n in range(2, 16)}
    texts = {"blocks": TEXT, "names": "\n".join(sorted(words))}
    for layout, text in texts.items():
        (folder / f"{layout}.txt").write_text(text)
    files = {layout: str(folder / f"{layout}.txt") for layout in texts}
    return files, folder, parallel.losses(0, 1, files, str(folder), list(CASES))


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize(("n", "names"), [(2, list(CASES)), (4, list(CASES)[-1:])])
def test_the_trajectory_is_that_of_one_process(gloo, tmp_path, alone, n, names, way):
    files, folder, known = alone
    of_ranks = gloo(n, parallel.losses, files, str(tmp_path), names, way)
    for name in names:
        expected = written(folder, name)
        assert written(tmp_path, name) == pytest.approx(expected, abs=1e-5), name
        assert len(expected) == 30 + 3, "a row for each step, and three evaluations"
        for found in of_ranks:
            assert found[name] == pytest.approx(known[name], abs=1e-5), name


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_fsdp_gives_each_process_a_part_and_the_loss_and_gradients_of_the_whole_model(gloo, dtype, tolerance):
    """In half precision blocks are gathered in it, and the stream between them keeps float32."""
    for found in gloo(2, parallel.sharded, dtype):
        assert found["loss"] < tolerance and found["error"] < tolerance
        assert 0.4 < found["share"] < 0.6 and found["same names"]
        assert found["seen"] == {"stream": ["torch.float32"], "weight": [f"torch.{dtype}"]}


def test_between_micro_batches_each_process_of_fsdp_keeps_its_part_of_the_gradients(gloo):
    """The memory of a plan has no whole gradients, and its exchanges are those of each micro-step."""
    assert gloo(2, parallel.between_micro_batches) == pytest.approx([0.5, 0.5], abs=0.1)


def test_what_fsdp_cannot_do_is_refused_and_one_process_does_it():
    precision = Precision(torch.device("cpu"), "float16")
    for name, cfg in (("dtype", TrainConfig(parallel="fsdp")), ("compile", TrainConfig(parallel="fsdp", compile=True))):
        with pytest.raises(ConfigError, match=f"^{name}: "):
            check_parallel(cfg, Processes(0, 2), precision)
        check_parallel(cfg, ALONE, precision)
    check_parallel(TrainConfig(parallel="ddp", compile=True), Processes(0, 2), precision)


def test_a_signal_to_one_process_stops_all_at_the_same_step_with_one_checkpoint(gloo, tmp_path, alone):
    said = gloo(2, parallel.signalled, alone[0], str(tmp_path))
    assert said[0] == said[1]
    assert said[0][1] == 5 and said[0][0].startswith("SIGTERM: stopped at step 5 and saved ")


TRAINED = [
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--batch-size", "4", "--dropout", "0"),
    *("--max-steps", "12", "--eval-interval", "4", "--eval-batches", "1", "--log-interval", "1", "--device", "cpu"),
]


def test_torchrun_starts_failed_processes_again_and_the_run_goes_on(tmp_path, alone, capsys):
    """The second process fails after step 5 and, once it was started again, is killed after step 9."""
    data = alone[0]["blocks"]
    program = Path(failing_processes.__file__)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    command = [*torchrun, str(program), "train", "--data", data, "--out", str(tmp_path / "two"), *TRAINED]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, encoding="utf-8")
    assert ran.returncode == 0, ran.stderr
    ours = [line for line in ran.stderr.splitlines() if line.startswith("fastgpt train: ")]
    assert ours.count("fastgpt train: the second process fails") == 1
    ended = "fastgpt train: another process has ended, and so does this one"
    assert set(ours) == {"fastgpt train: the second process fails", ended}
    said = "torchrun has started the processes again: the run goes on from step "
    first, second = (int(line.removeprefix(said)) for line in ran.stdout.splitlines() if line.startswith(said))
    # A checkpoint is written in the background: the one before is complete, the last may not be.
    assert first in (0, 4) and second in (4, 8)
    assert ran.stdout.count("done: step 12") == 1
    assert "device: cpu, 2 processes by DDP, 1 thread each, float32" in ran.stdout
    assert "threads" not in tomllib.loads((tmp_path / "two" / "config.toml").read_text(encoding="utf-8"))
    assert main(["train", "--data", data, "--out", str(tmp_path / "one"), "--parallel", "ddp", *TRAINED]) == 0
    assert "parallel: ddp is for several processes, and this is the only one; start" in capsys.readouterr().out
    assert written(tmp_path, "two") == pytest.approx(written(tmp_path, "one"), abs=1e-5)


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_written(gloo, tmp_path, alone):
    with pytest.raises(AssertionError, match="batch_size: 8 rows cannot be shared evenly by 3 processes"):
        gloo(3, parallel.losses, alone[0], str(tmp_path / "runs"), ["blocks"])
    assert not (tmp_path / "runs").exists()


def test_steps_of_several_processes_are_not_recorded():
    assert not is_graphed(TrainConfig(), "cuda", Processes(0, 2)) and is_graphed(TrainConfig(), "cuda")
    with pytest.raises(TrainingError, match="cuda_graph: steps of 2 processes"):
        is_graphed(TrainConfig(cuda_graph=True), "cuda", Processes(0, 2))


def test_an_unknown_way_to_share_is_refused():
    with pytest.raises(ConfigError, match="parallel: expected one of auto, ddp, fsdp"):
        TrainConfig(parallel="horovod")
