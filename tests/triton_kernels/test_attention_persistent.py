"""Attention where a program goes over more work than one tile: the persistent forward, and a second turn over heads.

On a GPU with 132 multiprocessors, with the shapes of the benchmarks; on Triton's interpreter, which counts as two, with
shapes that are small and take the same branches.
"""

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.parity import ATOL
from triton_checks import DEVICE, outputs_and_gradients

kernels = pytest.importorskip("fastgpt.triton_kernels.attention")

SEED = -(2**45) + 3
DTYPE = torch.bfloat16
# name: the kernel, (B, H, T, D) on a GPU, the same on the interpreter, dropout
CASES = {
    "persistent": ("forward_kernel", (16, 12, 1024, 64), (1, 4, 390, 16), 0.0),
    "persistent, dropout": ("forward_kernel", (16, 12, 1024, 64), (1, 2, 390, 16), 0.2),
    "persistent, 8192 keys": ("forward_kernel", (1, 16, 8192, 128), (1, 2, 390, 128), 0.0),
    "one tile, a second turn": ("one_tile_forward_kernel", (200, 4, 64, 32), (2, 5, 64, 32), 0.0),
}
REPEATS = 20 if DEVICE == "cuda" else 2


class Spy:
    """Stands for a kernel, and records how many programs it is launched with, and its constants."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append((grid[0], options))
            return self.kernel[grid](*args, **options)

        return launch


def is_an_h100() -> bool:
    found = torch.cuda.get_device_properties(0)
    return (found.major, found.multi_processor_count) == (9, 132)


def case_of(name):
    kernel, on_gpu, interpreted, dropout_p = CASES[name]
    shape = B, H, T, D = on_gpu if DEVICE == "cuda" else interpreted
    torch.manual_seed(T)
    tensors = [torch.randn(B, T, H, D, dtype=DTYPE, device=DEVICE).transpose(1, 2) for _ in range(4)]
    return kernel, shape, dropout_p, tensors


@pytest.mark.xdist_group("much memory")
@pytest.mark.parametrize("name", CASES)
def test_the_path_is_taken_and_gives_the_same_bits_every_time(name, monkeypatch):
    kernel, (B, H, T, _), dropout_p, (*inputs, grad) = case_of(name)
    if DEVICE == "cuda" and not is_an_h100():
        pytest.skip("the shapes were chosen for sm_90 with 132 multiprocessors; other chips may take other paths")
    launches = []
    monkeypatch.setattr(kernels, kernel, Spy(getattr(kernels, kernel), launches))
    run = lambda: outputs_and_gradients(  # noqa: E731
        ops.attention, inputs, [grad], dropout_p=dropout_p, seed=SEED, backend="triton"
    )
    first = run()
    ((programs, options),) = launches
    if kernel == "forward_kernel":
        assert options["DESCRIPTORS"] and options["PERSISTENT"]
        assert programs < B * H * -(-T // options["BLOCK_M"]) // 2, "each program goes over more than one pair of tiles"
    else:
        assert programs < B * H, "some programs take a second head"
    for _ in range(REPEATS - 1):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.xdist_group("much memory")
@pytest.mark.parametrize("name", CASES)
def test_some_heads_are_the_oracles(name, monkeypatch):
    """Heads are independent of each other, so that the float64 scores of a few fit the memory."""
    _, (B, H, T, _), dropout_p, (*inputs, grad) = case_of(name)
    options = {"dropout_p": dropout_p, "seed": SEED}
    ours = outputs_and_gradients(ops.attention, inputs, [grad], backend="triton", **options)
    for number in (0, B * H // 2, B * H - 1):
        b, h = divmod(number, H)

        def one_head(x, b=b, h=h):
            return x[b : b + 1, h : h + 1]

        if dropout_p:
            keep = reference.philox_keep_mask(SEED, dropout_p, (number + 1) * T, T, grad.device)[number * T :]
            monkeypatch.setattr(reference, "philox_keep_mask", lambda *_, keep=keep: keep)
        tensors = [one_head(x) for x in (*inputs, grad)]
        torchs = outputs_and_gradients(reference.attention, tensors[:3], tensors[3:], **options)
        exact = [x.double() for x in tensors]
        oracle = outputs_and_gradients(reference.attention, exact[:3], exact[3:], **options)
        monkeypatch.undo()
        for what, our, pytorchs, expected in zip(("out", "dq", "dk", "dv"), ours, torchs, oracle, strict=True):
            error, torch_error = (float((x - expected).abs().max()) for x in (one_head(our), pytorchs))
            assert error <= 2 * torch_error + ATOL[DTYPE], f"head {number}, {what}: {error:.2e}, {torch_error:.2e}"
