"""What users of neighbouring projects reported about saved models and resumed runs (see test_citations.py)."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastgpt import GPT
from fastgpt.baselines import build_model
from fastgpt.checkpoint import Checkpoint, CheckpointError
from fastgpt.config import TrainConfig
from fastgpt.data.corpus import Corpus
from fastgpt.files import atomic_path
from fastgpt.training.loop import Trainer
from fastgpt.training.run_folder import RunFolder, read_metrics
from fastgpt.training.step import learning_rate
from helpers import TINY, close, integers, random, tiny, write

QUICK = TrainConfig(
    batch_size=4, max_steps=6, eval_interval=3, eval_batches=1, log_interval=1, warmup_steps=0, device="cpu"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    file = write(tmp_path_factory.mktemp("data") / "text.txt", "the quick brown fox jumps over the lazy dog\n" * 30)
    return Corpus.load(file, block_size=8)


def trainer(corpus: Corpus, path: Path, cfg: TrainConfig = QUICK, new: bool = True, **changes) -> Trainer:
    folder = RunFolder(path)
    if new:
        folder.create(dataclasses.asdict(cfg))
    config = dataclasses.replace(TINY, vocab_size=corpus.tokenizer.vocab_size, **changes)
    return Trainer(build_model(config, cfg.seed), corpus, cfg, folder)


def test_checkpoint_of_a_compiled_run_has_plain_names(corpus, tmp_path):
    """karpathy/nanoGPT#325, rasbt/LLMs-from-scratch#580: "_orig_mod." before every name; resuming failed."""
    saved = trainer(corpus, tmp_path / "run", dataclasses.replace(QUICK, compile=True)).checkpoint()
    plain = trainer(corpus, tmp_path / "other").checkpoint()
    assert saved.tensors.keys() == plain.tensors.keys()
    model = tiny()
    torch.compile(model, backend="eager").save_pretrained(tmp_path / "compiled")
    again = GPT.from_pretrained(tmp_path / "compiled")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("format", ["fastgpt", "huggingface"])
def test_checkpoint_writes_shared_weights_once(format, tmp_path):
    """safetensors/safetensors#98, unslothai/unsloth#1105: tied weights could not be saved, or were saved twice."""
    from safetensors import safe_open

    model = tiny()
    model.save_pretrained(tmp_path, format=format)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert len([n for n in names if "lm_head" in n or "wte" in n or "token_embedding" in n]) == 1
    again = GPT.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.token_embedding.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_checkpoint_with_the_tied_head_written_out(tmp_path):
    """vllm-project/vllm#6758: KeyError 'lm_head.weight', a copy of the embedding that fine-tuning had written."""
    from safetensors.torch import load_file, save_file

    model = tiny()
    model.save_pretrained(tmp_path, format="huggingface")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    idx = integers(11, 1, 8)
    assert torch.equal(GPT.from_pretrained(tmp_path)(idx)[0], model(idx)[0])


def test_checkpoint_keeps_a_head_of_its_own(tmp_path):
    """NVIDIA-NeMo/Automodel#2942, sgl-project/sglang#15398: a trained head was replaced by the embedding."""
    model, idx = tiny(tie_weights=False), integers(11, 1, 8)
    for format in ("fastgpt", "huggingface"):
        model.save_pretrained(tmp_path / format, format=format)
        again = GPT.from_pretrained(tmp_path / format)
        assert again.lm_head.weight is not again.token_embedding.weight
        assert torch.equal(again(idx)[0], model(idx)[0])


def test_checkpoint_copies_of_a_model_stay_tied():
    """BlackSamorez/tensor_parallel#73, huggingface/accelerate#1204: the copy's head was a tensor of its own."""
    model, idx = tiny(), integers(11, 2, 8)
    loaded = tiny(seed=1)
    loaded.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), loaded):
        assert other.lm_head.weight is other.token_embedding.weight
        other.loss(idx, idx).backward()
        assert other.num_parameters() == model.num_parameters()
        assert torch.equal(other(idx)[0], model(idx)[0])


@pytest.mark.parametrize("way", ["assign", "meta"])
def test_checkpoint_loaded_by_assignment_stays_tied(way):
    """pytorch/pytorch#188346, Modalities/modalities#357: assign=True, or a model made on "meta", untied the head."""
    saved = tiny().state_dict()
    if way == "meta":
        with torch.device("meta"):
            model = GPT(TINY)
        model.to_empty(device="cpu").load_state_dict(saved)
    else:
        model = tiny(seed=1)
        model.load_state_dict(saved, assign=True)
    assert model.lm_head.weight is model.token_embedding.weight
    assert model.num_parameters() == tiny().num_parameters()


def test_checkpoint_in_half_precision(tmp_path):
    """huggingface/transformers#12062, huggingface/peft#2421: which dtype a loaded model has is one, and documented."""
    model = tiny().bfloat16()
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    for parameter, other in zip(model.parameters(), again.parameters(), strict=True):
        assert other.dtype == torch.float32 and torch.equal(parameter.float(), other)


def test_checkpoint_best_and_latest_are_two(corpus, tmp_path):
    """karpathy/nanoGPT#180, PolymathicAI/the_well#60: the latest weights overwrote the best."""
    cfg = dataclasses.replace(QUICK, lr=30.0, min_lr=30.0, max_steps=4, eval_interval=1, grad_clip=0.0)
    trainer(corpus, tmp_path, cfg).run()
    val = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if row["split"] == "val"]
    best, latest = (Checkpoint.load(tmp_path / "checkpoint" / f"{n}.safetensors") for n in ("best", "latest"))
    assert val.index(min(val)) == best.state["step"] < latest.state["step"] == 4
    taken = GPT.from_pretrained(tmp_path)
    assert torch.equal(taken.token_embedding.weight, best.part("model")["token_embedding.weight"])


