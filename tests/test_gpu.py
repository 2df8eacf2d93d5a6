"""What only a GPU can show: the kernels as compiled, in every dtype and at real sizes. `pytest -m gpu`."""

import contextlib
from functools import partial

import pytest
import torch

from fastgpt import GPT, GPTConfig, ops
from fastgpt.ops import reference, self_test
from fastgpt.ops.attention import self_attention
from fastgpt.ops.backend import self_test_typical_variants, unavailable
from fastgpt.ops.cross_entropy import cuda_plan, set_cuda_plans
from fastgpt.ops.dropout import dropout, rows_from
from triton_checks import check_against_oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOAT32_ATOL = 5e-6  # above parity's, because sums are longer here

# name: (B, H, Hkv, Tq, Tk, D, causal, dropout)
ATTENTION = {
    "one_token": (1, 1, 1, 1, 1, 16, True, 0.0),
    "blind_rows": (1, 2, 1, 40, 20, 20, True, 0.2),
    "characters": (4, 4, 4, 64, 64, 32, True, 0.0),
    "characters_dropout": (4, 4, 4, 64, 64, 32, True, 0.2),
    "tma_300": (1, 2, 2, 300, 300, 64, True, 0.0),  # the sanitizers run this one and the next
    "decode_300": (1, 2, 1, 1, 300, 64, True, 0.0),
    "short": (2, 6, 6, 256, 256, 64, True, 0.2),
    "gpt2": (2, 12, 12, 1024, 1024, 64, True, 0.0),
    "gpt2_dropout": (1, 12, 12, 1000, 1000, 64, True, 0.1),
    "grouped_128": (1, 8, 2, 777, 777, 128, True, 0.0),
    "heads_of_128": (1, 4, 4, 700, 700, 128, True, 0.0),
    "heads_of_128_dropout": (1, 4, 2, 500, 600, 128, False, 0.3),
    "full": (1, 4, 4, 300, 513, 80, False, 0.0),
    "heads_of_96": (1, 3, 3, 333, 333, 96, True, 0.0),
    "heads_of_256": (1, 2, 2, 300, 300, 256, True, 0.1),
    "odd_head_size": (1, 2, 2, 300, 300, 33, True, 0.0),
    "decode": (2, 8, 2, 1, 3000, 64, True, 0.0),
    "decode_5": (1, 8, 8, 5, 3000, 128, True, 0.0),
}


def check(op, inputs, grads, dtype, **options):
    atol = FLOAT32_ATOL if dtype == torch.float32 else None
    check_against_oracle(op, inputs, grads, dtype, atol, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, dtype):
    B, H, Hkv, Tq, Tk, D, causal, dropout_p = ATTENTION[name]
    torch.manual_seed(0)
    q, grad = torch.randn(2, B, Tq, H, D, dtype=dtype, device="cuda").transpose(2, 3)
    k, v = torch.randn(2, B, Tk, Hkv, D, dtype=dtype, device="cuda").transpose(2, 3)
    check("attention", [q, k, v], [grad], dtype, is_causal=causal, dropout_p=dropout_p, seed=-(2**45) + 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 33, 768, 1023, 4096, 5000, 16384], ids=lambda width: f"width_{width}")
def test_layer_norm(width, dtype):
    torch.manual_seed(0)
    x, residual, grad_y, grad_h = torch.randn(4, 531, width, dtype=dtype, device="cuda")
    weight, bias = torch.randn(2, width, dtype=dtype, device="cuda")
    check("layer_norm", [x, weight, bias], [grad_y], dtype)
    for p in (0.0, 0.25):
        check("add_layer_norm", [x, residual, weight, bias], [grad_y, grad_h], dtype, dropout_p=p, seed=11)


# GPT-2's vocabulary, Llama 3's, Gemma's, and one that no cluster holds in float32; as they are, and of odd length.
LONG_ROWS = [50304, 50257, 128_256, 128_257, 262_144, 262_145, 600_001]


def long_rows(classes, dtype, n=37):
    torch.manual_seed(classes)
    logits = 3 * torch.randn(n, classes, device="cuda").to(dtype)
    targets = torch.randint(classes, (n,), device="cuda")
    targets[3], targets[5], targets[6] = -100, 0, classes - 1
    return logits, targets


def check_cross_entropy(logits, targets, **options):
    """Loss and gradient, value by value: most of a long row's gradient is far below its largest."""
    ours, exact = logits.detach().requires_grad_(), logits.detach().double().requires_grad_()
    loss = ops.cross_entropy(ours, targets, backend="native", **options)
    if options.get("weight") is not None:
        options["weight"] = options["weight"].double()
    expected = reference.cross_entropy(exact, targets, **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device="cuda").view(loss.shape)
    gradient = torch.autograd.grad(loss, ours, upstream.to(loss.dtype))[0]
    expected_gradient = torch.autograd.grad(expected, exact, upstream.to(loss.dtype).double())[0]
    rtol = 1e-4 if logits.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=1e-8)
    return loss, gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", LONG_ROWS, ids=lambda classes: f"classes_{classes}")
