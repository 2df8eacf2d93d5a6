"""The Triton attention against the float64 oracle: forward and backward, every branch of the kernels.

Without a GPU the kernels run on Triton's interpreter (see conftest.py).
"""

import math

import pytest
import torch

from fastgpt import BackendError, ops, use_backend
from fastgpt.ops import reference
from triton_checks import DEVICE, check_against_oracle, outputs_and_gradients

kernels = pytest.importorskip("fastgpt.triton_kernels.attention")
tuned = pytest.importorskip("fastgpt.triton_kernels.tuned")
decode, persistent_programs = kernels._decode, kernels.persistent_programs

# name: (B, H, Hkv, Tq, Tk, D, causal, dropout, dtype)
CASES = {
    "one token, dropout": (1, 2, 2, 1, 1, 16, True, 0.5, torch.float32),
    "odd length, odd head size": (1, 2, 2, 37, 37, 5, True, 0.0, torch.float32),
    "head size 80, grouped heads": (2, 4, 2, 19, 19, 80, True, 0.0, torch.float32),
    "full, whole tiles and a rest": (1, 1, 1, 33, 47, 32, False, 0.0, torch.float32),
    "fewer queries than keys": (1, 2, 1, 11, 70, 16, True, 0.0, torch.float32),
    "more queries than keys: blind rows": (1, 2, 2, 50, 21, 16, True, 0.0, torch.float32),
    "dropout": (1, 2, 1, 23, 40, 16, True, 0.25, torch.float32),
    "dropout, full": (1, 2, 2, 40, 23, 16, False, 0.6, torch.float32),
    "head size 128 in float32": (1, 1, 1, 20, 20, 128, True, 0.0, torch.float32),
    "float32, head size 136, grouped heads, blind rows": (1, 4, 2, 35, 20, 136, True, 0.0, torch.float32),
    "float32, head size 160, full, dropout": (2, 2, 1, 18, 40, 160, False, 0.3, torch.float32),
    "float32, head size 192, fewer queries, dropout": (1, 2, 2, 17, 33, 192, True, 0.2, torch.float32),
    "float32, head size 256": (1, 2, 1, 33, 50, 256, True, 0.0, torch.float32),
    "one tile backward": (1, 4, 2, 30, 50, 64, True, 0.0, torch.float16),
    "one tile backward, dropout, blind rows": (2, 2, 1, 29, 13, 20, True, 0.3, torch.bfloat16),
    "one tile backward, tiny, full": (1, 2, 2, 9, 14, 16, False, 0.1, torch.float16),
    # The interpreter counts as two multiprocessors: 12 programs with tiles of 16 rows, else 6. Some take a second head.
    "one tile, more heads than programs": (3, 6, 3, 13, 13, 24, True, 0.0, torch.float16),
    "one tile of 32, more heads than programs": (2, 4, 4, 20, 25, 128, True, 0.2, torch.bfloat16),
    "one tile of 64, more heads than programs": (1, 10, 10, 60, 45, 32, False, 0.0, torch.bfloat16),
    "short, several tiles": (1, 2, 1, 150, 150, 64, True, 0.0, torch.bfloat16),
    "short, several tiles, dropout": (1, 1, 1, 140, 100, 40, True, 0.2, torch.float16),
    "short, head size 256": (1, 1, 1, 40, 70, 256, True, 0.0, torch.bfloat16),
    "tiny forward, wide head": (1, 1, 1, 20, 20, 200, False, 0.0, torch.float16),
    "long, descriptors": (1, 2, 1, 300, 300, 64, True, 0.0, torch.bfloat16),
    "long, descriptors, dropout, blind rows": (1, 1, 1, 290, 270, 32, True, 0.2, torch.float16),
    "long, descriptors, head size 80, full": (1, 1, 1, 70, 300, 80, False, 0.0, torch.float16),
    "long, descriptors, grouped heads of 128": (1, 2, 1, 140, 260, 128, True, 0.0, torch.float16),
    # On the interpreter, 4 programs go over 19 pairs of tiles; with dropout, 2 programs go over 4 pairs.
    "long, persistent": (19, 1, 1, 140, 270, 16, True, 0.0, torch.float16),
    "long, persistent, full, dropout": (2, 1, 1, 500, 280, 16, False, 0.3, torch.bfloat16),
    "long, odd head size: no descriptors": (1, 1, 1, 260, 260, 20, True, 0.0, torch.bfloat16),
}
# Decoding: 1 to 8 queries against a cache, split over keys. With 4 key heads or more, or few keys, there is one split.
CASES |= {
    "decode one token": (1, 2, 2, 1, 1, 16, True, 0.0, torch.float32),
    "decode one split, grouped heads": (2, 6, 3, 1, 150, 20, True, 0.0, torch.float16),
    "decode one split, many heads, half": (3, 4, 2, 5, 140, 64, True, 0.0, torch.bfloat16),
    "decode one split, full": (2, 2, 2, 8, 131, 33, False, 0.0, torch.float32),
    "decode one split, blind rows": (1, 2, 1, 8, 5, 16, True, 0.0, torch.float32),
    "decode one split, head size 256": (4, 1, 1, 2, 40, 256, True, 0.0, torch.bfloat16),
    "decode one query": (1, 4, 1, 1, 150, 32, True, 0.0, torch.float32),
    "decode one query, half": (2, 2, 1, 1, 290, 64, True, 0.0, torch.bfloat16),
    "decode three queries, grouped": (1, 6, 2, 3, 270, 80, True, 0.0, torch.float16),
    "decode eight queries, full": (1, 2, 2, 8, 140, 16, False, 0.0, torch.float32),
    "decode float32, head size 192, grouped": (2, 4, 1, 2, 150, 192, True, 0.0, torch.float32),
    "decode float32, head size 256": (1, 2, 2, 1, 140, 256, False, 0.0, torch.float32),
    "float32, more rows of a key head than one tile takes": (1, 9, 1, 4, 140, 16, True, 0.0, torch.float32),
    "decode with dropout: not split": (1, 2, 2, 2, 140, 16, True, 0.3, torch.float32),
}


