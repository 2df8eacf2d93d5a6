"""Which backend runs: named, by block, by environment, or the fastest that serves; and what is said about it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import fastgpt
from fastgpt import ops, use_backend
from fastgpt.ops import backend as module
from fastgpt.ops.backend import BackendError, requested

X, W = torch.randn(3, 8), torch.ones(8)


@pytest.fixture
def pretend(monkeypatch):
    """Make a copy of the registry in which layer_norm has a "native" implementation that adds 1000."""

    def install(*, runs: bool = True, serves: bool = True, proved: bool = True) -> list[str]:
        launches: list[str] = []

        def smoke_test(device_type: str) -> None:
            launches.append(device_type)
            if not runs:
                raise OSError("no such library\nand a second line")

        for name in ("_registry", "_smoke_tests", "_availability"):
            monkeypatch.setattr(module, name, dict(getattr(module, name)))
        monkeypatch.setattr(module, "_warned", set())
        monkeypatch.setitem(module.PREFERENCE["layer_norm"], "cpu", ("native", "torch"))
        module._availability.pop(("native", "cpu"), None)
        module.register_smoke_test("native", smoke_test)
        module.register(
            "layer_norm",
            "native",
            lambda x, weight, bias, eps: torch.full_like(x, 1000.0),
            lambda x, *rest: None if serves else "it is Tuesday",
            lambda x, *rest: None if proved else "nobody has measured it",
        )
        return launches

    return install


def took_native(out: torch.Tensor) -> bool:
    return bool((out == 1000.0).all())


def test_auto_passes_over_what_was_not_measured_and_a_name_takes_it(pretend) -> None:
    pretend(proved=False)
    with pytest.warns(UserWarning, match="does not take the native backend: nobody has measured it"):
        assert not took_native(ops.layer_norm(X, W))
    assert took_native(ops.layer_norm(X, W, backend="native"))
    assert ops.explain("layer_norm", X, W).reasons["native"] == "nobody has measured it"


def test_auto_takes_the_fastest_and_tries_it_once(pretend) -> None:
    launches = pretend()
    assert took_native(ops.layer_norm(X, W)) and took_native(ops.layer_norm(X, W))
    assert launches == ["cpu"]
    assert str(ops.explain("layer_norm", X, W)) == "layer_norm: runs on native"
    assert not took_native(ops.layer_norm(X, W, backend="torch"))


@pytest.mark.parametrize(
    "kind, reason", [({"runs": False}, "no such library"), ({"serves": False}, "it is Tuesday")], ids=["runs", "serves"]
)
def test_auto_falls_back_and_says_why_once(pretend, kind: dict, reason: str) -> None:
    pretend(**kind)
    with pytest.warns(UserWarning, match=reason) as caught:
        assert not took_native(ops.layer_norm(X, W))
    assert len(caught) == 1 and caught[0].filename == __file__  # it points at the caller
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.layer_norm(X, W)
    reasons = ops.explain("layer_norm", X, W).reasons
    assert list(reasons) == ["native", "triton"] and reasons["native"] == reason
    assert str(ops.explain("layer_norm", X, W)).startswith(
        f"layer_norm: runs on torch\n  not native: {reason}\n  not tri"
    )


@pytest.mark.parametrize(
    "kind, reason", [({"runs": False}, "no such library"), ({"serves": False}, "it is Tuesday")], ids=["runs", "serves"]
)
def test_asked_for_and_cannot_serve_raises(pretend, kind: dict, reason: str) -> None:
    pretend(**kind)
    with pytest.raises(BackendError, match=f"'native' was asked for, but cannot run layer_norm here: {reason}"):
        ops.layer_norm(X, W, backend="native")
    with use_backend("native"), pytest.raises(BackendError, match=reason):
        ops.layer_norm(X, W)
    with pytest.raises(BackendError, match=reason):
        ops.explain("layer_norm", X, W, backend="native")


def test_no_implementation_and_unknown_names() -> None:
    with pytest.raises(BackendError, match="embedding has no triton implementation"):
        ops.embedding(torch.tensor([[0]]), torch.zeros(1, 4), backend="triton")
    for call in (lambda: ops.layer_norm(X, W, backend="cuda"), lambda: use_backend("Torch")):
        with pytest.raises(ValueError, match=r"unknown backend .*expected one of 'auto', 'torch', 'triton', 'native'"):
            call()
    with pytest.raises(ValueError, match="op: unknown op 'norm'"):
        ops.explain("norm", X)
    with pytest.raises(TypeError, match="none of those given is a tensor"):
        ops.explain("layer_norm", 3)
    with pytest.raises(TypeError, match="takes the arguments of layer_norm: missing a required argument: 'weight'"):
        ops.explain("layer_norm", X)


def test_use_backend_nests_and_ends_with_an_exception() -> None:
    outside = requested()
    with use_backend("native"):
        assert requested() == "native"
        with use_backend("torch"):
            assert requested() == "torch"
            assert requested("triton") == "triton"  # the call's own wins
        with pytest.raises(KeyError), use_backend("auto"):
            assert requested() == "auto"
            raise KeyError
        assert requested() == "native"
    assert requested() == outside
    twice = use_backend("torch")
    with twice, use_backend("native"), twice:
        assert requested() == "torch"
    assert requested() == outside


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)


CALL = """
import torch, fastgpt
x, w = torch.randn(3, 8), torch.ones(8)
print(fastgpt.ops.explain("layer_norm", x, w).backend)
"""


def test_environment() -> None:
    done = run_python(CALL, FASTGPT_BACKEND="torch")
    assert (done.returncode, done.stdout) == (0, "torch\n"), done.stderr
    done = run_python(CALL + "fastgpt.ops.embedding(torch.tensor([[0]]), x)", FASTGPT_BACKEND="triton")
    assert done.returncode == 1 and "backend='triton' was asked for" in done.stderr


def test_wrong_environment_is_one_line_of_the_command() -> None:
    code = "import sys, fastgpt.cli; sys.exit(fastgpt.cli.main(['doctor']))"
    done = run_python(code, FASTGPT_BACKEND="gpu")
    assert done.returncode == 1
    assert "FASTGPT_BACKEND: unknown backend 'gpu'; expected one of 'auto', 'torch'" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_every_op_runs_on_torch_on_every_device() -> None:
    for op in module.OPS:
        for device in ("cpu", "cuda"):
            assert module.PREFERENCE[op][device][-1] == "torch"
        ours = "triton" if op in ("attention", "layer_norm", "add_layer_norm") else "native"
        on_gpus = "torch" if op == "activation" else ours  # by a kernel of PyTorch's
        assert module.PREFERENCE[op]["cuda"][0] == on_gpus and module.implements(ours, op)
        assert (op, "torch") in module._registry
        assert getattr(fastgpt.ops, op).__doc__
