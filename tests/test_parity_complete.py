"""An op that is being added: at each of its stages it runs as far as it can, and what it lacks is said, in one line."""

from __future__ import annotations

import pytest
import torch

from fastgpt import doctor, ops, parity
from fastgpt.cli import main
from fastgpt.ops import backend, reference
from fastgpt.ops.backend import dispatch
from fastgpt.parity import cases, complete, run_parity
from fastgpt.parity.cases import ParityCase

X = torch.tensor([-1.0, 2.0, 3.0])


def double(x, *, backend="auto"):
    return dispatch("double", backend, x)


class Stages:
    """Gives `fastgpt` the parts of an op called double, one after the other."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        patch.setattr(backend, "_registry", dict(backend._registry))
        patch.setattr(backend, "PREFERENCE", dict(backend.PREFERENCE))
        patch.setattr(complete, "PREFERENCE", backend.PREFERENCE)

    def has_preference(self) -> None:
        names = ("native", "torch")
        self.patch.setitem(backend.PREFERENCE, "double", {"cpu": names, "cuda": names})
        for module in (backend, complete):
            self.patch.setattr(module, "OPS", (*module.OPS, "double"))

    def has_function(self) -> None:
        self.patch.setattr(ops, "double", double, raising=False)

    def has_torch(self) -> None:
        backend.register("double", "torch", lambda x: x + x)

    def has_kernel(self) -> None:
        backend.register("double", "native", lambda x: 2 * x)

    def has_formula(self) -> None:
        self.patch.setattr(reference, "double", lambda x: x + x, raising=False)

    def has_cases(self) -> None:
        case = ParityCase("double", "odd", lambda draw: {"x": draw.normal(3)})
        self.patch.setattr(cases, "CASES", (*cases.CASES, case))

    def has_yardstick(self) -> None:
        self.patch.setitem(parity.YARDSTICKS, "double", lambda x: x.add(x))


STAGES = [name for name in vars(Stages) if name.startswith("has_")]


@pytest.fixture
def stages(monkeypatch) -> Stages:
    return Stages(monkeypatch)


def lines_of_doctor() -> list[str]:
    return [line.strip() for line in doctor.report().splitlines() if "double" in line]


def test_the_ops_of_this_package_are_complete() -> None:
    assert complete.half_added() == {} and set(complete.public_ops()) == set(backend.OPS)


@pytest.mark.parametrize("n_stages", range(1, len(STAGES)))
def test_whatever_is_there_is_said_and_nothing_dies(stages, n_stages: int) -> None:
    for name in STAGES[:n_stages]:
        getattr(stages, name)()
    lacks = complete.half_added()["double"]
    assert lacks.startswith("half-added, it lacks its ") and "\n" not in lacks
    said = lines_of_doctor()
    assert f"double: {lacks}" in said
    report = run_parity(names=["double"])
    assert report.half_added == {"double": lacks} and f"double: {lacks}" in str(report) and not report.failures
    assert bool(report.rows) == complete.can_be_measured("double") == ("has_cases" in STAGES[:n_stages])


def test_from_the_first_part_to_the_last(stages) -> None:
    with pytest.raises(ValueError, match="op: unknown op 'double'; expected one of 'attention', "):
        ops.explain("double", X)
    stages.has_preference()
    with pytest.raises(ValueError, match=r"op: 'double' is half-added: fastgpt/ops/__init__.py does not export"):
        ops.explain("double", X)
    stages.has_function()
    for call in (lambda: ops.double(X), lambda: ops.explain("double", X)):
        with pytest.raises(
            backend.BackendError, match=r"double is half-added: it has no torch backend.* add register\("
        ):
            backend.PREFERENCE["double"] = {}  # without a kernel of its own
            call()
    stages.has_torch()
    assert torch.equal(ops.double(X), 2 * X) and ops.explain("double", X).backend == "torch"
    stages.has_preference()
    stages.has_kernel()
    stages.has_formula()
    assert main(["parity", "--only", "double"]) == 1, "it could not be measured"
    stages.has_cases()
    assert "half-added, it lacks its yardstick" in complete.half_added()["double"]
    assert main(["parity", "--only", "double"]) == 0, "the formula itself is the yardstick"
    stages.has_yardstick()
    assert complete.half_added() == {}


def test_a_wrong_op_without_a_yardstick_does_not_pass(stages) -> None:
    for name in STAGES:
        getattr(stages, name)()
    del parity.YARDSTICKS["double"]
    backend.register("double", "torch", lambda x: x * 2.01)
    assert run_parity(names=["double"], backends=["torch"]).failures


def test_a_function_without_a_line_in_the_table_runs_on_torch(stages) -> None:
    stages.has_function()
    stages.has_torch()
    stages.has_kernel()
    assert ops.explain("double", X).backend == "torch" and torch.equal(ops.double(X), 2 * X)
    assert "its line in PREFERENCE (fastgpt/ops/backend.py)" in complete.missing_parts("double")


def test_on_a_gpu_a_kernel_without_a_self_test_is_left_to_pytorch(stages, monkeypatch) -> None:
    for name in STAGES:
        getattr(stages, name)()
    monkeypatch.setattr(backend, "unavailable", lambda name, device: None)
    taken, reasons = backend.choose("double", "auto", "cuda", (X,), {})
    assert taken == "torch" and "no self-test yet: variants.py" in reasons["native"]
    assert backend.choose("double", "native", "cuda", (X,), {})[0] == "native"
    monkeypatch.setattr(backend.self_test, "_setting", "0")
    assert backend.choose("double", "auto", "cuda", (X,), {})[0] == "native"


def test_parity_of_some_ops(capsys) -> None:
    assert main(["parity", "--only", "activation", "layer_norm"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]} <= {
        *("activation", "layer_norm", "skipped")
    }
    assert main(["parity", "--only", "norm"]) == 2
    assert "--only: unknown op 'norm'; expected some of attention, layer_norm, " in capsys.readouterr().err


def test_a_benchmark_that_is_not_written(capsys) -> None:
    assert main(["bench", "--only", "double"]) == 2
    assert capsys.readouterr().err.startswith(
        "fastgpt bench: --only: there is no benchmarks/bench_double.py; there are"
    )