def heads(B, H, T, D, dtype, layout="bhtd"):
    """Random heads (B, H, T, D): contiguous, as a view of (B, T, H, D), or with strides in no order at all."""
    if layout == "bhtd":
        return torch.randn(B, H, T, D, dtype=dtype, device=DEVICE)
    if layout == "bthd":
        return torch.randn(B, T, H, D, dtype=dtype, device=DEVICE).transpose(1, 2)
    return torch.randn(D, T, B, H, dtype=dtype, device=DEVICE).permute(2, 3, 1, 0)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name, monkeypatch):
    decoded, persistent = [], []  # into how many splits, and by how many programs
    monkeypatch.setattr(kernels, "_decode", lambda *args: (decoded.append(args[5]), decode(*args)))
    spy = lambda *args: persistent.append(persistent_programs(*args)) or persistent[-1]  # noqa: E731
    monkeypatch.setattr(kernels, "persistent_programs", spy)
    B, H, Hkv, Tq, Tk, D, causal, dropout_p, dtype = CASES[name]
    torch.manual_seed(len(name))
    layout = "bthd" if len(name) % 2 else "bhtd"
    inputs = [heads(B, H, Tq, D, dtype, layout), *(heads(B, Hkv, Tk, D, dtype, layout) for _ in "kv")]
    seed = -(2**40) - 12345 if dropout_p else None
    options = {"is_causal": causal, "dropout_p": dropout_p, "seed": seed}
    with tuned.use(tuned.Table()):  # without the entries that were measured on a GPU of 132 multiprocessors
        check_against_oracle("attention", inputs, [heads(B, H, Tq, D, dtype)], dtype, **options)
    assert bool(decoded) == (name.startswith("decode") and dropout_p == 0.0)
    if DEVICE == "cpu":
        assert not decoded or (set(decoded) == {1}) == (
            name.startswith("decode one split") or name == "decode one token"
        )
        assert any(persistent) == ("persistent" in name)


def test_programs_are_persistent_where_pairs_of_tiles_share_out_evenly():
    assert persistent_programs(192, 8, 2, 132) == 264  # 768 pairs: 2.91 for each
    assert persistent_programs(16, 64, 1, 132) == 132
    assert persistent_programs(192, 9, 2, 132) is None  # a tile without its pair
    assert persistent_programs(100, 8, 2, 132) is None  # 400 pairs: half of the programs would wait
    assert persistent_programs(192, 8, 0, 132) is None  # a table says so
    assert persistent_programs(12, 8, 2, 132) is None  # all tiles run at once


@pytest.mark.parametrize(("head_size", "scale"), [(12, 0.7), (144, 0.2)])
def test_strides_in_no_order_and_a_scale(head_size, scale):
    torch.manual_seed(0)
    *inputs, grad_out = [heads(2, 2, 17, head_size, torch.float32, "shuffled") for _ in range(4)]
    check_against_oracle("attention", inputs, [grad_out], torch.float32, scale=scale)


# The launches that the gradients of q, k and v need. The gradient of k needs delta, which the pass for q makes.
LAUNCHES = {
    (True, False, False): ["grad_q"],
    (False, True, False): ["delta", "grad_kv"],
    (False, False, True): ["grad_kv"],
    (True, True, False): ["grad_q", "grad_kv"],
    (True, False, True): ["grad_q", "grad_kv"],
    (False, True, True): ["delta", "grad_kv"],
    (True, True, True): ["grad_q", "grad_kv"],
}


