"""Trust at first use: a kernel made wrong on purpose is not taken, a right one is, and outcomes are kept on disk.

Here the self-tests run on CPU tensors: the Triton kernels on Triton's interpreter, the native ones as compiled.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastgpt import doctor, ops
from fastgpt.ops import backend, kept_outcomes, self_test
from fastgpt.ops.attention import self_attention
from fastgpt.ops.attention_cached import attention_cached_
from fastgpt.ops.variants import LinearCrossEntropy, typical_calls

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU there is no interpreter to test with")

X = torch.linspace(-2.0, 2.0, 3 * 48).sin().view(3, 48)
W = torch.linspace(0.5, 1.5, 48)
WEIGHT = W.clone().requires_grad_()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, tmp_path):
    """`auto` prefers Triton on the CPU, and tests itself there; no outcome is known."""
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_test, "SELF_TESTED", {"cpu"})
    for op in ("attention", "layer_norm", "add_layer_norm"):
        monkeypatch.setitem(backend.PREFERENCE[op], "cpu", ("triton", "torch"))
    for module, name in ((self_test, "_outcomes"), (backend, "_verdicts")):
        monkeypatch.setattr(module, name, {})
    for module, name in ((self_test, "_said"), (backend, "_warned")):
        monkeypatch.setattr(module, name, set())
    monkeypatch.setattr(backend, "_registry", dict(backend._registry))
    monkeypatch.setattr(self_test, "_setting", "1")
    kept_outcomes._say_once.cache_clear()
    torch._dynamo.reset()


@pytest.fixture
def tested(monkeypatch) -> list[str]:
    """The ops of the self-tests that ran."""
    ran: list[str] = []
    measure = self_test.measure
    monkeypatch.setattr(self_test, "measure", lambda op, *rest: ran.append(op) or measure(op, *rest))
    return ran


WRONG = {
    "forward": ("mean = tl.sum(x, axis=1) / width", "mean = tl.sum(x, axis=1) / (width + 1)"),
    "gradient": ("along_x = tl.sum(grad * x_hat, axis=1) / width", "along_x = tl.sum(grad * x_hat, axis=1) * 0.0"),
    "dropout": ("x = tl.where(keep, x * keep_scale, 0.0)", "x = tl.where(keep, x, 0.0)"),
    "NaN": ("mean = tl.sum(x, axis=1) / width", "mean = tl.sum(x, axis=1) / width * float('nan')"),
}


def with_a_wrong_line(module: ModuleType, folder: Path, right: str, wrong: str) -> ModuleType:
    """A copy of a module of kernels with one line changed."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert right in source, "the kernel has changed: name another line of it to make wrong"
    file = folder / f"wrong_{module.__name__.rpartition('.')[2]}.py"
    file.write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"fastgpt.triton_kernels.{file.stem}", file)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


@pytest.fixture
def make_wrong(monkeypatch, tmp_path):
    """Replace the layer norm's kernels by a copy with one line changed."""
    import fastgpt.triton_kernels as package
    from fastgpt.triton_kernels import layer_norm

    def replace(how: str) -> None:
        monkeypatch.setattr(package, "layer_norm", with_a_wrong_line(layer_norm, tmp_path, *WRONG[how]))

    return replace


@contextlib.contextmanager
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def backend_of(op: str, *args, **kwargs) -> str:
    return ops.explain(op, *args, **kwargs).backend


def norm(x: Tensor = X, weight: Tensor = WEIGHT, **options) -> Tensor:
    return ops.layer_norm(x, weight, **options)


# ---- right and wrong kernels ----


