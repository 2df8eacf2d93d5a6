"""A model as one graph of PyTorch's own operations, of which no part needs FastGPT: what an export holds.

The graph computes idx (B, T) int64 -> logits (B, T, V), for any B, and for any T that the model reads. It is traced on
the torch backend, because a registered op of ours would be unknown where this package is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .baselines import Bigram, Recurrent
from .language_model import LanguageModel
from .modules import embed
from .ops.backend import use_backend
from .ops.library import scan

_EXAMPLE = (2, 3)  # B and T while the graph is traced: any but 0 and 1, which torch.export takes for constants


class Logits(nn.Module):
    """idx (B, T) -> logits (B, T, V), and no loss."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, idx: Tensor) -> Tensor:
        return self.model(idx)[0]


class RecurrentLogits(Logits):
    """The same of a recurrent model, by a loop over the tokens, which a graph holds once for texts of any length.

    torch.export would write the steps of PyTorch's recurrent layers one after the other, for one length only.
    """

    def forward(self, idx: Tensor) -> Tensor:
        x = embed(idx, self.model.token_embedding)  # (B, T, C)
        for weights in self.model.rnn.all_weights:
            x = _layer(self.model.kind, x, *weights)
        return self.model.lm_head(x)


def _layer(kind: str, x: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None, b_h: Tensor | None = None) -> Any:
    """One recurrent layer: (B, T, C) -> (B, T, C). w_x and w_h are (G C, C), for the G gates one below the other."""

    def step(state: tuple[Tensor, ...], of_x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        state = _CELLS[kind](of_x, F.linear(state[0], w_h, b_h), *state)
        return state, state[0].clone()  # a copy: the loop refuses to give out its state itself

    of_tokens = F.linear(x, w_x, b_x).transpose(0, 1)  # (T, B, G C)
    start = tuple(x.new_zeros(x.shape[0], x.shape[2]) for _ in range(2 if kind == "lstm" else 1))
    return scan(step, start, of_tokens)[1].transpose(0, 1)


def _rnn_cell(of_x: Tensor, of_h: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return ((of_x + of_h).tanh(),)


def _gru_cell(of_x: Tensor, of_h: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """A new state n, and by the gate z a mixture of the old one and it. The gates' order is PyTorch's: r, z, n."""
    r_x, z_x, n_x = of_x.chunk(3, dim=1)
    r_h, z_h, n_h = of_h.chunk(3, dim=1)
    n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    z = (z_x + z_h).sigmoid()
    return ((1.0 - z) * n + z * h,)


def _lstm_cell(of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """The gates' order is PyTorch's: input, forget, the new content of the cell, output."""
    i, f, content, o = (of_x + of_h).chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * content.tanh()
    return o.sigmoid() * c.tanh(), c


_CELLS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"rnn": _rnn_cell, "gru": _gru_cell, "lstm": _lstm_cell}


def longest_text(model: LanguageModel) -> int | None:
    """The most tokens that the model reads at once; None for one without a limit."""
    return None if isinstance(model, (Bigram, Recurrent)) else model.cfg.block_size


def traced(model: LanguageModel) -> ExportedProgram:
    """The graph of `model`, which is in evaluation mode; it shares the model's parameters."""
    longest = longest_text(model)
    B, T = _EXAMPLE if longest is None else (_EXAMPLE[0], min(_EXAMPLE[1], longest))
    sizes = {0: Dim("B", min=1)}
    if longest != 1:  # one length is no range
        sizes[1] = Dim("T", min=1, max=longest)
    graph = RecurrentLogits(model) if isinstance(model, Recurrent) else Logits(model)
    with use_backend("torch"), torch.no_grad():
        program = torch.export.export(graph, (torch.zeros(B, T, dtype=torch.int64),), dynamic_shapes=(sizes,))
    for module in program.graph_module.modules():  # the bodies of loops are graphs of their own
        _strip(module)
    return program


def _strip(module: Any) -> None:
    """Drop what nobody reads: results without a reader, and the places in this machine's files, which differ."""
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        node.meta.pop("stack_trace", None)
    module.recompile()
