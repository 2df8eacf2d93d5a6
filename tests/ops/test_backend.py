"""Which backend runs: named, preferred by block or environment, or the fastest that serves; and what is said of it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import fastgpt
from fastgpt import GPT, GPTConfig, ops, use_backend
from fastgpt.ops import backend as module
from fastgpt.ops.backend import BACKENDS, OPS, BackendError, check_preference, preferred
from fastgpt.parity import Draw, parity_cases

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
        monkeypatch.setattr(module, "_accepted", {"auto"})
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
    said = f"backend='native' was asked for, but cannot run layer_norm here: {reason}; leave backend= out"
    with pytest.raises(BackendError, match=said) as error:
        ops.layer_norm(X, W, backend="native")
    assert error.value.reason == reason and "\n" not in str(error.value)
    with use_backend("torch"), pytest.raises(BackendError, match=reason):  # a preference changes nothing
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


def test_use_backend_nests_and_ends_with_an_exception(monkeypatch) -> None:
    monkeypatch.setattr(module, "unavailable", lambda backend, device_type: None)
    outside = preferred()
    with use_backend("native"):
        assert preferred() == "native"
        with use_backend("torch"):
            assert preferred() == "torch"
        with pytest.raises(KeyError), use_backend("auto"):
            assert preferred() == "auto"
            raise KeyError
        assert preferred() == "native"
    assert preferred() == outside
    twice = use_backend("torch")
    with twice, use_backend("native"), twice:
        assert preferred() == "torch"
    assert preferred() == outside


# --- a backend that is preferred ---


@pytest.fixture
def all_run(monkeypatch):
    """Every backend runs on this machine, as far as it is asked."""
    monkeypatch.setattr(module, "_accepted", {"auto"})
    monkeypatch.setattr(module, "unavailable", lambda backend, device_type: None)


def first_call(op: str) -> dict:
    case = parity_cases(op)[0]
    return case.arguments(Draw(torch.float32, "cpu")) | case.options


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_each_op_takes_the_preferred_backend_where_it_has_the_op(all_run, op: str, name: str) -> None:
    usual = ops.explain(op, **first_call(op))
    with use_backend(name):
        found = ops.explain(op, **first_call(op))
    assert found.preferred == name and usual.preferred == "auto"
    if module.implements(name, op):
        assert str(found) == f"{op}: runs on {name}, which is preferred"
    else:
        assert found.backend == usual.backend and found.reasons == {name: f"it has no {op}"} | usual.reasons
        assert str(found).startswith(
            f"{op}: runs on {usual.backend}; {name} is preferred\n  not {name}: it has no {op}"
        )


@pytest.mark.parametrize("op", OPS)
def test_what_a_preference_gives_on_a_gpu(all_run, monkeypatch, op: str) -> None:
    """Tensors without numbers stand for those of a GPU: the choice, which passes over kernels for CPUs, runs none."""
    monkeypatch.setattr(module.self_test, "SELF_TESTED", set())
    monkeypatch.setattr(module, "_warned", set())
    call = {name: x.bfloat16() if getattr(x, "is_floating_point", bool)() else x for name, x in first_call(op).items()}
    call = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("triton", "native"):
            with use_backend(name):
                taken, reasons = module.choose(op, "auto", "cuda", (), call)
            assert taken == name or op != {"triton": "attention", "native": "embedding"}[name]
            if taken != name:
                assert taken == module.PREFERENCE[op]["cuda"][0]
                assert list(reasons) == [name] * module.implements(name, op), "there is no such kernel"
                assert all(isinstance(reason, module.Absent) for reason in reasons.values())


def test_a_preferred_backend_that_does_not_serve_the_call_gives_way_and_says_why_once(pretend) -> None:
    pretend(serves=False)
    with use_backend("native"):
        with pytest.warns(UserWarning, match="layer_norm does not take the native backend: it is Tuesday") as caught:
            assert not took_native(ops.layer_norm(X, W))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.layer_norm(X, W)
        assert ops.explain("layer_norm", X, W).reasons["native"] == "it is Tuesday"
    assert len(caught) == 1 and "\n" not in str(caught[0].message) and "FASTGPT_BACKEND=torch" in str(caught[0].message)


def test_nobody_is_warned_of_an_op_that_the_preferred_backend_has_not(all_run, monkeypatch) -> None:
    monkeypatch.setattr(module, "_warned", set())
    with use_backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ops.embedding(torch.tensor([[1]]), X), X[None, 1:2])


def test_a_preference_takes_what_was_not_measured(pretend) -> None:
    pretend(proved=False)
    with use_backend("native"):
        assert took_native(ops.layer_norm(X, W))


def test_a_backend_that_can_serve_nothing_here_is_refused(pretend, monkeypatch) -> None:
    pretend(runs=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = "'native' can serve no op on cpu: no such library; take 'auto', or another backend"
    for refused, source in (
        (lambda: use_backend("native"), "use_backend"),
        (lambda: check_preference("native", "--backend", "cpu"), "--backend"),
    ):
        with pytest.raises(BackendError) as error:
            refused()
        assert str(error.value) == f"{source}: {said}"
    monkeypatch.setattr(module, "_override", "native")  # as FASTGPT_BACKEND=native sets it
    with pytest.raises(BackendError, match=f"FASTGPT_BACKEND: {said}"):
        ops.layer_norm(X, W)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module._availability["native", "cuda"] = None  # it runs on the GPU, and so somewhere
    with use_backend("native"), pytest.warns(UserWarning, match="no such library"):
        assert not took_native(ops.layer_norm(X, W))
    with pytest.raises(BackendError, match="--backend: 'native' can serve no op on cpu: "):
        check_preference("native", "--backend", "cpu")


@pytest.mark.parametrize("name", BACKENDS)
def test_a_whole_model_trains_on_each_preference(name: str) -> None:
    """No backend but torch has every op; the others' ops run on what auto takes."""
    if reason := module.unavailable(name, "cpu"):
        pytest.skip(reason)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=6, n_layer=1, n_head=2, n_embd=8, dropout=0.0))
    tokens = torch.randint(11, (2, 7))

    def gradients(preferred: str) -> list[torch.Tensor]:
        with use_backend(preferred):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    for ours, expected in zip(gradients(name), gradients("torch"), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_a_preference_compiles_into_one_graph(pretend) -> None:
    pretend()
    compiled = torch.compile(lambda: ops.layer_norm(X, W), fullgraph=True, backend="eager")
    for name, native in (("auto", True), ("torch", False), ("native", True)):
        with use_backend(name):
            assert took_native(compiled()) == native

    def prefers(x):
        with use_backend("native"):
            return ops.layer_norm(x, W)

    assert took_native(torch.compile(prefers, fullgraph=True, backend="eager")(X))


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
    done = run_python(
        "import torch; torch.cuda.is_available = lambda: False" + CALL, FASTGPT_BACKEND="triton", TRITON_INTERPRET="0"
    )
    assert done.returncode == 1 and "BackendError: FASTGPT_BACKEND: 'triton' can serve no op on cpu: " in done.stderr


def test_wrong_environment_is_one_line_of_the_command() -> None:
    code = "import sys, fastgpt.cli; sys.exit(fastgpt.cli.main(['doctor']))"
    done = run_python(code, FASTGPT_BACKEND="gpu")
    assert done.returncode == 1
    assert "FASTGPT_BACKEND: unknown backend 'gpu'; expected one of 'auto', 'torch'" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_the_backends_that_the_table_names_and_torch_as_the_last(op: str) -> None:
    for device in ("cpu", "cuda"):
        names = module.PREFERENCE[op][device]
        assert names[-1] == "torch" and all(module.implements(name, op) for name in names)
    assert getattr(fastgpt.ops, op).__doc__


def test_kernels_that_a_gpu_prefers() -> None:
    first = {op: on["cuda"][0] for op, on in module.PREFERENCE.items() if on}
    assert {first[op] for op in ("attention", "layer_norm", "add_layer_norm")} == {"triton"}
    assert {first[op] for op in ("embedding", "cross_entropy", "linear_cross_entropy")} == {"native"}