def test_right_kernels_are_taken_after_one_test_each(tested) -> None:
    heads = X.bfloat16().view(1, 3, 3, 16).requires_grad_()  # float32 is left to PyTorch
    tokens = torch.tensor([[0, 2]])
    calls = {
        "attention": (heads, heads, heads),
        "layer_norm": (X, WEIGHT),
        "add_layer_norm": (X, X, WEIGHT),
        "embedding": (tokens, X.clone().requires_grad_()),
        "cross_entropy": (X.clone().requires_grad_(), torch.arange(3)),
        "linear_cross_entropy": (X, X.clone().requires_grad_(), torch.arange(3)),
        "linear_log_probs": (X, X.clone().requires_grad_(), torch.arange(3)),
    }
    with silence():
        for op, args in calls.items():
            if (
                op in backend.PREFERENCE
                and "native" in backend.PREFERENCE[op]["cuda"]
                and backend.unavailable("native", "cpu")
            ):
                continue
            for _ in range(2):
                assert backend_of(op, *args) != "torch"
                getattr(ops, op)(*args)
    assert sorted(tested) == sorted(set(tested)) and len(tested) >= 3
    assert all(outcome.passed for outcome in self_test.known_outcomes(CPU).values())


@pytest.mark.parametrize("how", ["forward", "gradient", "NaN"])
def test_a_wrong_kernel_is_said_loudly_once_and_pytorch_serves(how, make_wrong) -> None:
    make_wrong(how)
    x = X.clone().requires_grad_()
    with pytest.warns(UserWarning) as caught:
        y = norm(x)
    (said,) = [str(warning.message) for warning in caught]
    value = "d x" if how == "gradient" else "out"
    assert said.startswith("fastgpt: SELF-TEST FAILED: layer_norm on the triton backend is not right on this machine")
    assert "variant: float32, weight float32, width 48" in said and "allowed" in said
    assert f"torch {torch.__version__}" in said and "kernels " in said and "report" in said
    assert "\n" not in said and said.endswith("; FASTGPT_BACKEND=torch leaves out all kernels")
    assert ("error inf" in said) == (how == "NaN") and (value in said or how != "gradient")
    with silence():
        assert torch.equal(y, norm(x, backend="torch")) and torch.equal(norm(x), y)
        answer = ops.explain("layer_norm", x, WEIGHT)
    assert answer.backend == "torch" and answer.reasons["triton"].startswith("its self-test failed on this device: ")


def test_only_the_wrong_variant_is_not_taken(make_wrong) -> None:
    make_wrong("dropout")
    with pytest.warns(UserWarning, match="variant: .*dropout"):
        assert backend_of("add_layer_norm", X, X, WEIGHT, dropout_p=0.3, seed=1) == "torch"
    with silence():
        assert backend_of("add_layer_norm", X, X, WEIGHT) == "triton"


def test_a_wrong_gradient_does_not_keep_generation_from_the_kernel(make_wrong) -> None:
    make_wrong("gradient")
    x = X.clone().requires_grad_()
    with torch.no_grad(), silence():
        assert backend_of("layer_norm", x, W) == "triton"
    with pytest.warns(UserWarning, match="d x: error"):
        assert backend_of("layer_norm", x, W) == "torch"


def test_each_kernel_of_attention_is_a_variant(monkeypatch) -> None:
    """Wrong for short sequences only, which have a kernel of their own."""
    from fastgpt.triton_kernels import attention

    forward = attention.forward

    def wrong(q, *rest):
        out, lse = forward(q, *rest)
        return (out * 1.05 if q.shape[2] <= 64 else out), lse

    monkeypatch.setattr(attention, "forward", wrong)
    q = torch.zeros(1, 2, 40, 16, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="one tile"):
        assert backend_of("attention", q, q, q) == "torch"
    q = torch.zeros(1, 2, 70, 16, dtype=torch.bfloat16)
    with silence():
        assert backend_of("attention", q, q, q) == "triton"


# ---- q, k and v side by side, as the model's training calls attention ----

SEPARATE, PACKED = "attention_triton", "attention_packed"  # the ops whose gradients are three tensors, and one