def test_cross_entropy_of_long_rows(classes, dtype):
    logits, targets = long_rows(classes, dtype)
    loss, gradient = check_cross_entropy(logits, targets, reduction="sum")
    again = check_cross_entropy(logits, targets, reduction="sum")
    assert torch.equal(loss, again[0]) and torch.equal(gradient, again[1])
    weight = torch.rand(classes, device="cuda").to(dtype)
    check_cross_entropy(logits, targets, weight=weight, label_smoothing=0.1)
    check_cross_entropy(logits, targets, reduction="none")  # its gradient comes from the statistics of the forward pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", LONG_ROWS, ids=lambda classes: f"classes_{classes}")
def test_cross_entropy_of_long_rows_in_place_and_in_views(classes, dtype):
    logits, targets = long_rows(classes, dtype)
    native, one = torch.ops.fastgpt, torch.ones((), device="cuda")
    for options in ((0.1, 0.0, 0.0), (0.1, 1e-3, 5.0)):  # label_smoothing, z_loss, softcap
        call = logits, targets, None, None, -100, 2, *options
        _, gradient, _ = native.cross_entropy_native(*call, True, False)
        _, statistics, _ = native.cross_entropy_native(*call, False, False)
        chunk = logits.clone()
        native.cross_entropy_chunk_(chunk, targets, torch.ones(37, device="cuda"), -100, *options, True, False)
        assert torch.equal(chunk, gradient)
        for known in (statistics, None):
            backward = native.cross_entropy_native_backward(one, *call[:4], known, *call[4:])
            torch.testing.assert_close(backward, gradient, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-9)
    padded = torch.full((37, classes + 9), float("nan"), dtype=dtype, device="cuda")
    for first in (0, 1, 8):  # a gradient that lies like the logits, and one that does not
        padded[:, first : first + classes] = logits
        check_cross_entropy(padded[:, first : first + classes], targets, reduction="sum")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [65, 1000, *LONG_ROWS], ids=lambda classes: f"classes_{classes}")
def test_cross_entropy_options(classes, dtype):
    logits, targets = long_rows(classes, dtype)
    every = {"z_loss": 1e-3, "softcap": 5.0, "token_weight": torch.linspace(0.1, 2.0, 37, device="cuda")}
    weight = torch.rand(classes, device="cuda").to(dtype)
    check_cross_entropy(logits, targets, weight=weight, label_smoothing=0.1, **every)
    every["token_weight"] = torch.linspace(-1.0, 2.0, 37, device="cuda")  # as in reinforcement learning
    check_cross_entropy(logits, targets, reduction="sum", **every)
    check_cross_entropy(logits, targets, reduction="none", **every)
    for name, value in every.items():
        check_cross_entropy(logits, targets, reduction="sum", **{name: value})


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_log_probs"])
def test_options_of_losses_from_the_heads_input(op):
    x, head = torch.randn(301, 64, device="cuda"), torch.randn(5003, 64, device="cuda")
    targets, token_weight = torch.randint(5003, (301,), device="cuda"), torch.linspace(-1.0, 2.0, 301, device="cuda")
    options = {"softcap": 10.0}
    if op == "linear_cross_entropy":
        options |= {"z_loss": 1e-3, "token_weight": token_weight, "return_accuracy": True}
    found = []
    for function, dtype, more in (
        (getattr(ops, op), torch.float32, {"backend": "native"}),
        (getattr(reference, op), torch.float64, {}),
    ):
        inputs = [value.to(dtype).requires_grad_() for value in (x, head)]
        result = function(*inputs, targets, **options, **more)
        loss, *accuracy = result if isinstance(result, tuple) else (result,)
        found.append([loss, *accuracy, *torch.autograd.grad(loss.sum(), inputs)])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [65, 1000, *LONG_ROWS], ids=lambda classes: f"classes_{classes}")
def test_cross_entropy_says_which_targets_are_the_largest(classes, dtype, softcap):
    logits, targets = long_rows(classes, dtype)
    largest = logits.argmax(1)
    targets[10:20] = largest[10:20]
    logits[10, largest[10] :] = logits[10, largest[10]]  # equal ones after the target
    logits[11, : largest[11] + 1] = logits[11, largest[11]]  # and before it
    targets[11], logits[12, -1], logits[13] = largest[11].clamp(min=1), float("nan"), float("-inf")
    options = {"reduction": "none", "softcap": softcap, "return_accuracy": True}
    _, exact = reference.cross_entropy(logits.double(), targets, **options)
    for x in (logits, logits.clone().requires_grad_()):
        _, correct = ops.cross_entropy(x, targets, backend="native", **options)
        assert torch.equal(correct, exact.float())
    assert 7 <= exact.sum() < 15


