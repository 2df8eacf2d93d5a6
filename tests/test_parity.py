"""The parity report: it passes, says what it skipped, and a wrong op does not pass it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os

import pytest
import torch

from fastgpt import cli, ops, parity
from fastgpt.ops import backend
from fastgpt.ops.backend import OPS
from fastgpt.parity import DTYPES, measure_case, parity_cases, run_parity

MEASURED = {*OPS, "linear"}  # an internal op


def test_cases_cover_every_op_and_have_names_of_their_own() -> None:
    assert {case.op for case in parity_cases()} == MEASURED == set(parity.YARDSTICKS)
    names = [(case.op, case.name) for case in parity_cases()]
    assert len(set(names)) == len(names)
    assert {case.op for case in parity_cases("embedding", "attention")} == {"embedding", "attention"}


@pytest.fixture
def without_overflow_checks(monkeypatch) -> None:
    """A third of the interpreter's time. Sizes are small here; the checks stay on in tests/triton_kernels/."""
    if os.environ["TRITON_INTERPRET"] != "0" and importlib.util.find_spec("triton"):
        from triton.runtime import interpreter

        quick = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", quick)


def test_report_passes(tmp_path, capsys, without_overflow_checks) -> None:
    out = tmp_path / "report.json"
    assert cli.main(["parity", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["passed"] and report["device"] == "cpu" and report["versions"]["torch"] == torch.__version__
    ran = {(row["op"], row["dtype"]) for row in report["rows"] if row["backend"] == "torch"}
    assert ran == {(op, str(dtype).removeprefix("torch.")) for op in MEASURED for dtype in DTYPES}
    for row in report["rows"]:
        assert row["ours"] <= 2 * row["torch"] + row["atol"] and row["reason"] == ""
    values = {row["value"] for row in report["rows"] if row["op"] == "attention"}
    assert values == {"out", "d q", "d k", "d v"}
    # Nothing is dropped in silence: what a backend implements is a row, or a skip with its reason.
    measured = {(row["op"], row["backend"], row["dtype"], row["case"]) for row in report["rows"]}
    skipped = {(skip["op"], skip["backend"], skip["dtype"], skip["case"]) for skip in report["skipped"]}
    assert not measured & skipped
    implemented = [case for name in backend.BACKENDS for case in parity_cases() if backend.implements(name, case.op)]
    assert len(measured | skipped) == len(implemented) * len(DTYPES)
    assert all(skip["reason"] for skip in report["skipped"])
    text = capsys.readouterr().out
    assert f"{len(parity_cases())} cases" in text and "0 failed" in text
    assert len(text.splitlines()) < 100


@pytest.fixture
def wrong(monkeypatch):
    """Replace an op's torch implementation by one made from it."""

    def install(op: str, make) -> None:
        monkeypatch.setattr(backend, "_registry", dict(backend._registry))
        backend.register(op, "torch", make(backend._registry[op, "torch"].run))

    return install


def failed_values(op: str, dtype: torch.dtype = torch.float32) -> set[str]:
    return {row.value for row in run_parity(names=[op], backends=["torch"], dtypes=[dtype]).failures}


def test_a_wrong_op_fails_the_command(wrong, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(parity.cases, "CASES", tuple(parity_cases("layer_norm", "embedding")))
    wrong("layer_norm", lambda right: lambda x, w, b=None, eps=1e-5: right(x, w, b, 1.1 * eps + 1e-4))
    out = tmp_path / "report.json"
    assert cli.main(["parity", "--out", str(out)]) == 1
    text = capsys.readouterr().out
    assert "FAILED layer_norm, torch, float32" in text and "FAILED embedding" not in text
    report = json.loads(out.read_text())
    assert not report["passed"]
    assert any(row["op"] == "layer_norm" and not row["passed"] for row in report["rows"])


def test_a_wrong_gradient_alone_fails(wrong) -> None:
    class WrongBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + 1e-4)

    wrong("embedding", lambda right: lambda t, table, p=None, **o: right(t, WrongBackward.apply(table), p, **o))
    assert failed_values("embedding") == {"d token_table"}


@pytest.mark.parametrize(
    "op, change, value",
    [
        ("cross_entropy", lambda right: lambda *a, **o: right(*a, **o).detach(), "call"),  # no gradient at all
        ("attention", lambda right: lambda *a, **o: right(*a, **{**o, "is_causal": True}), "out"),
        ("attention", lambda right: lambda q, *a, **o: (right(q, *a, **o), q.detach().mul_(1.0001))[0], "out"),
        ("attention", lambda right: lambda *a, **o: right(*a, **o).double(), "out"),  # a dtype of its own
        ("cross_entropy", lambda right: lambda *a, **o: right(*a, **o) * math.nan, "out"),
        ("add_layer_norm", lambda right: lambda *a, **o: right(*a, **{**o, "seed": 1}), "h"),  # another mask
        ("linear_cross_entropy", lambda right: lambda *a, **o: right(*a, **o)[None], "out"),  # another shape
        ("linear", lambda right: lambda x, weight, bias=None: right(1.01 * x, weight, bias), "d weight"),
    ],
    ids=["detached", "mask", "mutation", "dtype", "nan", "dropout mask", "shape", "internal op"],
)
def test_other_wrongs_fail(wrong, monkeypatch, op: str, change, value: str) -> None:
    wrong(op, change)
    if op == "linear_cross_entropy":  # its gradient must have the shape too
        monkeypatch.setattr(
            parity.cases, "CASES", tuple(c for c in parity_cases(op) if c.options.get("reduction") == "sum")
        )
    assert value in failed_values(op)


def test_half_precision_statistics_fail(wrong) -> None:
    """What the yardstick is for: a norm that sums in bfloat16 passes a loose tolerance, not this one."""

    def make(right):
        def low(x, weight, bias=None, eps=1e-5):
            centred = x - x.cumsum(-1)[..., -1:] / x.shape[-1]
            y = centred * torch.rsqrt((centred * centred).cumsum(-1)[..., -1:] / x.shape[-1] + eps) * weight
            return y if bias is None else y + bias

        return low

    wrong("layer_norm", make)
    assert "out" in failed_values("layer_norm", torch.bfloat16)


def test_an_unavailable_backend_is_skipped_with_its_reason(monkeypatch) -> None:
    def broken(device_type: str) -> None:
        raise OSError("no driver")

    for name in ("_registry", "_smoke_tests", "_availability"):
        monkeypatch.setattr(backend, name, dict(getattr(backend, name)))
    backend._availability.pop(("native", "cpu"), None)
    backend.register_smoke_test("native", broken)
    backend.register("layer_norm", "native", ops.layer_norm)
    report = run_parity(names=["layer_norm"], backends=["native"], dtypes=[torch.float32])
    assert not report.rows and len(report.skips) == len(parity_cases("layer_norm"))
    assert {skip.reason for skip in report.skips} == {"no driver"}
    with pytest.raises(backend.BackendError, match="no driver"):
        measure_case(parity_cases("layer_norm")[0], "native", torch.float32)


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["--device", "tpu"], 2, "--device: expected cpu or cuda, got 'tpu'"),
        (["--out", "/no/such/folder/report.json"], 2, "expected a file in a folder that exists"),
        (["--out", "/"], 2, "expected a file in a folder that exists"),
    ],
)
def test_bad_usage(args: list[str], code: int, message: str, capsys) -> None:
    assert cli.main(["parity", *args]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu(capsys) -> None:
    assert cli.main(["parity", "--device", "cuda"]) == 1
    error = capsys.readouterr().err
    assert "finds no CUDA device" in error and error.count("\n") == 1
