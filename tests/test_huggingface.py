"""Weights in and out: our folder, and GPT-2's, against the transformers library itself."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import GPT, GPTConfig
from fastgpt.checkpoint import CheckpointError

SHAPE = {"vocab_size": 41, "block_size": 16, "n_layer": 2, "n_head": 3, "n_embd": 24, "dropout": 0.0}


def random_model(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


IDX = torch.randint(41, (2, 16), generator=torch.Generator().manual_seed(1))

OPTIONS = [
    {},
    {"norm": "post", "residual": False, "activation": "relu2"},
    {"norm": "none", "is_causal": False, "tie_weights": False, "bias": False},
    {"feed_forward": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_own_format_round_trip(tmp_path, options):
    model = random_model(**options)
    model.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert not loaded.training, "as Hugging Face's"
    assert loaded.cfg == model.cfg
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(loaded.eval()(IDX)[0], model(IDX)[0])


HF_OPTIONS = [{"activation": a} for a in ("gelu", "gelu_tanh", "relu")] + [{"bias": False}, {"tie_weights": False}]


@pytest.mark.parametrize("options", HF_OPTIONS, ids=str)
def test_transformers_reads_what_we_write(tmp_path, options):
    transformers = pytest.importorskip("transformers")
    model = random_model(**options)
    model.save_pretrained(tmp_path, format="huggingface")
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(IDX).logits, model(IDX)[0], rtol=1e-4, atol=1e-4)
    back = GPT.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(back(IDX)[0], model(IDX)[0])


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_we_read_what_transformers_writes(tmp_path, activation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=41, n_positions=16, n_embd=24, n_layer=2, n_head=3, activation_function=activation
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path, dropout=0.0)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDX)[0], theirs(IDX).logits, rtol=1e-4, atol=1e-4)
    prompt = IDX[:, :4]
    expected = theirs.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ours.generate(prompt, 8, temperature=0.0), expected)


def test_files_without_the_prefix_and_with_mask_buffers_are_read(tmp_path):
    """The files of the first GPT-2 upload: names without "transformer.", and the causal mask among the tensors."""
    model = random_model()
    model.save_pretrained(tmp_path, format="huggingface")
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
    save_file(tensors, path)
    assert torch.equal(GPT.from_pretrained(tmp_path).eval()(IDX)[0], model(IDX)[0])


@pytest.mark.parametrize(
    "options",
    [{"norm": "post"}, {"residual": False}, {"is_causal": False}, {"feed_forward": False}, {"activation": "relu2"}],
    ids=str,
)
def test_models_gpt2_cannot_express_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=f"GPT-2 .*{next(iter(options))}"):
        random_model(**options).save_pretrained(tmp_path, format="huggingface")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="cannot be written"):
        random_model().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="format: expected 'fastgpt' or 'huggingface', got 'onnx'"):
        random_model().save_pretrained(tmp_path, format="onnx")


def set_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "delete"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "field 'model_type' is 'llama'"),
        ({"activation_function": "silu"}, "field 'activation_function' is 'silu'"),
        ({"n_inner": 5}, "field 'n_inner' is 5"),
        ({"layer_norm_epsilon": 1e-3}, "field 'layer_norm_epsilon'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "field 'scale_attn_by_inverse_layer_idx'"),
        ({"n_head": "delete"}, "field 'n_head' is missing"),
        ({"n_head": 5}, "n_embd: expected a multiple of n_head=5"),
        ({"vocab_size": 40}, r"tensor model.token_embedding.weight has shape \(41, 24\), the model has \(40, 24\)"),
        ({"n_layer": 3}, "tensor transformer.h.2.ln_1.weight is missing"),
        ({"n_layer": 1}, "tensor .*h.1"),
    ],
    ids=str,
)
def test_folders_that_do_not_fit_name_file_and_field(tmp_path, changes, message):
    random_model().save_pretrained(tmp_path, format="huggingface")
    set_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        GPT.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(CheckpointError, match="gpt2: no such folder; only folders on this machine are read"):
        GPT.from_pretrained("gpt2")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="field 'model_type' is None"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        GPT.from_pretrained(tmp_path)
    random_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        GPT.from_pretrained(tmp_path)
    set_config(tmp_path, n_heads=3)
    with pytest.raises(CheckpointError, match="n_heads"):
        GPT.from_pretrained(tmp_path)