@pytest.mark.parametrize("classes", LONG_ROWS, ids=lambda classes: f"classes_{classes}")
def test_cross_entropy_of_long_rows_with_infinities(classes):
    logits, targets = long_rows(classes, torch.float32)
    logits[0, : classes * 3 // 4] = -float("inf")  # whole parts of the row, and the target's is another
    logits[1, classes // 4 :] = -float("inf")
    targets[0], targets[1] = classes - 1, 0
    check_cross_entropy(logits, targets, reduction="sum")
    logits[7], logits[8, classes // 2], logits[9, -1] = -float("inf"), float("inf"), float("nan")
    for smoothing in (0.0, 0.1):
        options = {"reduction": "none", "label_smoothing": smoothing}
        ours, torchs = (ops.cross_entropy(logits, targets, backend=b, **options) for b in ("native", "torch"))
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_scaled_from_any_address(dtype):
    for first in range(9):
        for n in (1, 7, 9, 5000):
            values = torch.arange(float(first + n + 3), device="cuda").to(dtype)
            expected = values.clone()
            expected[first : first + n] *= 0.5
            torch.ops.fastgpt.scale_gradient_(values[first : first + n], torch.tensor(0.5, device="cuda"))
            assert torch.equal(values, expected)


PLANS = [(threads, blocks) for threads in (128, 256, 512) for blocks in (0, 1)]
PLANS += [(threads, blocks) for threads in (256, 512) for blocks in (2, 4, 8)]


@pytest.mark.parametrize("plan", [None, *PLANS], ids=str)
def test_cross_entropy_with_each_plan(plan):
    if plan is not None and plan[1] > 1 and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no clusters")
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for classes in (300, 4099, 100_000 // dtype.itemsize):  # fits the 99 KB that a block has on sm_86 and sm_89
                set_cuda_plans("cuda", [] if plan is None else [(dtype.itemsize, 2, classes, *plan)])
                logits, targets = long_rows(classes, dtype)
                assert plan is None or cuda_plan(logits) == plan
                check_cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)
                check_cross_entropy(logits, targets, reduction="sum", softcap=5.0, z_loss=1e-3)
                for options in (
                    (0.0, 0.0, True, False),
                    (1e-3, 5.0, True, True),
                ):  # z_loss, softcap, and what to compute
                    arguments = logits, targets, None, None, -100, 2, 0.0, *options
                    call = partial(torch.ops.fastgpt.cross_entropy_native, *arguments)
                    first = call()
                    for _ in range(20):
                        assert all(map(torch.equal, first, call()))
    finally:
        set_cuda_plans("cuda", [])


@pytest.mark.parametrize("chunk", [8, 32, 64, 128])
def test_embedding_gradient_with_each_chunk(chunk):
    torch.manual_seed(0)
    tokens = torch.randint(300, (20_000,), device="cuda")
    tokens[torch.rand(20_000, device="cuda") < 0.5] = 7
    for dtype, width in ((torch.float32, 768), (torch.bfloat16, 768), (torch.bfloat16, 33)):
        grad = torch.randn(20_000, width, dtype=dtype, device="cuda")
        exact = torch.zeros(300, width, dtype=torch.float64, device="cuda").index_add_(0, tokens, grad.double())
        for keys in (tokens, tokens.int()):
            found, order = torch.sort(keys, stable=True)
            ours = torch.ops.fastgpt.embedding_sum_sorted(grad, found, order, 300, chunk)
            assert torch.equal(ours, torch.ops.fastgpt.embedding_sum_sorted(grad, found, order, 300, chunk))
            torch.testing.assert_close(ours.double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_native_ops_refuse_arguments_on_another_device():
    native = torch.ops.fastgpt
    x, targets, one = torch.randn(3, 40, device="cuda"), torch.arange(3, device="cuda"), torch.ones(1, device="cuda")
    options = -100, 2, 0.0, 0.0, 0.0, True, False
    calls = {
        "targets": lambda: native.cross_entropy_native(x, targets.cpu(), None, None, *options),
        "weight": lambda: native.cross_entropy_native(x, targets, x[0].cpu(), None, *options),
        "token_weight": lambda: native.cross_entropy_native(x, targets, None, torch.ones(3), *options),
        "row_scale": lambda: native.cross_entropy_chunk_(x, targets, torch.ones(3), -100, 0.0, 0.0, 0.0, True, False),
        "scale": lambda: native.scale_gradient_(x, one.cpu()),
        "tokens": lambda: native.embedding_native(targets[None].cpu(), x, None, 0),
        "position_table": lambda: native.embedding_native(targets[None], x, x.cpu(), 0),
        "sorted": lambda: native.embedding_sum_sorted(x, targets.cpu(), targets, 40, 32),
        "order": lambda: native.embedding_sum_sorted(x, targets, targets.cpu(), 40, 32),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{name}: expected on the device of"):
            call()


@pytest.mark.xdist_group("much memory")
def test_layer_norm_of_more_than_2_to_the_31_elements():
    x = torch.zeros(140_000, 16384, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(16384)
    weight = torch.ones(16384, dtype=torch.bfloat16, device="cuda")
    y = ops.layer_norm(x, weight, backend="triton")
    torch.testing.assert_close(y[-1], ops.layer_norm(x[-1], weight, backend="torch"))


@pytest.mark.xdist_group("much memory")
def test_attention_of_more_than_2_to_the_31_elements():
    q = torch.zeros(1, 65, 262_144, 128, dtype=torch.bfloat16, device="cuda")  # the last head begins past 2^31
    q[:, -1, :512] = torch.randn(512, 128)
    out = ops.attention(q[:, :, :512], q[:, :, :512], q[:, :, :512], backend="triton")
    expected = ops.attention(*(q[:, -1:, :512].contiguous(),) * 3, backend="torch")
    torch.testing.assert_close(out[:, -1:], expected, atol=2e-2, rtol=2e-2)


def test_cuda_graph_replays_with_new_dropout():
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    heads = torch.randn(2, 4, 100, 64, device="cuda", dtype=torch.bfloat16)
    run = lambda: (  # noqa: E731
        ops.add_layer_norm(x, x, x[0], dropout_p=0.5, backend="triton")[1],
        ops.attention(heads, heads, heads, dropout_p=0.5, backend="triton"),
    )
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    graph.replay()
    first = [y.clone() for y in outputs]
    graph.replay()
    assert all(y.isfinite().all() and not torch.equal(y, z) for y, z in zip(outputs, first, strict=True))


def test_parts_of_a_batch_are_dropped_as_the_whole_is():
    x, weight = (
        torch.randn(4, 64, 3 * 64, dtype=torch.bfloat16, device="cuda"),
        torch.ones(64, device="cuda").bfloat16(),
    )

    def results(part, rows):
        leaf = part.clone().requires_grad_()
        torch.manual_seed(0)
        with rows:
            branch = self_attention(leaf, 2, dropout_p=0.2, backend="triton")
            y, h = ops.add_layer_norm(branch, branch, weight, dropout_p=0.2, backend="triton")
            out = dropout(y + h, 0.2)
        out.sum().backward()
        return out.detach(), leaf.grad

    whole = results(x, contextlib.nullcontext())
    for first, n in ((0, 2), (2, 2), (3, 1)):
        ours = results(x[first : first + n], rows_from(first, 4))
        assert all(torch.equal(a, b[first : first + n]) for a, b in zip(ours, whole, strict=True))


def test_autocast_gives_the_torch_ops_dtypes():
    x, weight = torch.randn(4, 64, device="cuda"), torch.ones(64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        for inputs in ((x, x), (x.bfloat16(), x), (x.bfloat16(), x.bfloat16())):
            ours, torchs = (ops.add_layer_norm(*inputs, weight, weight, backend=b) for b in ("triton", "torch"))
            assert [y.dtype for y in ours] == [y.dtype for y in torchs]
            torch.testing.assert_close(ours, torchs, atol=2e-2, rtol=2e-2)


def test_the_model_takes_the_kernels_and_compiles():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, block_size=128, n_layer=2, n_head=4, n_embd=128, dropout=0.0)).cuda()
    tokens = torch.randint(65, (4, 128), device="cuda")
    heads = torch.zeros(1, 4, 8, 32, device="cuda")
    assert ops.explain("attention", *(heads.bfloat16(),) * 3).backend == "triton"
    assert "PyTorch's kernel is faster" in ops.explain("attention", heads, heads, heads).reasons["triton"]
    if unavailable("native", "cuda") is None:
        assert ops.explain("embedding", tokens, heads[0, 0]).backend == "native"
        assert ops.explain("linear_cross_entropy", heads[0, 0], heads[0, 1], tokens[0, :8]).backend == "native"
    with torch.autocast("cuda", torch.bfloat16):
        eager = model(tokens, tokens)[1]
        compiled = torch.compile(model)(tokens, tokens)[1]
    torch.testing.assert_close(eager, compiled, atol=1e-2, rtol=1e-2)


def test_triton_and_native_kernels_pass_the_self_tests_of_common_calls():
    """What stands between a kernel and its first use by `auto`: a false alarm would leave PyTorch to serve."""
    device = torch.device("cuda", torch.cuda.current_device())
    self_test_typical_variants(device)
    outcomes = self_test.known_outcomes(device)
    assert outcomes
    assert [f"{name}: {outcome.figures}" for name, outcome in outcomes.items() if not outcome.passed] == []
