"""Several processes that train one model: the same trajectory as one process, in each of them."""

from __future__ import annotations

import pytest

import parallel_runs as parallel
from fastgpt.config import ConfigError, TrainConfig
from fastgpt.training import TrainingError
from fastgpt.training.graph import is_graphed
from fastgpt.training.processes import Processes
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


@pytest.mark.parametrize(("n", "names"), [(2, list(CASES)), (4, list(CASES)[-1:])])
def test_the_trajectory_is_that_of_one_process(gloo, tmp_path, alone, n, names):
    files, folder, known = alone
    of_ranks = gloo(n, parallel.losses, files, str(tmp_path), names)
    for name in names:
        expected = written(folder, name)
        assert written(tmp_path, name) == pytest.approx(expected, abs=1e-5), name
        assert len(expected) == 30 + 3, "a row for each step, and three evaluations"
        for found in of_ranks:
            assert found[name] == pytest.approx(known[name], abs=1e-5), name


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_written(gloo, tmp_path, alone):
    with pytest.raises(AssertionError, match="batch_size: 8 rows cannot be shared evenly by 3 processes"):
        gloo(3, parallel.losses, alone[0], str(tmp_path / "runs"), ["blocks"])
    assert not (tmp_path / "runs").exists()


def test_steps_of_several_processes_are_not_recorded():
    assert not is_graphed(TrainConfig(), "cuda", Processes(0, 2)) and is_graphed(TrainConfig(), "cuda")
    with pytest.raises(TrainingError, match="cuda_graph: steps of 2 processes"):
        is_graphed(TrainConfig(cuda_graph=True), "cuda", Processes(0, 2))


def test_an_unknown_way_to_share_is_refused():
    with pytest.raises(ConfigError, match="parallel: expected one of auto, ddp"):
        TrainConfig(parallel="horovod")
