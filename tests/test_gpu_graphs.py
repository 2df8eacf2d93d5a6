"""What only a GPU can show of CUDA graphs: training and generation by real ones. `pytest -m gpu`."""

import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import GPT, GPTConfig, cuda_graph, ops, use_backend
from fastgpt.config import TrainConfig
from fastgpt.ops.attention_cached import attention_cached_
from fastgpt.ops.backend import choose
from fastgpt.training.graph import GraphedStep, try_out
from fastgpt.training.step import Precision, make_optimizer, training_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
STEPS = 10
CUDA = torch.device("cuda")


def trained(by_graph: bool, dtype: str, grad_accum: int, dropout: float) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and weights of ten steps, whose learning rates differ."""
    torch.manual_seed(0)
    cfg = GPTConfig(vocab_size=4096, block_size=300, n_layer=2, n_head=4, n_embd=256, dropout=dropout)
    model, precision = GPT(cfg).to(CUDA), Precision(CUDA, dtype)
    optimizer = make_optimizer(model, TrainConfig())
    lr = torch.zeros((), device=CUDA)

    def step(micro_batches, rate):
        return training_step(model, model.loss, optimizer, micro_batches, precision, 1.0, rate)

    take = step
    if by_graph:
        take = GraphedStep(step, model, optimizer, precision, cuda_graph.recorder(CUDA))
    tokens = torch.randint(4096, (STEPS, grad_accum, 4, 301), generator=torch.Generator().manual_seed(1)).to(CUDA)
    losses = []
    for number, batches in enumerate(tokens):
        rate = 1e-3 * (number + 1)
        micro_batches = [(batch[:, :-1], batch[:, 1:]) for batch in batches]
        losses.append(take(micro_batches, rate if by_graph else lr.fill_(rate)))
    assert not by_graph or take.reason is None
    return torch.stack(losses).tolist(), [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    ("dtype", "grad_accum", "dropout"),
    [("bfloat16", 1, 0.0), ("bfloat16", 2, 0.1), ("float16", 1, 0.0), ("float32", 1, 0.1)],
)
def test_ten_steps_by_a_graph_have_the_bits_of_eager_ones(dtype, grad_accum, dropout):
    # PyTorch's fused attention, which serves in float32, adds up the gradient of q in no fixed order.
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("error", message=".*CUDA graph.*")
        by_graph, eager = (trained(each, dtype, grad_accum, dropout) for each in (True, False))
    assert by_graph[0] == eager[0]
    assert all(torch.equal(a, b) for a, b in zip(by_graph[1], eager[1], strict=True))


def test_the_small_model_of_the_doctor():
    assert try_out(CUDA) is None


def test_a_recording_that_fails_leaves_eager_work_as_it_was():
    """Reading a value waits for the device, which is not permitted; then dropout has to draw as before."""
    x = torch.ones(1000, device=CUDA)
    torch.manual_seed(3)
    expected = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(3)
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        cuda_graph.recorder(CUDA).record(lambda: torch.nn.functional.dropout(x, 0.5).sum().item())
    torch.cuda.synchronize()
    assert torch.cuda.current_stream() == stream
    torch.manual_seed(3)
    assert torch.equal(torch.nn.functional.dropout(x, 0.5), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capacity", [64, 1024])
def test_attention_that_appends_to_a_cache(capacity, dtype):
    B, H, D = 2, 12, 64
    torch.manual_seed(0)
    for n_new, length in ((1, 0), (1, 63), (4, 17), (8, capacity - 8)):
        q, k, v = torch.randn(3, B, H, n_new, D, device=CUDA, dtype=dtype)
        keys, values = torch.randn(2, B, H, capacity, D, device=CUDA, dtype=dtype)
        whole = [torch.cat([x[:, :, :length], new], dim=2) for x, new in ((keys, k), (values, v))]
        behind = keys[:, :, length + n_new :].clone()
        with use_backend("triton"):
            assert choose("attention", "auto", "cuda", (q, keys, values), {"route": "attention_cached"})[0] == "triton"
            out = attention_cached_(q, k, v, keys, values, torch.tensor(length, device=CUDA))
        expected = ops.attention(q, *whole, backend="torch")
        torch.testing.assert_close(out, expected, atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=2e-2)
        assert torch.equal(keys[:, :, : length + n_new], whole[0]) and torch.equal(keys[:, :, length + n_new :], behind)
        assert torch.equal(values[:, :, : length + n_new], whole[1])


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 50, "top_p": 0.95}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_tokens_by_a_graph_are_those_without(batch_size, options):
    """In float32, where the last bits of the logits decide no token; past the end of the window."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, block_size=160, n_layer=3, n_head=4, n_embd=128, dropout=0.0)).to(CUDA)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    prompt = torch.randint(500, (batch_size, 20), device=CUDA)

    def generated(**more) -> torch.Tensor:
        return model.generate(prompt, 150, **options, generator=torch.Generator(CUDA).manual_seed(7), **more)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CUDA graph.*")
        by_graph = generated(cuda_graph=True)
    assert torch.equal(by_graph, generated())
