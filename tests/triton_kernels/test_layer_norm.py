"""The Triton layer norm and add_layer_norm against the float64 oracle: forward and backward, every branch.

Without a GPU the kernels run on Triton's interpreter (see conftest.py).
"""

from itertools import product

import pytest
import torch

from fastgpt import BackendError, ops
from fastgpt.ops.dropout import philox_keep_mask
from triton_checks import DEVICE, check_against_oracle, outputs_and_gradients

kernels = pytest.importorskip("fastgpt.triton_kernels.layer_norm")

# (shape, dtype, bias). The widths need every layout of rows and warps; the numbers of rows, a second turn of the loop.
CASES = [
    ((5, 1), torch.float32, True),
    ((3, 7, 5), torch.float32, False),
    ((1, 64), torch.float16, True),
    ((70, 64), torch.bfloat16, True),
    ((9, 768), torch.bfloat16, False),
    ((13, 1023), torch.float32, True),
    ((40, 1024), torch.float16, True),
    ((11, 3000), torch.float32, True),
    ((3, 4096), torch.float32, False),
    ((34, 5000), torch.float16, True),
    ((2, 16384), torch.bfloat16, True),
]


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def affine(width, dtype, bias):
    return 1 + normal(width, dtype=dtype) / 4, normal(width, dtype=dtype) if bias else None


@pytest.mark.parametrize(("shape", "dtype", "bias"), CASES, ids=str)
def test_layer_norm(shape, dtype, bias):
    torch.manual_seed(shape[-1])
    inputs = (2 * normal(*shape, dtype=dtype) + 1, *affine(shape[-1], dtype, bias))
    check_against_oracle("layer_norm", inputs, [normal(*shape, dtype=dtype)], dtype)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("shape", "dtype", "bias"), CASES, ids=str)
def test_add_layer_norm(shape, dtype, bias, dropout_p):
    torch.manual_seed(shape[-1])
    x, residual = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    inputs = (x, residual, *affine(shape[-1], dtype, bias))
    grads = [normal(*shape, dtype=dtype) for _ in range(2)]
    options = {"dropout_p": dropout_p, "seed": -(2**50) + 1 if dropout_p else None}
    check_against_oracle("add_layer_norm", inputs, grads, dtype, **options)


def test_a_large_mean_cancels_nothing():
    x = normal(4, 256) + 1000
    inputs = (x, *affine(256, torch.float32, True))
    check_against_oracle("layer_norm", inputs, [normal(4, 256)], torch.float32)


def test_add_layer_norm_in_two_dtypes_as_under_autocast():
    torch.manual_seed(0)
    x, residual = normal(6, 48, dtype=torch.bfloat16), normal(6, 48)
    weight, bias = affine(48, torch.float32, True)
    ours, torchs = (
        outputs_and_gradients(ops.add_layer_norm, (x, residual, weight, bias), [normal(6, 48)] * 2, backend=name)
        for name in ("triton", "torch")
    )
    assert [y.dtype for y in ours] == [y.dtype for y in torchs]
    assert [y.dtype for y in ours[:3]] == [torch.float32, torch.float32, torch.bfloat16]


def test_strides_are_honoured():
    torch.manual_seed(0)
    weight, bias = affine(24, torch.float32, True)
    transposed, wide = normal(24, 5, 3).permute(2, 1, 0), normal(15, 40)[:, 8:32].unflatten(0, (3, 5))
    for x in (transposed, wide, normal(1, 24).expand(3, 5, 24)):
        ours, torchs = (
            outputs_and_gradients(ops.add_layer_norm, (x, wide, weight, bias), [transposed, wide], backend=name)
            for name in ("triton", "torch")
        )
        torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-5)


def test_gradient_of_a_sum_and_of_one_output_only():
    torch.manual_seed(0)
    x, residual, weight = normal(9, 20).requires_grad_(), normal(9, 20).requires_grad_(), normal(20).requires_grad_()
    for used in ([0], [1], [0, 1]):
        results = []
        for name in ("triton", "torch"):
            outputs = ops.add_layer_norm(x, residual, weight, dropout_p=0.2, seed=3, backend=name)
            total = sum(outputs[i].sum() for i in used)
            results.append(torch.autograd.grad(total, (x, residual, weight), allow_unused=True, materialize_grads=True))
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_dropout_mask_is_the_defined_one_bit_by_bit():
    x, residual, p, seed = torch.ones(5, 2, 300, device=DEVICE), torch.zeros(5, 2, 300, device=DEVICE), 0.4, 2**62 + 7
    _, h = ops.add_layer_norm(x, residual, x[0, 0], dropout_p=p, seed=seed, backend="triton")
    keep = philox_keep_mask(seed, p, 10, 300, x.device).view_as(x)
    assert torch.equal(h, keep / torch.tensor(1 - p))


def test_same_bits_every_time():
    torch.manual_seed(0)
    inputs, grads = (normal(70, 96), normal(70, 96), normal(96), normal(96)), [normal(70, 96)] * 2
    options = {"dropout_p": 0.2, "seed": 1, "backend": "triton"}
    first, second = (outputs_and_gradients(ops.add_layer_norm, inputs, grads, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)], ids=str)
def test_empty_inputs_launch_nothing(shape, monkeypatch):
    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(kernels, name, None)
    x, weight = normal(*shape).requires_grad_(), normal(8).requires_grad_()
    y, h = ops.add_layer_norm(x, x, weight, weight, dropout_p=0.1, backend="triton")
    assert y.shape == h.shape == shape
    grad_x, grad_weight = torch.autograd.grad(y.sum() + h.sum(), (x, weight))
    assert grad_x.shape == shape and not grad_weight.any()


