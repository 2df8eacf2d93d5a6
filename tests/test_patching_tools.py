"""A patched GPT-2 in the hands of transformers' Trainer, PEFT, torch.compile and gradient checkpointing."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt import ops
from patched_models import IDS, OwnModel, V, assert_within_rule, exact_step, gpt2, own_step, step
from readme_commands import blocks

pytestmark = pytest.mark.filterwarnings("ignore")


def maybe_patched(model, patched: bool):
    return fastgpt.patch(model) if patched else contextlib.nullcontext()


@pytest.fixture
def fused(monkeypatch) -> list[int]:
    """How often the head and the loss were one op."""
    called: list[int] = []
    loss = ops.linear_cross_entropy
    monkeypatch.setattr(ops, "linear_cross_entropy", lambda *args, **kwargs: called.append(1) or loss(*args, **kwargs))
    return called


# --- Trainer ----------------------------------------------------------------------------------------------------------


def trained(folder, model, bf16: bool = False) -> tuple[list[float], dict[str, float]]:
    """The losses that a Trainer logs in 3 steps of 2 micro-batches of unequal lengths, and its evaluation."""
    transformers = pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("accelerate")
    examples = [{"input_ids": IDS[i % 2], "labels": IDS[i % 2].clone(), "length": i} for i in range(12)]
    for i, example in enumerate(examples):
        example["labels"][: i % 5] = -100  # so that micro-batches count unequal numbers of targets
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, bf16=bf16,
        logging_steps=1, learning_rate=1e-3, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=examples, eval_dataset=examples[:2])
    trainer.train()
    evaluated = trainer.predict(examples[:2])
    assert evaluated.predictions.shape[1:] == (12, model.config.vocab_size), "logits are there in evaluation"
    trainer.save_model(folder / "saved")
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], evaluated.metrics


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trainer_logs_the_same_losses(tmp_path, fused, bf16):
    losses, metrics = {}, {}
    for patched in (False, True):
        model = gpt2()
        with maybe_patched(model, patched):
            losses[patched], metrics[patched] = trained(tmp_path / str(patched), model, bf16)
        assert len(fused) == (6 if patched else 0)
    tolerance = 1e-2 if bf16 else 1e-4
    assert losses[True] == pytest.approx(losses[False], abs=tolerance)
    assert metrics[True]["test_loss"] == pytest.approx(metrics[False]["test_loss"], abs=tolerance)
    configs = [json.loads((tmp_path / str(p) / "saved" / "config.json").read_text(encoding="utf-8")) for p in losses]
    assert configs[0] == configs[1] and configs[1]["architectures"] == ["GPT2LMHeadModel"]
    step(model)  # what the Trainer has wrapped still works


# --- LoRA -------------------------------------------------------------------------------------------------------------


def with_adapters(model, targets: list[str], **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=True, **options
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("order", ["patch first", "adapters first"])
@pytest.mark.parametrize(
    "targets, options, n_fused",
    [
        (["c_attn"], {}, 1),
        (["c_attn", "wte"], {}, 1),
        (["c_attn", "lm_head"], {}, 0),
        (["c_proj"], {"modules_to_save": ["lm_head"]}, 0),
        (["c_proj"], {"modules_to_save": ["ln_f"]}, 1),
    ],
    ids=["attention", "embedding", "head", "saved head", "saved norm"],
)
def test_adapters_are_called(fused, order, targets, options, n_fused):
    plain = with_adapters(gpt2(), targets, **options).train()
    theirs, oracle = step(plain), exact_step(plain)
    model = gpt2()
    if order == "patch first":
        fastgpt.patch(model)
    model = with_adapters(model, targets, **options).train()
    if order == "adapters first":
        fastgpt.patch(model)
    got = step(model)
    assert len(fused) == n_fused and got.keys() == theirs.keys() and any("lora_A" in name for name in got)
    assert_within_rule(got, theirs, oracle)
    fastgpt.unpatch(model)
    torch.testing.assert_close(step(model), theirs)
    assert len(fused) == n_fused


# --- gradient checkpointing and torch.compile -------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_bits(use_reentrant):
    steps = []
    for checkpointed in (False, True):
        model = gpt2(dropout=0.2)
        fastgpt.patch(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(1)
        steps.append(step(model, use_cache=False))
    torch.testing.assert_close(steps[1], steps[0], rtol=0, atol=0)


def ops_in_graphs(graphs: list) -> set[str]:
    return {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}


@pytest.fixture
def compiled():
    """A function that compiles a model into one graph, without a compiler, and the graphs."""
    graphs: list = []

    def backend(module, example_inputs):
        graphs.append(module.graph)
        return module

    torch.compiler.reset()
    yield lambda model: torch.compile(model, fullgraph=True, backend=backend), graphs
    torch.compiler.reset()


def test_compiled_gpt2(compiled):
    compile_, graphs = compiled
    model = gpt2()
    model.loss_type = "ForCausalLM"  # without it, transformers logs a warning, which torch.compile does not trace
    run = compile_(lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss)
    before = run(IDS)
    assert not any("fastgpt" in name for name in ops_in_graphs(graphs))
    fastgpt.patch(model)  # what was compiled is compiled again
    eager, got = step(model), run(IDS)
    model.zero_grad(set_to_none=True)
    got.backward()
    torch.testing.assert_close(got, before)
    torch.testing.assert_close(got, eager["loss"])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, eager[name])
    if ops.explain("attention", *torch.ones(3, 1, 2, 8, 8)).backend == "native":
        found = " ".join(ops_in_graphs(graphs))
        for name in ("layer_norm", "activation", "embedding", "linear_cross_entropy"):
            assert f"fastgpt.{name}_native" in found
        # transformers makes a mask whenever it is traced, because it cannot see that a batch has no padding.
        assert "scaled_dot_product_attention" in found
    fastgpt.unpatch(model)
    torch.testing.assert_close(run(IDS), before)


def test_compiled_model_that_calls_pytorchs_attention(compiled):
    """There the calls are left alone; the layers are patched."""
    compile_, graphs = compiled
    model = OwnModel()
    fastgpt.patch(model)
    eager = own_step(model)
    torch.testing.assert_close(own_step(model, compile_(model)), eager)
    assert any("scaled_dot_product_attention" in name for name in ops_in_graphs(graphs))


# --- other models of transformers -------------------------------------------------------------------------------------


def other_model(name: str, **settings):
    transformers = pytest.importorskip("transformers", minversion="5")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "bert": (transformers.BertConfig, transformers.BertModel),
    }[name]
    return model(config(vocab_size=V, max_position_embeddings=32, **shape, **settings)).eval()


@pytest.mark.parametrize(
    "name, settings, left",
    [
        ("llama", {"num_key_value_heads": 2}, "the loss of this class is not known"),
        ("bert", {}, "word_embeddings: it has padding_idx=0"),
    ],
    ids=["llama", "bert"],
)
def test_attention_and_layers_of_other_models(monkeypatch, name, settings, left):
    taken = []
    attention = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args, **kwargs: taken.append(1) or attention(*args, **kwargs))
    model = other_model(name, **settings)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    want = [model(input_ids=IDS)[0], model(input_ids=IDS, attention_mask=mask)[0]]
    with fastgpt.patch(model) as made:
        got = [model(input_ids=IDS)[0], model(input_ids=IDS, attention_mask=mask)[0]]
        assert left in str(made) and len(taken) == 2, "with padding, PyTorch's function is called"
    torch.testing.assert_close(got, want)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_whose_attention_gives_its_weights_keeps_it():
    model = other_model("bert", attn_implementation="eager")
    with fastgpt.patch(model) as made:
        assert "its attention is 'eager'; only 'sdpa' is replaced" in str(made)
        assert model(input_ids=IDS, output_attentions=True).attentions[0].shape == (2, 4, 12, 12)
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "eager"


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_examples_of_the_page_run(tmp_path, monkeypatch, capsys, fused):
    pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).resolve().parent.parent / "docs" / "patching.md"
    report, trainer, layers = blocks("python", page.read_text(encoding="utf-8"))
    exec(report, {})
    printed = capsys.readouterr().out
    for op in ("attention", "layer_norm", "add_layer_norm", "activation", "embedding", "linear_cross_entropy"):
        assert f"ops.{op}" in printed
    exec(trainer, {})
    assert len(fused) == 2
    exec(layers, {})
    assert len(fused) == 3
