"""Weights in and out of GPT-2's format, against the transformers library itself."""

from __future__ import annotations

import codecs
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import GPT
from pretrained_models import IDX, random_model, refuses, set_config

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


def same_as_transformers(folder, **changes) -> GPT:
    """Load `folder` with both libraries and compare the logits; ours is returned."""
    transformers = pytest.importorskip("transformers", minversion="5")  # 4 tied a head of its own without a word
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    ours = GPT.from_pretrained(folder, **changes)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDX)[0], theirs(IDX).logits, rtol=1e-4, atol=1e-4)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_shards_that_transformers_writes(tmp_path, dtype):
    transformers = pytest.importorskip("transformers")
    random_model(activation="gelu_tanh").save_pretrained(tmp_path / "whole", format="huggingface")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "whole").to(dtype)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    ours = same_as_transformers(tmp_path / "shards")
    assert all(p.dtype == torch.float32 for p in ours.parameters())


def test_marks_and_fields_as_the_hub_has_them(tmp_path):
    """No model_type, fields under their common names, many others, a byte order mark."""
    model = random_model(activation="gelu_tanh")
    model.save_pretrained(tmp_path, format="huggingface")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["model_type"], config["activation_function"], config["tie_word_embeddings"]
    config |= {"n_inner": None, "n_ctx": 7, "task_specific_params": {"text-generation": {"max_length": 50}}}
    config |= {"summary_type": "cls_index", "reorder_and_upcast_attn": False, "torch_dtype": "float16"}
    path.write_bytes(codecs.BOM_UTF8 + json.dumps(config).encode())
    assert torch.equal(GPT.from_pretrained(tmp_path)(IDX)[0], model(IDX)[0])
    names = {"hidden_size": "n_embd", "max_position_embeddings": "n_positions"}
    names |= {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
    config = {"model_type": "gpt2", **config} | {name: config.pop(theirs) for name, theirs in names.items()}
    path.write_text(json.dumps(config), encoding="utf-8")
    ours = same_as_transformers(tmp_path)
    assert torch.equal(ours(IDX)[0], model(IDX)[0])


@pytest.mark.parametrize(
    "name", ["gelu_python", "gelu_python_tanh", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "relu2"]
)
def test_activations_under_other_names(tmp_path, name):
    random_model().save_pretrained(tmp_path, format="huggingface")
    set_config(tmp_path, activation_function=name)
    same_as_transformers(tmp_path)


def test_dropouts_as_transformers_reads_them(tmp_path):
    random_model().save_pretrained(tmp_path, format="huggingface")
    set_config(tmp_path, resid_pdrop="delete", embd_pdrop="delete", attn_pdrop="delete")
    assert same_as_transformers(tmp_path).cfg.dropout == 0.1
    set_config(tmp_path, resid_pdrop=0)
    with pytest.warns(UserWarning, match="embd_pdrop and attn_pdrop differ.*it is 0.0") as said:
        assert GPT.from_pretrained(tmp_path).cfg.dropout == 0.0
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GPT.from_pretrained(tmp_path, dropout=0.3).cfg.dropout == 0.3


NULLS = ["n_embd", "n_layer", "activation_function", "resid_pdrop", "embd_pdrop", "attn_pdrop", "layer_norm_epsilon"]


@pytest.mark.parametrize("name", [*NULLS, "scale_attn_weights", "scale_attn_by_inverse_layer_idx"])
def test_null_where_transformers_takes_none(tmp_path, name):
    random_model().save_pretrained(tmp_path, format="huggingface")
    set_config(tmp_path, **{name: None})
    refuses(tmp_path, f"config.json: {name}: expected ", "got None")


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("declared", [None, True, "delete", False])
def test_tied_as_transformers_reads_it(tmp_path, declared, own_head):
    """null leaves it to the file: transformers 4 read it as false, 5 refuses it."""
    untied = own_head or declared is False
    model = random_model(tie_weights=not untied)
    model.save_pretrained(tmp_path, format="huggingface")
    set_config(tmp_path, tie_word_embeddings=declared)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = GPT.from_pretrained(tmp_path)
        if declared is not None:
            same_as_transformers(tmp_path)
    assert ours.cfg.tie_weights is not untied
    assert torch.equal(ours(IDX)[0], model(IDX)[0])
    told = [str(w.message) for w in said if "lm_head.weight differs" in str(w.message)]
    assert len(told) == (2 if own_head and declared in (True, "delete") else 0)


def test_a_head_that_is_a_copy_or_stands_for_the_embedding(tmp_path):
    """vllm-project/vllm#6758: both were in the file; huggingface/transformers#38870: the embedding was not."""
    model = random_model()
    model.save_pretrained(tmp_path, format="huggingface")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}, path, {"format": "pt"})
    assert same_as_transformers(tmp_path).cfg.tie_weights
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, path, {"format": "pt"})
    assert same_as_transformers(tmp_path).cfg.tie_weights


def test_quantised_weights_are_refused(tmp_path):
    random_model().save_pretrained(tmp_path, format="huggingface")
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"transformer.wpe.weight": torch.zeros(16, 24, dtype=torch.int8)}, path)
    refuses(tmp_path, "transformer.wpe.weight holds torch.int8")


@pytest.mark.parametrize(
    "options",
    [{"norm": "post"}, {"residual": False}, {"is_causal": False}, {"feed_forward": False}, {"activation": "relu2"}],
    ids=str,
)
def test_models_gpt2_cannot_express_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=f"GPT-2 .*{next(iter(options))}"):
        random_model(**options).save_pretrained(tmp_path, format="huggingface")
    assert list(tmp_path.iterdir()) == []