class Spy:
    """Stands for a kernel, and records its launches."""

    def __init__(self, kernel, name, launches):
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append("delta" if options.get("GRAD_Q") is False and self.name == "grad_q" else self.name)
            return self.kernel[grid](*args, **options)

        return launch


@pytest.mark.parametrize(("dtype", "dropout_p"), [(torch.float32, 0.0), (torch.float32, 0.3), (torch.float16, 0.2)])
@pytest.mark.parametrize(
    "needs", LAUNCHES, ids=lambda needs: "".join(n for n, x in zip("qkv", needs, strict=True) if x)
)
def test_only_the_gradients_asked_for_are_computed(needs, dtype, dropout_p, monkeypatch):
    """Each gradient has the bits that all three together give: in float32 by two passes, in float16 by one."""
    torch.manual_seed(0)
    inputs = [heads(1, 4, 13, 24, dtype), heads(1, 2, 19, 24, dtype), heads(1, 2, 19, 24, dtype)]
    grad_out, options = heads(1, 4, 13, 24, dtype), {"dropout_p": dropout_p, "seed": 5, "backend": "triton"}
    wanted = outputs_and_gradients(ops.attention, inputs, [grad_out], **options)[1:]
    launches, made = [], []
    for name in ("grad_q", "grad_kv", "one_tile_backward"):
        monkeypatch.setattr(kernels, f"{name}_kernel", Spy(getattr(kernels, f"{name}_kernel"), name, launches))
    backward = kernels.backward
    monkeypatch.setattr(kernels, "backward", lambda *args: made.append(backward(*args)) or made[-1])
    for x, need in zip(inputs, needs, strict=True):
        x.requires_grad_(need)
    ops.attention(*inputs, **options).backward(grad_out)
    assert launches == (["one_tile_backward"] if dtype == torch.float16 else LAUNCHES[needs])
    for x, need, grad, made_grad in zip(inputs, needs, wanted, made[0], strict=True):
        assert torch.equal(x.grad, grad) if need else x.grad is None
        assert made_grad.shape == (x.shape if need else (0,))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True)], ids=["q", "kv"])
def test_only_the_gradients_asked_for_under_compile(needs):
    inputs = [heads(1, 2, 9, 8, torch.float32).requires_grad_(need) for need in needs]
    asked = [x for x in inputs if x.requires_grad]
    loss = lambda *inputs: ops.attention(*inputs, backend="triton").square().sum()  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), asked), torch.autograd.grad(loss(*inputs), asked))


def test_gradient_of_a_sum_has_stride_zero():
    q, k, v = (heads(1, 2, 9, 8, torch.float32).requires_grad_() for _ in range(3))
    ours = torch.autograd.grad(ops.attention(q, k, v, backend="triton").sum(), (q, k, v))
    torchs = torch.autograd.grad(ops.attention(q, k, v, backend="torch").sum(), (q, k, v))
    torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-5)


def test_expanded_keys_and_values():
    q = heads(2, 2, 9, 8, torch.float32)
    k, v = (heads(1, 1, 9, 8, torch.float32).expand(2, 2, 9, 8) for _ in "kv")
    ours, torchs = (ops.attention(q, k, v, backend=name) for name in ("triton", "torch"))
    torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-5)


def test_dropout_mask_is_the_defined_one_bit_by_bit():
    """With equal scores, and the identity as v, the output is the mask itself, scaled."""
    B, H, T, p, seed = 2, 3, 16, 0.4, 2**62 + 7
    q = torch.zeros(B, H, T, T, device=DEVICE)
    v = torch.eye(T, device=DEVICE).expand(B, H, T, T)
    out = ops.attention(q, q, v, is_causal=False, dropout_p=p, seed=seed, backend="triton")
    keep = reference.philox_keep_mask(seed, p, B * H * T, T, q.device).view(B, H, T, T)
    assert torch.equal(out > 0, keep)
    torch.testing.assert_close(out[keep], torch.full_like(out[keep], 1 / T / (1 - p)))


def test_same_seed_same_bits_and_no_seed_draws_from_torch():
    q = heads(1, 2, 40, 16, torch.float32)
    run = lambda seed: ops.attention(q, q, q, dropout_p=0.5, seed=seed, backend="triton")  # noqa: E731
    assert torch.equal(run(3), run(3)) and torch.equal(run(3), run(torch.tensor(3, device=DEVICE)))
    assert not torch.equal(run(3), run(4))
    torch.manual_seed(1)
    first, second = run(None), run(None)
    torch.manual_seed(1)
    assert torch.equal(first, run(None)) and not torch.equal(first, second)


def test_backward_is_deterministic():
    torch.manual_seed(0)
    *inputs, grad = [heads(1, 2, 70, 16, torch.float16) for _ in range(4)]
    options = {"dropout_p": 0.2, "seed": 1, "backend": "triton"}
    first, second = (outputs_and_gradients(ops.attention, inputs, [grad], **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0), (2, 0, 3, 3)], ids=str)
