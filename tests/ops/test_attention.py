"""ops.attention: parity with the oracle, exact dropout, every layout and size, and errors that name the argument."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import ops
from fastgpt.ops import backend, reference
from fastgpt.ops.attention import self_attention, split_heads
from fastgpt.ops.dropout import philox_keep_mask
from fastgpt.parity import DTYPES, run_parity
from strict_backend import only_on

DROPOUT = {"dropout_p": 0.3, "seed": 9}


def heads(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(B=2, H=2, Hkv=2, Tq=5, Tk=5, D=8, dtype=torch.float32) -> list[torch.Tensor]:
    shapes = (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, D)
    return [heads(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.fixture(params=["torch", "native"])
def named(request):
    """Each backend that computes attention on CPUs, for every call in the test."""
    if reason := backend.unavailable(request.param, "cpu"):
        pytest.skip(reason)
    with only_on(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(dtype: torch.dtype, named: str) -> None:
    if named == "native" and dtype == torch.float64:
        pytest.skip("float64 stays on torch")
    report = run_parity(names=["attention"], backends=[named], dtypes=[dtype])
    assert report.rows and not report.failures and not report.skips, str(report)


@st.composite
def calls(draw) -> tuple[list[torch.Tensor], dict]:
    """q, k, v of any small shape, as any view of their storage, with any options."""
    B, Hkv, group, Tq, Tk, D = (
        draw(st.integers(low, high)) for low, high in ((1, 2), (1, 2), (1, 3), (0, 6), (0, 6), (1, 5))
    )
    tensors = []
    for H, T in ((Hkv * group, Tq), (Hkv, Tk), (Hkv, Tk)):
        order = draw(st.permutations(range(4)))
        shape = (B, H, T, D)
        step = draw(st.integers(1, 2))
        stored = heads(*(step * shape[i] for i in order), dtype=torch.float64, seed=draw(st.integers(0, 99)))
        x = stored[tuple(slice(None, None, step) for _ in shape)].permute([order.index(i) for i in range(4)])
        tensors.append(x[:1].expand(B, -1, -1, -1) if draw(st.booleans()) else x)
    options = {"is_causal": draw(st.booleans()), "scale": draw(st.sampled_from([None, 0.0, -0.5, 2.0]))}
    return tensors, options | draw(st.sampled_from([{}, DROPOUT]))


@settings(max_examples=40, deadline=None)
@given(calls(), st.sampled_from(["torch", "native"]))
def test_any_shape_and_stride(call, name: str) -> None:
    tensors, options = call
    if backend.unavailable(name, "cpu"):
        return
    dtype, rtol, atol = (torch.float64, 1e-10, 1e-12) if name == "torch" else (torch.float32, 1e-4, 1e-4)
    results = []
    for op in (lambda *args, **options: ops.attention(*args, backend=name, **options), reference.attention):
        leaves = [t.detach().to(dtype if not results else torch.float64).requires_grad_() for t in tensors]
        out = op(*leaves, **options)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        results.append([out, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=atol)


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("options", [{}, {"is_causal": False}, DROPOUT, {"dropout_p": 0.3}], ids=str)
@pytest.mark.parametrize("shape", [{"B": 0}, {"H": 0, "Hkv": 0}, {"Tq": 0}, {"Tk": 0}, {"Tq": 0, "Tk": 0}], ids=str)
def test_empty(shape: dict, options: dict) -> None:
    q, k, v = qkv(**shape)
    out = ops.attention(q, k, v, **options)
    assert torch.equal(out, torch.zeros_like(q))
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("options", [{}, DROPOUT, {"dropout_p": 0.3}], ids=str)
def test_queries_that_see_no_key_give_zeros_and_no_gradient(options: dict) -> None:
    q, k, v = qkv(Tq=7, Tk=3)
    out = ops.attention(q, k, v, **options)
    grad_q, grad_k, _ = torch.autograd.grad(out.sum(), (q, k, v))
    assert torch.equal(out[:, :, :4], torch.zeros(2, 2, 4, 8)) and torch.equal(
        grad_q[:, :, :4], torch.zeros(2, 2, 4, 8)
    )
    assert out[:, :, 4:].isfinite().all() and grad_k.isfinite().all()


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=str)
def test_the_future_is_not_seen(options: dict) -> None:
    q, k, v = qkv(Tq=4, Tk=6)
    changed_k, changed_v = k.detach().clone(), v.detach().clone()
    changed_k[:, :, 5], changed_v[:, :, 5] = 1e30, 1e30
    before, after = ops.attention(q, k, v, **options), ops.attention(q, changed_k, changed_v, **options)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 3], after[:, :, 3])


@pytest.mark.usefixtures("named")
def test_dropout_is_the_mask_bit_for_bit() -> None:
    """Equal scores of a power of two of keys, v the identity: the output is mask / T / (1 - p), all exact."""
    B, H, T, p, seed = 2, 3, 8, 0.5, 2**40 + 17
    q, v = torch.zeros(B, H, T, T), torch.eye(T).expand(B, H, T, T)
    out = ops.attention(q, q, v, is_causal=False, dropout_p=p, seed=seed)
    keep = philox_keep_mask(seed, p, B * H * T, T, q.device).view(B, H, T, T)
    assert torch.equal(out, keep.float() / 4)


@pytest.mark.usefixtures("named")
def test_seed() -> None:
    q, k, v = qkv()
    out = ops.attention(q, k, v, dropout_p=0.5, seed=-3)
    assert torch.equal(out, ops.attention(q, k, v, dropout_p=0.5, seed=torch.tensor(-3)))
    assert not torch.equal(out, ops.attention(q, k, v, dropout_p=0.5, seed=-2))
    torch.manual_seed(0)
    unseeded = ops.attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(unseeded, ops.attention(q, k, v, dropout_p=0.5))  # the generator went on
    torch.manual_seed(0)
    assert torch.equal(unseeded, ops.attention(q, k, v, dropout_p=0.5))


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("options", [{}, {"is_causal": False}, DROPOUT], ids=str)
def test_deterministic_and_leaves_its_inputs_alone(options: dict) -> None:
    q, k, v = qkv(H=4, Tq=33, Tk=33, D=16)
    copies = [x.detach().clone() for x in (q, k, v)]
    runs = []
    for _ in range(2):
        out = ops.attention(q, k, v, **options)
        runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(x, copy) for x, copy in zip((q, k, v), copies, strict=True))


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.7])
@pytest.mark.parametrize("sizes", [(4, 4), (5, 3), (3, 5)], ids=str)
def test_any_finite_scale(scale: float, sizes: tuple[int, int]) -> None:
    """PyTorch's CPU kernel multiplies its mask's -inf by the scale, and gives NaN where that is not positive."""
    Tq, Tk = sizes
    leaves = qkv(H=2, Tq=Tq, Tk=Tk, D=8)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out, expected = ops.attention(*leaves, scale=scale), reference.attention(*exact, scale=scale)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    for found, wanted in zip(gradients, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=str)
def test_large_scores_do_not_overflow_half_precision(options: dict) -> None:
    x = heads(1, 1, 4, 64, dtype=torch.float16) * 100  # q k^T is past 65504, q k^T * scale is not
    out = ops.attention(x, x, x, **options)
    exact = reference.attention(x.double(), x.double(), x.double(), **options)
    torch.testing.assert_close(out.double(), exact, rtol=2**-10, atol=1e-3)


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, options: dict) -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", dtype):
        out = ops.attention(q, k, v, **options)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == dtype
        assert ops.attention(q.double(), k.double(), v.double(), backend="torch", **options).dtype == torch.float64
    out.sum().backward()
    assert q.grad.dtype == torch.float32
    low = [x.to(dtype) for x in (q, k, v)]
    assert torch.equal(out, ops.attention(*low, **options))  # float32 inside, under autocast too


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("options", [{}, DROPOUT, {"is_causal": False}], ids=str)
def test_compile(options: dict) -> None:
    torch._dynamo.reset()
    q, k, v = qkv(H=4, Tq=3, Tk=6)
    compiled = torch.compile(lambda *a: ops.attention(*a, **options), fullgraph=True, backend="aot_eager")
    runs = []
    for op in (compiled, lambda *a: ops.attention(*a, **options)):
        out = op(q, k, v)
        runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for ours, eager in zip(*runs, strict=True):
        torch.testing.assert_close(ours, eager)


def test_transforms() -> None:
    q, k, v = qkv(dtype=torch.float64)
    batch = torch.stack([q.detach(), 2 * q.detach()])
    k, v = k.detach(), v.detach()
    mapped = torch.vmap(lambda x: ops.attention(x, k, v, **DROPOUT))(batch)
    torch.testing.assert_close(mapped[1], ops.attention(batch[1], k, v, **DROPOUT))
    grad = torch.func.grad(lambda x: ops.attention(x, k, v, **DROPOUT).square().sum())(q.detach())
    expected = torch.func.grad(lambda x: reference.attention(x, k, v, **DROPOUT).square().sum())(q.detach())
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("options", [{}, DROPOUT], ids=str)
def test_double_backward_is_right_or_raises(options: dict) -> None:
    results = []
    for op in (reference.attention, ops.attention):
        q, k, v = qkv(dtype=torch.float64)
        (grad,) = torch.autograd.grad(op(q, k, v, **options).square().sum(), q, create_graph=True)
        try:
            results.append(torch.autograd.grad(grad.square().sum(), (q, k, v)))
        except RuntimeError as error:
            assert "derivative" in str(error) and op is ops.attention
            return
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_meta() -> None:
    x = torch.empty(2, 3, 5, 8, device="meta", dtype=torch.bfloat16)
    out = ops.attention(x, x, x, **DROPOUT)
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)


X = torch.randn(1, 2, 3, 8)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": [1]}, TypeError, "q: expected a tensor, got list"),
        ({"q": X.int()}, TypeError, "q: expected float16, bfloat16, float32 or float64, got torch.int32"),
        ({"q": X[0]}, ValueError, "q: expected 4 dimensions"),
        ({"k": X.double()}, TypeError, "k: has dtype torch.float64, but q has torch.float32"),
        ({"v": X.half()}, TypeError, "v: has dtype"),
        ({"k": X.to("meta")}, ValueError, "k: on meta, but q is on cpu"),
        ({"k": X[..., :4]}, ValueError, "k: expected shape"),
        ({"k": X.expand(2, -1, -1, -1)}, ValueError, "k: expected shape"),
        ({"v": X[:, :, :2]}, ValueError, "v: expected the shape of k"),
        ({"q": X[:, :1], "k": X, "v": X}, ValueError, "k: its 2 heads do not divide the 1 heads of q"),
        ({"k": X[:, :0], "v": X[:, :0]}, ValueError, "k: its 0 heads"),
        ({"q": X[..., :0], "k": X[..., :0], "v": X[..., :0]}, ValueError, "q: head size 0"),
        (dict.fromkeys("qkv", torch.zeros(1, 1, 2, 257)), ValueError, "q: head size 257"),
        ({"is_causal": "no"}, TypeError, "is_causal: expected True or False"),
        ({"is_causal": None}, TypeError, "is_causal: expected True or False"),
        ({"scale": math.nan}, ValueError, "scale: "),
        ({"scale": "1"}, TypeError, "scale: expected a number"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: "),
        ({"dropout_p": -0.1}, ValueError, "dropout_p: "),
        ({"dropout_p": math.nan}, ValueError, "dropout_p: "),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p: expected a number"),
        ({"dropout_p": torch.tensor(0.1)}, TypeError, "dropout_p: expected a number"),
        ({"seed": 1.5}, TypeError, "seed: "),
        ({"seed": True}, TypeError, "seed: "),
        ({"seed": 2**63}, ValueError, "seed: expected a 64-bit integer"),
        ({"seed": torch.tensor([1])}, TypeError, "seed: "),
        ({"seed": torch.tensor(1, dtype=torch.int32)}, TypeError, "seed: "),
        ({"backend": "cuda"}, ValueError, "backend: unknown backend 'cuda'"),
        ({"backend": None}, ValueError, "backend: unknown backend None"),
    ],
)
@pytest.mark.parametrize("name", ["auto", "torch", "triton", "native"])
def test_bad_arguments(name: str, change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        ops.attention(**{"q": X, "k": X, "v": X, "backend": name, **change})


NEEDS_NATIVE = pytest.mark.skipif(backend.unavailable("native", "cpu") is not None, reason="the extension is not here")


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("instructions")
def test_self_attention_is_attention_of_its_heads(dtype: torch.dtype) -> None:
    """The gradient of qkv is those of q, k and v side by side, bit for bit; also for two and more blocks of keys."""
    for (B, T, H, D), options in itertools.product([(2, 9, 3, 5), (1, 300, 1, 24)], [{}, {"is_causal": False}]):
        x, grad = heads(B, T, 3 * H * D, dtype=dtype), heads(B, T, H * D, dtype=dtype, seed=1)
        packed, separate = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = self_attention(packed, H, backend="native", **options)
        expected = ops.attention(*split_heads(separate, H), backend="native", **options).transpose(1, 2).flatten(2)
        out.backward(grad)
        expected.backward(grad)
        assert torch.equal(out, expected) and torch.equal(packed.grad, separate.grad)
        with torch.no_grad():
            assert torch.equal(self_attention(x, H, backend="native", **options), expected)


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [None, 3], ids=["no dropout", "dropout"])
def test_opcheck(dtype: torch.dtype, seed: int | None) -> None:
    q, k, v = qkv(H=4, Tq=5, Tk=7, dtype=dtype)
    key = None if seed is None else torch.tensor(seed)
    options = (key, True, 0.3, 0.0 if seed is None else 0.2, 3)
    torch.library.opcheck(torch.ops.fastgpt.attention_native.default, (q, k, v, *options))
    packed = heads(2, 5, 3 * 16, dtype=dtype).requires_grad_()
    torch.library.opcheck(torch.ops.fastgpt.attention_packed_native.default, (packed, 2, *options))


@NEEDS_NATIVE
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_only_gradients_that_are_asked_for(wanted: tuple[bool, bool, bool]) -> None:
    all_of_them, some = qkv(H=4, Tq=40, Tk=70), qkv(H=4, Tq=40, Tk=70)
    for x, want in zip(some, wanted, strict=True):
        x.requires_grad_(want)
    for leaves in (all_of_them, some):
        ops.attention(*leaves, backend="native", **DROPOUT).square().sum().backward()
    for x, expected, want in zip(some, all_of_them, wanted, strict=True):
        assert torch.equal(x.grad, expected.grad) if want else x.grad is None


@NEEDS_NATIVE
def test_derivatives_that_are_not_there_are_refused() -> None:
    q, k, v = qkv()
    (grad,) = torch.autograd.grad(ops.attention(q, k, v, backend="native").square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward-mode derivatives are not"),
    ):
        ops.attention(torch.autograd.forward_ad.make_dual(q.detach(), q.detach()), k, v, backend="native")


@NEEDS_NATIVE
def test_what_the_native_kernels_leave_to_pytorch() -> None:
    x = heads(1, 1, 8, 8)
    chosen = lambda x, **options: backend.choose("attention", "auto", "cpu", (x, x, x), options)  # noqa: E731
    assert "float64" in chosen(x.double())[1]["native"]
    assert "scale must be at most" in chosen(x, scale=1e39)[1]["native"]


@NEEDS_NATIVE
def test_instructions_with_which_it_was_not_measured_to_be_faster(instructions: str) -> None:
    x = heads(1, 1, 8, 8)
    taken, reasons = backend.choose("attention", "auto", "cpu", (x, x, x), {})
    assert taken == ("torch" if instructions == "generic" else "native")
    assert instructions != "generic" or "AVX2" in reasons["native"]
    assert ops.explain("attention", x, x, x, backend="native").backend == "native"


def test_on_cuda_auto_leaves_float32_to_pytorch(monkeypatch) -> None:
    """PyTorch's kernel is the faster one; under autocast the inputs become 16-bit."""
    monkeypatch.setattr(backend, "unavailable", lambda name, device_type: None)
    chosen = lambda x, name="auto": backend.choose("attention", name, "cuda", (x, x, x), {})  # noqa: E731
    x = heads(1, 1, 4, 8)
    assert chosen(x.bfloat16())[0] == chosen(x.half())[0] == chosen(x, "triton")[0] == "triton"
    taken, reasons = chosen(x)
    assert taken == "torch" and "PyTorch's kernel is faster" in reasons["triton"]
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(x)[0] == "triton"
