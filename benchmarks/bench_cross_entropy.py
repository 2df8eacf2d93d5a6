"""cross_entropy and linear_cross_entropy, forward and backward in float32 on the CPU: native against PyTorch.

python benchmarks/bench_cross_entropy.py [seconds per row]
"""

from __future__ import annotations

import subprocess
import sys

import torch
import torch.nn.functional as F
from interleaved import agree, interleaved, machine, peak_bytes, show

from fastgpt import ops


def cross_entropy(n: int, classes: int, seconds: float) -> None:
    logits = torch.randn(n, classes, requires_grad=True)
    targets = torch.randint(classes, (n,))

    def step(run):
        logits.grad = None
        loss = run(logits, targets)
        loss.backward()
        return loss.detach(), logits.grad

    few = slice(0, 64)  # of the same width; a float64 oracle of all rows would take gigabytes
    exact = logits.detach()[few].double().requires_grad_()
    oracle = F.cross_entropy(exact, targets[few])
    (exact_gradient,) = torch.autograd.grad(oracle, exact)
    results = []
    for run in (lambda *a: ops.cross_entropy(*a, backend="native"), F.cross_entropy):
        leaf = logits.detach()[few].requires_grad_()
        loss = run(leaf, targets[few])
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    agree("loss", results[0][0], results[1][0], oracle.detach())
    agree("gradient", results[0][1], results[1][1], exact_gradient)

    contenders = {
        "torch": lambda: step(F.cross_entropy),
        "native": lambda: step(lambda *a: ops.cross_entropy(*a, backend="native")),
    }
    show(f"cross_entropy {n} x {classes}", interleaved(contenders, seconds))


def linear_cross_entropy(n: int, width: int, classes: int, seconds: float) -> None:
    x = torch.randn(n, width, requires_grad=True)
    head = (torch.randn(classes, width) / width**0.5).requires_grad_()
    targets = torch.randint(classes, (n,))

    def unfused(x, head, targets):
        return F.cross_entropy(F.linear(x, head), targets)

    def step(run):
        x.grad = head.grad = None
        run(x, head, targets).backward()

    def fused(*arguments):
        return ops.linear_cross_entropy(*arguments, backend="native")

    few = slice(0, 300)
    exact = [x.detach()[few].double().requires_grad_(), head.detach().double().requires_grad_()]
    oracle = unfused(*exact, targets[few])
    exact_gradients = torch.autograd.grad(oracle, exact)
    gradients = []
    for run in (fused, unfused):
        leaves = [x.detach()[few].requires_grad_(), head.detach().requires_grad_()]
        gradients.append(torch.autograd.grad(run(*leaves, targets[few]), leaves))
    for name, ours, theirs, best in zip(("dx", "dW"), *gradients, exact_gradients, strict=True):
        agree(name, ours, theirs, best)
    del exact, oracle, exact_gradients, gradients

    title = f"linear_cross_entropy {n} x {width}, V={classes}"
    show(title, interleaved({"torch": lambda: step(unfused), "native": lambda: step(fused)}, seconds))
    for name in (
        "torch",
        "native",
    ):  # each in a process of its own: the extension keeps freed buffers for the next call
        command = [sys.executable, __file__, "peak", name, str(n), str(width), str(classes)]
        beyond = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"{title:<42} {name:<8} {beyond / 1e6:9.1f} MB at the peak, beyond inputs and gradients", flush=True)


def linear_peak(name: str, n: int, width: int, classes: int) -> int:
    """Bytes of one first step beyond inputs and gradients."""
    x = torch.randn(n, width, requires_grad=True)
    head = torch.randn(classes, width, requires_grad=True)
    targets = torch.randint(classes, (n,))

    def step(rows: int) -> None:
        x.grad = head.grad = None
        if name == "native":
            ops.linear_cross_entropy(x[:rows], head, targets[:rows], backend="native").backward()
        else:
            F.cross_entropy(F.linear(x[:rows], head), targets[:rows]).backward()

    ops.cross_entropy(torch.randn(2, 3), targets[:2] % 3, backend="native")  # loads the extension
    F.linear(x[:2, :4], head[:8, :4]).sum().backward()  # and starts autograd and the matrix library
    x.grad = head.grad = None
    return peak_bytes(lambda: step(n)) - 4 * (x.numel() + head.numel())


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        print(linear_peak(sys.argv[2], *(int(size) for size in sys.argv[3:6])))
        sys.exit()
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    torch.manual_seed(0)
    print(machine())
    cross_entropy(1024, 50304, seconds)
    cross_entropy(4096, 65, seconds)
    linear_cross_entropy(1024, 512, 50304, 2 * seconds)
