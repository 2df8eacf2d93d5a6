"""What users of neighbouring projects reported about settings and optimizers (see test_citations.py)."""

from __future__ import annotations

import pytest

from fastgpt import GPTConfig
from fastgpt.cli import main
from fastgpt.config import ConfigError, TrainConfig
from fastgpt.training.step import learning_rate, make_optimizer
from helpers import tiny, write


def test_configuration_width_and_heads():
    """rasbt/LLMs-from-scratch#444, facebookresearch/detr#499: an assertion that names neither number."""
    with pytest.raises(ConfigError, match="n_embd: expected a multiple of n_head=48, got 1600"):
        GPTConfig(n_embd=1600, n_head=48)
    assert GPTConfig.preset("gpt2-xl").n_head == 25


@pytest.mark.parametrize(("warmup", "steps"), [(10, 10), (20, 10), (0, 0), (0, 10), (10, 11)])
def test_configuration_schedules_without_a_decay(warmup, steps):
    """karpathy/nanoGPT#691, deepspeedai/DeepSpeed#8142, pytorch/torchtitan#1010: division by zero."""
    cfg = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=warmup, max_steps=steps)
    rates = [learning_rate(step, cfg) for step in range(30)]
    assert all(0.0 < rate <= 1.0 for rate in rates) and rates[29] == 0.1
    assert rates[:warmup] == sorted(rates[:warmup])


def test_configuration_the_first_step_learns():
    """karpathy/nanoGPT#578, PaddlePaddle/PaddleDetection#4611: the rate began at 0, or jumped where warm-up ends."""
    cfg = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=4, max_steps=44)
    rates = [learning_rate(step, cfg) for step in range(46)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates[44] == rates[45] == 0.1
    assert rates[24] == pytest.approx(0.55) and rates[4:45] == sorted(rates[4:45], reverse=True)


@pytest.mark.parametrize("tied", [True, False])
def test_configuration_weight_decay(tied):
    """Lightning-AI/lit-llama#254, oumi-ai/oumi#341, karpathy/nanoGPT#21: biases and norms decayed too."""
    model = tiny(tie_weights=tied)
    decayed, rest = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and rest["weight_decay"] == 0.0
    every = [id(p) for group in (decayed, rest) for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters()), "each once, the shared one too"
    undecayed = {id(p) for p in rest["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in undecayed) == (name.endswith("bias") or "ln_" in name)


def test_configuration_false_means_false(tmp_path, capsys):
    """NVIDIA/OpenSeq2Seq#130, bw2/ConfigArgParse#87, axolotl-ai-cloud/axolotl#3765: "False" counted as true."""
    import tomllib

    text = write(tmp_path / "text.txt", "abcdefgh" * 40)
    small = "max_steps = 0\nblock_size = 4\nn_layer = 1\nn_head = 1\nn_embd = 4\neval_batches = 1\nbatch_size = 1\n"
    for number, (line, option, want) in enumerate(
        [
            ("bias = false", [], False),
            ("bias = true", ["--no-bias"], False),
            ("bias = false", ["--bias"], True),
            ("bias = true", ["--bias", "False"], False),
        ]
    ):
        config = write(tmp_path / f"{number}.toml", f"{small}device = 'cpu'\n{line}\n")
        out = tmp_path / f"run{number}"
        code = main(["train", "--config", str(config), "--data", str(text), "--out", str(out), *option])
        if option == ["--bias", "False"]:  # refused or understood, never taken for true
            assert code == 2 or tomllib.loads((out / "config.toml").read_text())["bias"] is False
        else:
            assert code == 0 and tomllib.loads((out / "config.toml").read_text())["bias"] is want
    capsys.readouterr()