def test_empty_inputs_launch_nothing(shape, monkeypatch):
    passes = ("forward", "one_tile_forward", "grad_q", "grad_kv", "one_tile_backward", "decode")
    for name in (f"{each}_kernel" for each in passes):
        monkeypatch.setattr(kernels, name, None)
    B, H, Tq, Tk = shape
    q, k = torch.randn(B, H, Tq, 8, device=DEVICE), torch.randn(B, H, Tk, 8, device=DEVICE)
    q.requires_grad_(), k.requires_grad_()
    out = ops.attention(q, k, k, backend="triton")
    assert out.shape == q.shape and not out.any()
    grads = torch.autograd.grad(out.sum(), (q, k))
    assert not grads[0].any() and not grads[1].any()


def test_large_scores_do_not_overflow():
    q = heads(1, 1, 40, 16, torch.float32) * 100
    ours, oracle = ops.attention(q, q, q, backend="triton"), reference.attention(*(q.double(),) * 3)
    torch.testing.assert_close(ours.double(), oracle, atol=1e-3, rtol=1e-4)


def test_logsumexp_is_kept_in_float32():
    q, k = heads(1, 2, 7, 16, torch.float16), heads(1, 2, 9, 16, torch.float16)
    _, lse = torch.ops.fastgpt.attention_triton(q, k, k, None, True, 0.25, 0.0, 0)
    scores = (q.double() @ k.double().mT * 0.25).masked_fill(~reference.causal_mask(7, 9, q.device), -math.inf)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double() * math.log(2), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_output_layout_makes_the_models_reshape_free():
    out = ops.attention(*(heads(2, 3, 9, 8, torch.float32),) * 3, backend="triton")
    assert out.transpose(1, 2).is_contiguous()


def test_the_same_tensor_three_times_under_compile():
    def loss(x, backend):
        return ops.attention(x, x, x, backend=backend).square().sum()

    x = heads(1, 2, 9, 8, torch.float32).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(x, "triton"), x)
    torch.testing.assert_close(ours, torch.autograd.grad(loss(x, "torch"), x), atol=1e-4, rtol=1e-4)


def test_inductor_with_dropout():
    def loss(q, k):
        return ops.attention(q, k, k, dropout_p=0.3, seed=5, backend="triton").square().sum()

    q, k = heads(1, 2, 9, 8, torch.float32).requires_grad_(), heads(1, 2, 9, 8, torch.float32)
    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(q, k), q), torch.autograd.grad(loss(q, k), q))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(dropout_p):
    q, k = heads(1, 4, 5, 8, torch.float32), heads(1, 2, 7, 8, torch.float32)
    q.requires_grad_(), k.requires_grad_()
    seed = torch.tensor(3, device=DEVICE)
    arguments = (q, k, k.detach(), seed, True, 0.3, dropout_p, 3)
    torch.library.opcheck(torch.ops.fastgpt.attention_triton.default, arguments)
    q, k = q.detach(), k.detach()
    out, lse = torch.ops.fastgpt.attention_triton(q, k, k, seed, True, 0.3, dropout_p, 3)
    arguments = (torch.randn_like(out), q, k, k, out, lse, seed, True, 0.3, dropout_p, 3)
    for mask in ([True, True, True], [True, False, True], [False, True, False]):
        torch.library.opcheck(torch.ops.fastgpt.attention_triton_backward.default, (*arguments, mask))


def test_double_backward_raises():
    q = heads(1, 1, 4, 8, torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad(ops.attention(q, q, q, backend="triton").square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_autocast_gives_the_torch_ops_dtype():
    q = heads(1, 2, 9, 16, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, torchs = (ops.attention(q, q, q, backend=name) for name in ("triton", "torch"))
    assert ours.dtype == torchs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, torchs, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("q", "options", "reason"),
    [
        (torch.zeros(1, 1, 2, 8, dtype=torch.float64), {}, "float64"),
        (torch.zeros(1, 1, 2, 8), {"scale": -1.0}, "scale must be positive"),
        (torch.zeros(1, 1, 2, 8), {"scale": 1e-40}, "scale must be at least 1.2e-38"),
    ],
)
def test_an_unsupported_call_raises_the_reason(q, options, reason):
    q = q.to(DEVICE)
    with pytest.raises(BackendError, match=reason):
        ops.attention(q, q, q, backend="triton", **options)


@pytest.mark.skipif(DEVICE == "cuda", reason="here the kernels are what a CUDA tensor takes")
def test_on_a_cpu_triton_runs_only_when_named():
    q = heads(1, 1, 4, 8, torch.float32)
    assert ops.explain("attention", q, q, q).backend != "triton"
    with use_backend("triton"):
        assert ops.explain("attention", q, q, q).backend == "triton"
