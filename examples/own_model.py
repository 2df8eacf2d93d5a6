"""A GPT of your own on FastGPT's kernels: what runs, is it right, how fast is it, and does it learn?

    python examples/own_model.py                      # about two minutes on a CPU, most of them for torch.compile
    python examples/own_model.py --data input.txt --steps 1000

The model is the lecture's, in the shape that GPT-2 gave it. Its weights are in ordinary torch.nn modules; its work is
done by six functions of plain tensors. They come from `fastgpt.ops`, or from the class `PyTorch` below, which has
functions of the same names. So the model can be compared with itself, in its numbers and in its speed.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from fastgpt import ops
from fastgpt.data.sources import load_text

B, T, C, H, L = 12, 64, 128, 4, 4  # sequences in a batch, tokens in a sequence, channels, heads, blocks


# ---- the model ----


class Block(nn.Module):
    """Tokens exchange what they know (attention), then each one works on it alone (feed-forward)."""

    def __init__(self, functions: Any) -> None:
        super().__init__()
        self.ops = functions
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        normed = self.ops.layer_norm(x, self.ln_1.weight, self.ln_1.bias)
        heads = self.qkv(normed).view(*x.shape[:2], 3, H, C // H)  # (B, T, 3, H, D)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each: a query, a key and a value for every token
        y = self.ops.attention(q, k, v)  # (B, H, T, D): no token sees a later one
        y = self.proj(y.transpose(1, 2).flatten(2))  # (B, T, C): the heads side by side again
        # One kernel adds the branch to the stream and normalises the sum for the next branch; it returns both.
        normed, x = self.ops.add_layer_norm(y, x, self.ln_2.weight, self.ln_2.bias)
        return x + self.down(self.ops.activation(self.up(normed)))


class GPT(nn.Module):
    def __init__(self, vocab_size: int, functions: Any = ops) -> None:
        super().__init__()
        self.ops = functions
        self.tokens, self.positions = nn.Embedding(vocab_size, C), nn.Embedding(T, C)
        self.blocks = nn.Sequential(*(Block(functions) for _ in range(L)))
        self.ln = nn.LayerNorm(C)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """idx, targets (B, T) -> the mean loss in nats per token."""
        x = self.ops.embedding(idx, self.tokens.weight, self.positions.weight)  # (B, T, C)
        x = self.ops.layer_norm(self.blocks(x), self.ln.weight, self.ln.bias)
        # The head is the token embedding. The kernel makes the (B * T, V) logits a part at a time and keeps none.
        return self.ops.linear_cross_entropy(x, self.tokens.weight, targets)


# ---- the same functions in PyTorch, and a look at which kernel takes each call ----


class PyTorch:
    """What the kernels are compared with."""

    activation = staticmethod(F.gelu)

    @staticmethod
    def embedding(tokens: Tensor, table: Tensor, positions: Tensor) -> Tensor:
        return F.embedding(tokens, table) + positions[: tokens.shape[1]]

    @staticmethod
    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias)

    @staticmethod
    def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, weight.shape, weight, bias), total

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    @staticmethod
    def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.t()).flatten(0, 1), targets.flatten())


class Explained:
    """`fastgpt.ops`, which says at the first call of each op which backend takes this call, and why."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Tensor) -> Any:
            if name not in self.said:
                self.said.add(name)
                print(ops.explain(name, *arguments))
            return getattr(ops, name)(*arguments)

        return call


# ---- the questions ----


def loss_and_gradients(vocab_size: int, functions: Any, dtype: torch.dtype, x: Tensor, y: Tensor) -> list[Tensor]:
    """Of a model with the weights of this seed: the loss, and the gradient of every parameter, in float64."""
    torch.manual_seed(1337)
    model = GPT(vocab_size, functions).to(x.device, dtype)
    loss = model(x, y)
    loss.backward()
    return [value.double() for value in (loss.detach(), *(p.grad for p in model.parameters()))]


def check(vocab_size: int, x: Tensor, y: Tensor) -> None:
    """Both in float32, against PyTorch in float64. Errors are fractions of a tensor's largest value.

    As in `fastgpt parity`, an error may be twice that of PyTorch, and a little more, because PyTorch's may be 0.
    """
    exact = loss_and_gradients(vocab_size, PyTorch, torch.float64, x, y)
    errors = {}
    for name, functions in (("fastgpt", ops), ("PyTorch", PyTorch)):
        values = loss_and_gradients(vocab_size, functions, torch.float32, x, y)
        errors[name] = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(values, exact, strict=True)]
        loss, *gradients = errors[name]
        print(f"{name}: an error of {loss:.1e} in the loss, and of at most {max(gradients):.1e} in a gradient")
    for ours, theirs in zip(errors["fastgpt"], errors["PyTorch"], strict=True):
        assert ours <= 2 * theirs + 2e-6, f"an error of {ours:.1e}, where PyTorch's is {theirs:.1e}"


def step(model: Any, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One step of training: loss, gradients, and weights that are a little better."""
    loss = model(x, y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def measure(vocab_size: int, compiler: str, seconds: float, x: Tensor, y: Tensor) -> None:
    """The median time of a step, of one model after the other; `fastgpt bench` lets them take turns.

    `fullgraph` makes torch.compile fail where it cannot trace an op as it is.
    """
    threads = torch.get_num_threads()
    for name, functions in (("fastgpt", ops), ("PyTorch", PyTorch)):
        for compiled in (False, True):
            model: Any = GPT(vocab_size, functions).to(x.device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
            model = torch.compile(model, fullgraph=True, backend=compiler) if compiled else model
            step(model, optimizer, x, y)  # the first one compiles, and is not timed
            timer = Timer(
                "step(*given)", globals={"step": step, "given": (model, optimizer, x, y)}, num_threads=threads
            )
            median = timer.blocked_autorange(min_run_time=seconds).median
            print(f"{name}{', compiled' if compiled else ''}: {median * 1e3:.1f} ms a step")


def train(vocab_size: int, tokens: Tensor, steps: int) -> None:
    model = GPT(vocab_size).to(tokens.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for i in range(steps):
        loss = step(model, optimizer, *batch(tokens))
        if i % max(steps // 5, 1) == 0 or i == steps - 1:
            print(f"step {i + 1}: loss {loss.item():.2f} nats")


def batch(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """B pieces of text from anywhere, and for each of their tokens the one after it: (B, T) twice."""
    at = torch.randint(len(tokens) - T, (B, 1)) + torch.arange(T + 1)  # (B, T + 1)
    rows = tokens[at.to(tokens.device)]
    return rows[:, :-1], rows[:, 1:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shakespeare", help="a text file, or a text's name as in fastgpt train")
    parser.add_argument("--steps", type=int, default=500, help="steps of training")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each time is taken for")
    parser.add_argument("--compiler", default="inductor", help="the backend of torch.compile")
    given = parser.parse_args()

    try:
        text = load_text(given.data)
    except ValueError as error:  # no such file, or one that is no text
        parser.error(f"--data: {error}")
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    tokens = torch.tensor([number[character] for character in text])
    tokens = tokens.to("cuda" if torch.cuda.is_available() else "cpu")
    V = len(characters)
    x, y = batch(tokens)

    print(f"-- What runs, on {tokens.device.type}?")
    GPT(V, Explained()).to(tokens.device)(x, y)
    print("-- Is it right?")
    check(V, x, y)
    print("-- How fast is it?")
    measure(V, given.compiler, given.seconds, x, y)
    print("-- Does it learn?")
    train(V, tokens, given.steps)