def test_checkpoint_of_the_last_step(corpus, tmp_path):
    """intelligent-machine-learning/dlrover#894: the run ended between two intervals, and its end was not saved."""
    trainer(corpus, tmp_path, dataclasses.replace(QUICK, max_steps=5, eval_interval=3)).run()
    assert Checkpoint.load(tmp_path / "checkpoint" / "latest.safetensors").state["step"] == 5


def test_checkpoint_survives_an_interrupted_write(tmp_path):
    """Lightning-AI/pytorch-lightning#688, howervoo/speechturn#15: half a file stood where the good one had been."""
    path = tmp_path / "latest.safetensors"
    path.write_bytes(b"good")
    for error in (OSError("disk full"), KeyboardInterrupt(), SystemExit(1)):
        with pytest.raises((CheckpointError, KeyboardInterrupt, SystemExit)), atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise error
        assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


def test_checkpoint_resumes_to_the_same_bits(corpus, tmp_path):
    """NVIDIA-NeMo/Megatron-Bridge#5257, facebookresearch/neural-rewriter#6: random state or learning rate drifted."""
    whole = trainer(corpus, tmp_path / "whole", dropout=0.2)
    whole.run()
    first = trainer(corpus, tmp_path / "parts", dataclasses.replace(QUICK, max_steps=6), dropout=0.2)
    stop_after = 3
    evaluate = first._evaluate_and_save

    def evaluate_and_stop():
        evaluate()
        return first.state["step"] == stop_after

    first._evaluate_and_save = evaluate_and_stop
    first.run()
    torch.manual_seed(99)
    second = trainer(corpus, tmp_path / "parts", new=False, dropout=0.2)
    second.restore(Checkpoint.load(tmp_path / "parts" / "checkpoint" / "latest.safetensors"))
    second.run()
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    rates = [row["lr"] for row in read_metrics(tmp_path / "parts" / "metrics.jsonl") if row["split"] == "train"]
    assert rates == [learning_rate(step, QUICK) for step in range(6)]


def test_checkpoint_without_moments_cannot_be_resumed(corpus, tmp_path):
    """karpathy/llama2.c#148: KeyError 'optimizer', for a file that holds weights only."""
    run = trainer(corpus, tmp_path)
    saved = run.checkpoint()
    weights = {name: t for name, t in saved.tensors.items() if name.startswith(("model.", "rng."))}
    file = dataclasses.replace(saved, tensors=weights, path=tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: tensor exp_avg\.\S+ is missing"):
        run.restore(file)


def test_checkpoint_of_a_partly_frozen_model(corpus, tmp_path):
    """NVIDIA/Megatron-LM#345, kohjingyu/fromage#18: frozen weights failed in the optimizer, or were trained."""
    run = trainer(corpus, tmp_path)
    run.model.blocks[0].requires_grad_(False)
    before = [p.clone() for p in run.model.parameters()]
    run.run()
    again = trainer(corpus, tmp_path, dataclasses.replace(QUICK, max_steps=8), new=False)
    again.model.blocks[0].requires_grad_(False)
    again.restore(Checkpoint.load(tmp_path / "checkpoint" / "latest.safetensors"))
    again.run()
    for old, (name, new) in zip(before, again.model.named_parameters(), strict=True):
        assert torch.equal(old, new) == name.startswith("blocks.0."), name


def test_checkpoint_square_weights_are_transposed_too(tmp_path):
    """karpathy/nanoGPT#190: GPT-2's linears are (in, out), which shapes show only where they are not square."""
    from safetensors.torch import load_file

    model, idx = tiny(), integers(11, 2, 8)
    model.save_pretrained(tmp_path, format="huggingface")
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (16, 48)
    assert torch.equal(tensors["transformer.h.1.attn.c_proj.weight"], model.blocks[1].attn.proj.weight.t())
    assert torch.equal(GPT.from_pretrained(tmp_path)(idx)[0], model(idx)[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 24),
        ("activation_function", "silu"),
    ],
)
def test_checkpoint_settings_that_would_be_ignored(field, value, tmp_path):
    """huggingface/transformers#44380, mlc-ai/mlc-llm#1389: settings of GPT-2 were ignored, and outputs were wrong."""
    tiny().save_pretrained(tmp_path, format="huggingface")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(CheckpointError, match=f"field '{field}' is {value!r}"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(("theirs", "approximate"), [("gelu_new", "tanh"), ("gelu", "none")])
def test_checkpoint_gelu_is_the_one_it_was_trained_with(theirs, approximate, tmp_path):
    """karpathy/nanoGPT#2, nntile/nntile#370: GPT-2 was trained with the tanh form."""
    tiny().save_pretrained(tmp_path, format="huggingface")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "activation_function": theirs}))
    mlp, x = GPT.from_pretrained(tmp_path).blocks[0].mlp, 3 * random(2, 16)
    close(mlp(x), mlp.down(F.gelu(mlp.up(x), approximate=approximate)), rtol=1e-6, atol=1e-7)


def test_checkpoint_block_size_is_the_models(tmp_path):
    """huggingface/transformers#10732: "index out of range in self" for too long a block."""
    model = tiny()
    with pytest.raises(ValueError, match="idx: 9 tokens do not fit block_size=8"):
        model(integers(11, 1, 9))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"position_embedding.weight has shape \(8, 16\), the model has \(4, 16\)"
    ):
        GPT.from_pretrained(tmp_path, block_size=4)
