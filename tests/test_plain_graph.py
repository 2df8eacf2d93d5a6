"""A model as one graph of PyTorch's own operations: the same logits for every number and length of texts."""

from __future__ import annotations

import io

import pytest
import torch

from fastgpt import GPTConfig
from fastgpt.baselines import MODELS
from fastgpt.plain_graph import longest_text, traced

SMALL = {"vocab_size": 11, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8, "dropout": 0.2}
CASES = [
    ("gpt", {"n_layer": 2, "activation": "gelu_tanh"}),
    ("gpt", {"norm": "post", "residual": False, "bias": False, "activation": "relu2"}),
    ("gpt", {"norm": "none", "is_causal": False, "tie_weights": False, "activation": "relu"}),
    ("gpt", {"norm": "post", "feed_forward": False, "block_size": 2}),
    ("gpt", {"block_size": 1, "feed_forward": False}),
    ("bigram", {}),
    ("positional-bigram", {}),
    ("rnn", {"bias": False}),
    ("gru", {}),
    ("lstm", {"n_layer": 2, "tie_weights": False}),
]


def made(kind: str, **options):
    torch.manual_seed(0)
    model = MODELS[kind](GPTConfig(**{**SMALL, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_the_graph_computes_the_models_logits_at_any_size(kind, options) -> None:
    model = made(kind, **options)
    program = traced(model)
    nodes = [node for module in program.graph_module.modules() for node in module.graph.nodes]
    called = {str(node.target) for node in nodes if node.op == "call_function"}
    assert {name.partition(".")[0] for name in called} <= {"aten", "scan", "<built-in function getitem>"}
    assert not any("stack_trace" in node.meta for node in nodes), "paths of this machine"
    run = program.module()
    block, longest = model.cfg.block_size, longest_text(model)
    for B, T in ((1, 1), (4, 1), (1, block), (5, max(1, block // 2)), *([] if longest else [(2, 2 * block)])):
        idx = torch.randint(11, (B, T))
        torch.testing.assert_close(run(idx), model(idx)[0])
    if longest is not None:
        with pytest.raises(Exception, match=r"Guard failed: idx.size\(\)\[1\]"):
            run(torch.zeros(1, longest + 1, dtype=torch.int64))


def test_a_graph_is_the_same_bytes_each_time() -> None:
    model = made("gpt")
    files = io.BytesIO(), io.BytesIO()
    for file in files:
        torch.export.save(traced(model), file)
    assert files[0].getvalue() == files[1].getvalue()