def test_compile_fullgraph():
    def loss(x, residual, weight, backend):
        y, h = ops.add_layer_norm(x, residual, weight, dropout_p=0.3, seed=5, backend=backend)
        return (y * h).sum() + ops.layer_norm(x, weight, backend=backend).square().sum()

    inputs = [normal(7, 24).requires_grad_(), normal(7, 24).requires_grad_(), normal(24).requires_grad_()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(*inputs, "triton"), inputs)
    torch.testing.assert_close(ours, torch.autograd.grad(loss(*inputs, "torch"), inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(dropout_p):
    x, weight, seed = normal(5, 12).requires_grad_(), normal(12).requires_grad_(), torch.tensor(3, device=DEVICE)
    for residual in (None, normal(5, 12).requires_grad_()):
        arguments = (x, residual, weight, weight.detach(), 1e-5, dropout_p if residual is not None else 0.0, seed)
        torch.library.opcheck(torch.ops.fastgpt.layer_norm_triton.default, (*arguments, 3, torch.float32))
    x, weight = x.detach(), weight.detach()
    arguments = (x, x, x, weight, normal(2, 5), dropout_p, seed, 3, torch.float32, torch.float32)
    for mask in ([True] * 4, [True, False, False, True], [False, True, True, False], [False, False, True, True]):
        torch.library.opcheck(torch.ops.fastgpt.layer_norm_triton_backward.default, (*arguments, mask))


class Spy:
    """Stands for a kernel, and records what it is asked to write."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append({name for name, value in options.items() if name.startswith("WRITE") and value})
            return self.kernel[grid](*args, **options)

        return launch


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("width", [24, 4100])
@pytest.mark.parametrize("needs", list(product((True, False), repeat=4))[:-1], ids=str)
def test_only_the_gradients_asked_for_are_computed(needs, width, dropout_p, monkeypatch):
    """The gradients of x, residual, weight and bias are those that all four give: bit by bit on the interpreter.

    A compiler spreads a row over the threads differently where it is read for fewer gradients, and so adds in another
    order.
    """
    torch.manual_seed(0)
    inputs, grads = [normal(9, width), normal(9, width), normal(width), normal(width)], [normal(9, width)] * 2
    options = {"dropout_p": dropout_p, "seed": 3, "backend": "triton"}
    every = [x.clone().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(ops.add_layer_norm(*every, **options), every, grads)
    launches, made = [], []
    for name in ("backward_kernel", "wide_backward_kernel", "affine_grad_kernel"):
        monkeypatch.setattr(kernels, name, Spy(getattr(kernels, name), launches))
    backward = kernels.backward
    monkeypatch.setattr(kernels, "backward", lambda *args: made.append(backward(*args)) or made[-1])
    for x, need in zip(inputs, needs, strict=True):
        x.requires_grad_(need)
    torch.autograd.backward(ops.add_layer_norm(*inputs, **options), grads)
    for x, need, grad in zip(inputs, needs, wanted, strict=True):
        if not need:
            assert x.grad is None
        elif DEVICE == "cpu":
            assert torch.equal(x.grad, grad)
        else:
            torch.testing.assert_close(x.grad, grad)

    needs_x, needs_residual, needs_weight, needs_bias = needs
    shared = dropout_p == 0.0  # x and residual have one gradient then
    written = {
        "WRITE_GRAD_RESIDUAL": needs_residual or (shared and needs_x),
        "WRITE_GRAD_X": needs_x and not shared,
        "WRITE_GRAD_WEIGHT": needs_weight,
        "WRITE_GRAD_BIAS": needs_bias,
    }
    assert set().union(*launches) == {name for name, value in written.items() if value}
    assert len(launches) == (1 if width == 24 else (needs_x or needs_residual) + (needs_weight or needs_bias))
    grad_residual, grad_x, grad_affine = made[0]
    assert bool(grad_residual.numel()) == written["WRITE_GRAD_RESIDUAL"]
    assert bool(grad_x.numel()) == written["WRITE_GRAD_X"] and grad_affine.shape == (needs_weight + needs_bias, width)


def test_only_the_gradients_asked_for_under_compile():
    loss = lambda *inputs: ops.layer_norm(*inputs, backend="triton").square().sum()  # noqa: E731
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        inputs = [x.requires_grad_(need) for x, need in zip((normal(5, 8), normal(8), normal(8)), needs, strict=True)]
        asked = [x for x in inputs if x.requires_grad]
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        ours, expected = (torch.autograd.grad(f(*inputs), asked) for f in (compiled, loss))
        torch.testing.assert_close(ours, expected)


def test_double_backward_raises():
    x = normal(3, 8).requires_grad_()
    (grad,) = torch.autograd.grad(ops.layer_norm(x, x[0], backend="triton").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_torch_ops_dtype(dtype):
    x, weight = normal(3, 8, dtype=dtype), normal(8)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, torchs = (ops.layer_norm(x, weight, backend=name) for name in ("triton", "torch"))
        ours_add, torchs_add = (ops.add_layer_norm(x, normal(3, 8), weight, backend=b) for b in ("triton", "torch"))
    assert ours.dtype == torchs.dtype
    assert [y.dtype for y in ours_add] == [y.dtype for y in torchs_add]


def test_an_unsupported_call_raises_the_reason():
    x = normal(2, 8, dtype=torch.float64)
    with pytest.raises(BackendError, match="float64"):
        ops.layer_norm(x, x[0], backend="triton")
    with pytest.raises(BackendError, match="float64"):
        ops.add_layer_norm(x.float(), x, x[0], backend="triton")
    x = normal(1, 16385)
    with pytest.raises(BackendError, match="width 16385 is above 16384"):
        ops.layer_norm(x, x[0], backend="triton")