@pytest.fixture
def wrong_packed_gradient(monkeypatch, tmp_path):
    """The rows of one gradient of qkv are as far apart as if only q and k lay side by side."""
    from fastgpt.triton_kernels import attention, attention_backward

    right, wrong = "(3 * HEAD_SIZE if PACKED else HEAD_SIZE)", "(2 * HEAD_SIZE if PACKED else HEAD_SIZE)"
    copy = with_a_wrong_line(attention_backward, tmp_path, right, wrong)
    for kernel in ("one_tile_backward_kernel", "grad_q_kernel", "grad_kv_kernel"):
        monkeypatch.setattr(attention, kernel, getattr(copy, kernel))


def side_by_side(T: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, T, 3 * 32, dtype=torch.bfloat16, requires_grad=True)


def op_of(qkv: Tensor, **options) -> str:
    out = self_attention(qkv, 2, **options)
    names = [name for function in walk(out.grad_fn) if (name := function.name()).startswith("attention_")]
    return names[0].removesuffix("Backward") if names else "torch"


def walk(function) -> Iterator[torch.autograd.graph.Node]:
    yield function
    for above, _ in function.next_functions:
        if above is not None:
            yield from walk(above)


@pytest.mark.parametrize("T", [20, 70])  # of the kernel of one tile, and of two passes
def test_one_gradient_of_qkv_is_a_variant(T, tested) -> None:
    qkv = side_by_side(T)
    with silence():
        assert [op_of(qkv) for _ in range(2)] == [PACKED] * 2
    (name,) = self_test.known_outcomes(CPU)
    assert tested == ["attention"] and name.endswith("stages, gradient of qkv in one tensor")
    assert op_of(qkv, dropout_p=0.1) == PACKED and tested == ["attention"] * 2
    assert all(outcome.passed for outcome in self_test.known_outcomes(CPU).values())
    with torch.no_grad():
        self_attention(qkv, 2)
    assert "forward alone" in " ".join(self_test.known_outcomes(CPU))


@pytest.mark.parametrize("T", [20, 70])
def test_a_wrong_gradient_of_qkv_leaves_three_separate_ones(T, wrong_packed_gradient) -> None:
    qkv = side_by_side(T)
    with pytest.warns(UserWarning, match="SELF-TEST FAILED") as caught:
        assert op_of(qkv) == SEPARATE
    (said,) = [str(warning.message) for warning in caught]
    assert "not right on this machine; kernels with separate gradients serve, else PyTorch;" in said
    assert "gradient of qkv in one tensor; d " in said
    with silence():
        (ours,) = torch.autograd.grad(self_attention(qkv, 2).float().square().sum(), qkv)
    (torchs,) = torch.autograd.grad(self_attention(qkv, 2, backend="torch").float().square().sum(), qkv)
    torch.testing.assert_close(ours, torchs, atol=0.1, rtol=0.1)


def test_where_both_are_wrong_pytorch_serves(wrong_packed_gradient) -> None:
    backend.register("attention", "triton", lambda q, *args, **options: q * 0.0)
    with pytest.warns(UserWarning, match="SELF-TEST FAILED") as caught:
        assert op_of(side_by_side(20)) == "torch"
    assert len(caught) == 2


def test_one_gradient_of_qkv_under_autocast_and_compiled() -> None:
    """The dtype is autocast's, to which qkv is cast before the kernels; a traced call asks about the same variant."""
    with torch.autocast("cpu", torch.bfloat16):
        assert op_of(side_by_side(20).detach().float().requires_grad_()) == PACKED
    (name,) = self_test.known_outcomes(CPU)
    assert "bfloat16" in name
    compiled = torch.compile(lambda qkv: self_attention(qkv, 2), fullgraph=True, backend="aot_eager")
    qkv = side_by_side(20)
    assert torch.equal(compiled(qkv), self_attention(qkv, 2))
    assert list(self_test.known_outcomes(CPU)) == [name]


# ---- a cache whose length is on the device, as generation in a CUDA graph calls attention ----


def appended(length: int = 5) -> Tensor:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 1, 16, dtype=torch.bfloat16)
    keys, values = torch.randn(2, 1, 2, 40, 16, dtype=torch.bfloat16)
    return attention_cached_(q, k, v, keys, values, torch.tensor(length))


WRONG_CACHES = {
    "appended one row too far": (
        "key_head, k_head_stride), n_keys, k_stride)",
        "key_head, k_head_stride), n_keys + 1, k_stride)",
    ),
    "the new keys are not seen": ("new_seen = (new < n_new)", "new_seen = (new < 0 * n_new)"),
}


def test_attention_of_a_cache_is_a_variant(tested) -> None:
    with silence():
        ours, again = appended(), appended(6)
    assert tested == ["attention"] and not torch.equal(ours, again)
    ((name, outcome),) = self_test.known_outcomes(CPU).items()
    assert name.endswith("a cache whose length is on the device, forward alone") and outcome.passed
    with backend.use_backend("torch"):
        torch.testing.assert_close(ours, appended(), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("how", WRONG_CACHES)
def test_a_wrong_kernel_of_the_cache(how, monkeypatch, tmp_path) -> None:
    import fastgpt.triton_kernels as package
    from fastgpt.triton_kernels import attention_cached

    monkeypatch.setattr(package, "attention_cached", with_a_wrong_line(attention_cached, tmp_path, *WRONG_CACHES[how]))
    with pytest.warns(UserWarning, match="a cache whose length is on the device(.|\\n)*out: error"):
        ours = appended()
    with backend.use_backend("torch"):
        assert torch.equal(ours, appended())


# ---- other faults ----


def failing(out: Tensor) -> Tensor:
    raise OSError("no such instruction\nand a second line")


CALLS = itertools.count()
FAULTS = {
    "raises": (failing, "it raised OSError: no such instruction"),
    "other bits each time": (
        lambda out: out * (1.0 + 1e-6 * (next(CALLS) % 2)),
        "two runs on the same inputs gave different",
    ),
    "wrong shape": (lambda out: out[..., :1], "out: shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("op", ["layer_norm", "cross_entropy"])
def test_other_faults(op, fault) -> None:
    spoil, reason = FAULTS[fault]
    if op == "cross_entropy" and fault == "wrong shape":
        pytest.skip("a mean has no shape to be wrong")
    name = "triton" if op == "layer_norm" else "native"
    if backend.unavailable(name, "cpu"):
        pytest.skip(f"no {name} backend here")
    right = backend._registry[op, name].run
    backend.register(op, name, lambda *args, **kwargs: spoil(right(*args, **kwargs)))
    args = (X, W) if op == "layer_norm" else (X, torch.arange(3))
    with pytest.warns(UserWarning, match=reason):
        assert backend_of(op, *args) == "torch"
    assert "second line" not in ops.explain(op, *args).reasons[name]


def test_each_op_that_fails_is_said() -> None:
    """The losses have variants of the same name."""
    wrong = kept_outcomes.Outcome(False, "out: error 1")
    with pytest.warns(UserWarning) as caught:
        for op in ("cross_entropy", "linear_cross_entropy", "cross_entropy"):
            self_test._warn(op, "native", "float32, 65 classes", CPU, wrong)
    assert len(caught) == 2


def test_no_memory_is_no_fault_to_keep(monkeypatch) -> None:
    def out_of_memory(**arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    backend.register("layer_norm", "triton", out_of_memory)
    with pytest.warns(UserWarning, match="no self-test of layer_norm .* was possible(.|\n)*CUDA out of memory"):
        assert backend_of("layer_norm", X, W) == "torch"
    assert kept_outcomes.read(CPU) == {}
    assert ops.explain("layer_norm", X, W).reasons["triton"] == "no self-test was possible: CUDA out of memory"


def test_a_kernel_that_writes_to_its_inputs() -> None:
    right = backend._registry["layer_norm", "triton"].run

    def wrong(x, **rest):
        out = right(x, **rest)
        x.detach().zero_()
        return out

    backend.register("layer_norm", "triton", wrong)
    with pytest.warns(UserWarning, match="x: the kernel has written to it"):
        assert backend_of("layer_norm", X.clone(), W) == "torch"


# ---- where it is left out, and what it leaves alone ----


def test_a_backend_that_the_call_asks_for_by_name_runs_without(make_wrong, tested) -> None:
    make_wrong("forward")
    with silence():
        norm(backend="triton")
    assert tested == []


def test_a_preferred_backend_has_to_pass_it(make_wrong, tested) -> None:
    make_wrong("forward")
    with backend.use_backend("triton"), pytest.warns(UserWarning, match="SELF-TEST FAILED"):
        assert backend_of("layer_norm", X, W) == "torch"
    assert tested == ["layer_norm"]


def test_the_environment_leaves_it_out(monkeypatch, make_wrong, tested) -> None:
    make_wrong("forward")
    monkeypatch.setattr(self_test, "_setting", "0")
    with silence():
        assert backend_of("layer_norm", X, W) == "triton"
    assert tested == [] and "  self-tests: left out, by FASTGPT_SELF_TEST=0" in doctor.report().splitlines()


@pytest.mark.parametrize("value", ["2", "yes", " 1"])
def test_another_value_is_an_error(monkeypatch, value) -> None:
    monkeypatch.setattr(self_test, "_setting", value)
    for call in (norm, doctor.report):
        with pytest.raises(ValueError, match=f"FASTGPT_SELF_TEST: expected 0 or 1, got '{value}'"):
            call()


def test_another_value_is_one_line_of_the_command() -> None:
    command = [sys.executable, "-m", "fastgpt", "doctor"]
    environment = {**os.environ, "FASTGPT_SELF_TEST": "yes"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 1
    assert done.stderr == "fastgpt doctor: FASTGPT_SELF_TEST: expected 0 or 1, got 'yes'\n"


def test_an_empty_call_is_not_tested(tested) -> None:
    assert norm(X[:0]).shape == (0, 48)
    assert tested == []


def test_the_callers_random_numbers_do_not_move(tested) -> None:
    before = torch.get_rng_state()
    norm()
    assert tested == ["layer_norm"] and torch.equal(torch.get_rng_state(), before)


def test_while_a_graph_is_captured_pytorch_serves(monkeypatch, tested) -> None:
    monkeypatch.setattr(self_test, "is_capturing", lambda device: True)
    with pytest.warns(UserWarning, match="no self-test yet, and a CUDA graph is being captured"):
        norm()
    assert tested == []
    monkeypatch.setattr(self_test, "is_capturing", lambda device: False)
    assert backend_of("layer_norm", X, WEIGHT) == "triton" and tested == ["layer_norm"]
    monkeypatch.setattr(self_test, "is_capturing", lambda device: True)
    assert backend_of("layer_norm", X[:2], WEIGHT) == "triton" and tested == ["layer_norm"]  # of the same variant


# ---- modes of the caller ----


def test_the_self_test_knows_no_mode_of_the_caller(monkeypatch, tested) -> None:
    seen = []
    measure = self_test.measure

    def look(*args):
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        return measure(*args)

    monkeypatch.setattr(self_test, "measure", look)
    with torch.no_grad():
        norm()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        norm()
    with torch.device("meta"):
        norm(X, weight=W)
    assert seen and set(seen) == {(True, False, False)}
    assert all(outcome.passed for outcome in self_test.known_outcomes(CPU).values())


def test_within_a_backward_pass(tested) -> None:
    """As activation checkpointing calls an op: autograd's own thread must not wait for another one."""

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(norm(x, W), x, grad)

    x = X.clone().requires_grad_()
    (Recompute.apply(x) * X.cos()).sum().backward()
    assert tested == ["layer_norm"] and backend_of("layer_norm", x, W) == "triton"
    (expected,) = torch.autograd.grad((norm(x, W, backend="torch") * X.cos()).sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_transforms_get_pytorch_and_no_test(tested) -> None:
    with pytest.warns(UserWarning, match="torch.func"):
        torch.func.vmap(lambda x: norm(x, W))(X)
        torch.func.grad(lambda x: norm(x, W).sum())(X)
    assert tested == []


@pytest.mark.parametrize("how", [None, "forward"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(how, dynamic, make_wrong, tested) -> None:
    """The choice is made while the call is traced, in one graph, for all sizes of it."""
    if how:
        make_wrong(how)
    seen: list[str] = []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(lambda x: ops.layer_norm(x, W), fullgraph=True, dynamic=dynamic, backend=look)
    with pytest.warns(UserWarning, match="SELF-TEST FAILED") if how else silence():
        y = compiled(X)
    assert any("layer_norm_triton" in name for name in seen) == (how is None)
    assert torch.allclose(y, ops.layer_norm(X, W, backend="torch"), atol=1e-5)
    n_graphs = len(seen)
    compiled(X[:2]) if dynamic else compiled(X)
    assert len(seen) == n_graphs and tested == ["layer_norm"]


def test_compiled_attention_of_any_length_is_tested_in_each_kernel(tested) -> None:
    q = torch.zeros(1, 2, 9, 16, dtype=torch.bfloat16)
    compiled = torch.compile(lambda q: ops.attention(q, q, q), fullgraph=True, backend="eager")
    torch._dynamo.mark_dynamic(q, 2)
    compiled(q)
    names = " ".join(self_test.known_outcomes(CPU))
    assert len(tested) == 3 and "one tile" in names and "forward: tiles" in names and "descriptors" in names


def test_under_autocast_the_self_test_is_of_the_dtype_that_runs(tested) -> None:
    qkv = X.view(1, 3, 48).clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), silence():
        assert self_attention(qkv, 1).dtype == torch.bfloat16
    (name,) = self_test.known_outcomes(CPU)
    assert name.startswith("attention, triton: bfloat16") and tested == ["attention"]


def test_traced_with_fake_tensors_and_symbols(tested) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    for mode in ("fake", "symbolic"):
        graph = make_fx(lambda x, w: ops.layer_norm(x, w), tracing_mode=mode)(X, W)
        assert "layer_norm_triton" in graph.code
        q = torch.zeros(1, 2, 9, 16, dtype=torch.bfloat16)
        assert "attention_triton" in make_fx(lambda q: ops.attention(q, q, q), tracing_mode=mode)(q).code
    assert set(tested) == {"layer_norm", "attention"}


# ---- what is kept ----

SECOND = """
import torch
from fastgpt import ops
from fastgpt.ops import backend, self_test
self_test.SELF_TESTED.add("cpu")
backend.PREFERENCE["layer_norm"]["cpu"] = ("triton", "torch")
measure = self_test.measure
self_test.measure = lambda *args: print("tested") or measure(*args)
print(ops.explain("layer_norm", torch.zeros(3, 48), torch.ones(48)).backend)
"""


def in_a_second_process(**environment: str) -> list[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", **environment}
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.split() + (["warned"] if "SELF-TEST FAILED" in done.stderr else [])


def kept_file() -> Path:
    (file,) = (Path(os.environ["FASTGPT_CACHE"]) / "self-tests").iterdir()
    return file


def test_a_second_process_reads_it() -> None:
    assert backend_of("layer_norm", X, W) == "triton"
    assert in_a_second_process() == ["triton"]
    assert in_a_second_process(FASTGPT_CACHE=os.environ["FASTGPT_CACHE"] + "2") == ["tested", "triton"]


def test_a_failure_is_kept_too(make_wrong) -> None:
    make_wrong("forward")
    with pytest.warns(UserWarning, match="SELF-TEST FAILED"):
        assert backend_of("layer_norm", X, W) == "torch"
    assert in_a_second_process() == ["torch", "warned"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"machine": 1, "outcomes": {}}', "\0\xff", None], ids=lambda c: repr(c)[:12]
)
def test_a_damaged_file_is_as_none(content, tested) -> None:
    backend_of("layer_norm", X, W)
    file = kept_file()
    whole = file.read_text(encoding="utf-8")
    text = json.dumps({"machine": kept_outcomes.machine(CPU), "outcomes": {"a": {}}}) if content is None else content
    file.write_text(text, encoding="utf-8")
    self_test._outcomes.clear()
    backend._verdicts.clear()
    with silence():
        assert backend_of("layer_norm", X, W) == "triton"
    assert tested == ["layer_norm"] * 2 and file.read_text(encoding="utf-8") == whole


@pytest.mark.parametrize("what", ["torch", "triton", "driver", "device", "kernels", "fastgpt"])
def test_another_version_is_tested_again(what, monkeypatch, tested) -> None:
    backend_of("layer_norm", X, W)
    other = kept_outcomes.machine(CPU) | {what: "another"}
    monkeypatch.setattr(kept_outcomes, "machine", lambda device: other)
    self_test._outcomes.clear()
    backend._verdicts.clear()
    assert backend_of("layer_norm", X, W) == "triton" and tested == ["layer_norm"] * 2


def test_a_file_that_claims_another_machine_is_not_believed(monkeypatch) -> None:
    backend_of("layer_norm", X, W)
    other = kept_outcomes.machine(CPU) | {"driver": "another"}
    kept_outcomes._path(other).write_text(kept_file().read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(kept_outcomes, "machine", lambda device: other)
    assert kept_outcomes.read(CPU) == {}


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path, tested) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="outcomes of self-tests are not kept") as caught:
        assert backend_of("layer_norm", X, W) == "triton"
        assert backend_of("layer_norm", X, WEIGHT) == "triton"
    assert len(caught) == 1 and tested == ["layer_norm"] * 2


# ---- the doctor ----


def test_the_doctor_lists_them(monkeypatch, make_wrong) -> None:
    make_wrong("dropout")
    small = LinearCrossEntropy(torch.bfloat16, 65, False, "mean", False, (True, True, False))
    monkeypatch.setattr(backend, "typical_calls", lambda op: [small] if op == "linear_cross_entropy" else [])
    with pytest.warns(UserWarning):
        ops.add_layer_norm(X, X, W, dropout_p=0.1)
    lines = doctor.report().splitlines()
    assert any(line.startswith("  self-test FAILED: add_layer_norm, triton: float32, ") for line in lines)
    assert any(line.startswith("  self-test passed: layer_norm, triton: float32, ") for line in lines)  # its example
    if backend.unavailable("native", "cpu"):
        return
    never = "  self-test never tried: linear_cross_entropy, native: bfloat16, 65 classes, reduction mean"
    assert any(line.startswith(never) for line in lines)
    lines = doctor.report(run_self_tests=True).splitlines()
    assert not any("never tried" in line for line in lines)


def test_the_doctor_lists_one_gradient_of_qkv_and_tries_it(monkeypatch, tested) -> None:
    def lines() -> list[str]:
        return [
            line for line in doctor.report().splitlines() if line.startswith("  self-test") and "one tensor" in line
        ]

    never = lines()
    assert len(never) == 6 and all(line.startswith("  self-test never tried: attention, triton: ") for line in never)
    (common, *_) = typical_calls("attention")
    short = common._replace(Tq=20, Tk=20, D=16)
    monkeypatch.setattr(backend, "typical_calls", lambda op: [short] if op == "attention" else [])
    backend.self_test_typical_variants(CPU)
    assert tested.count("attention") == 1
    assert [line for line in lines() if line.startswith("  self-test passed: attention, triton: bfloat16, heads of 16")]
