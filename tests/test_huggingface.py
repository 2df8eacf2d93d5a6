"""Weights in and out: our folder, and GPT-2's, against the transformers library itself."""

from __future__ import annotations

import codecs
import json
import os
import shlex
import warnings

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


def write_shards(folder, model) -> dict:
    """`model` in two shards; returns the index."""
    model.save_pretrained(folder, format="huggingface")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"metadata": {"total_size": 1}, "weight_map": {name: files[i % 2] for i, name in enumerate(tensors)}}
    for file in files:
        save_file({name: t for name, t in tensors.items() if index["weight_map"][name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_bytes(codecs.BOM_UTF8 + json.dumps(index).encode())
    return index


def refuses(folder, *words: str) -> str:
    with pytest.raises(CheckpointError) as error:
        GPT.from_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message and all(word in message for word in words), message
    return message


def test_shards_that_do_not_fit_name_file_and_tensor(tmp_path):
    model = random_model()
    index = write_shards(tmp_path, model)
    assert torch.equal(GPT.from_pretrained(tmp_path)(IDX)[0], model(IDX)[0])
    path = tmp_path / "model.safetensors.index.json"

    def with_file_of_wte(file) -> None:
        changed = index["weight_map"] | {"transformer.wte.weight": file}
        path.write_text(json.dumps({"weight_map": changed}), encoding="utf-8")

    save_file({"transformer.wte.weight": torch.zeros(41, 24)}, tmp_path.parent / "outside.safetensors")
    for file in (
        "../outside.safetensors",
        str(tmp_path.parent / "outside.safetensors"),
        "..\\x.safetensors",
        "x.bin",
        3,
    ):
        with_file_of_wte(file)
        refuses(tmp_path, "index.json", "transformer.wte.weight", repr(file), "of this folder")
    with_file_of_wte(index["weight_map"]["transformer.wpe.weight"])
    refuses(tmp_path, "-of-00002.safetensors: tensor transformer.wte.weight is missing")
    with_file_of_wte("model-00003-of-00003.safetensors")
    refuses(tmp_path, "model-00003-of-00003.safetensors: no such file")
    for text in ("[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'):
        path.write_text(text, encoding="utf-8")
        refuses(tmp_path, "index.json: field 'weight_map' is missing")
    path.write_text("{", encoding="utf-8")
    refuses(tmp_path, "index.json: not JSON")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickles_are_not_read_and_the_remedy_works(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "it's a model"
    model = random_model(activation="gelu_tanh")
    model.save_pretrained(folder, format="huggingface")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / name)
    command = refuses(folder, f"{name}: is a pickle", "convert it with: ").partition("convert it with: ")[2]
    python, flag, code = shlex.split(command)
    assert (python, flag) == ("python", "-c")
    (folder / name).rename(folder / "pytorch_model.bin")
    exec(code, {})
    torch.testing.assert_close(GPT.from_pretrained(folder)(IDX)[0], model(IDX)[0])


def test_a_pointer_of_git_lfs(tmp_path):
    random_model().save_pretrained(tmp_path)
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n"
    (tmp_path / "model.safetensors").write_text(text, encoding="utf-8")
    refuses(tmp_path, "model.safetensors: not a complete", "git lfs pull")


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


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = random_model()
    for format in ("fastgpt", "huggingface"):
        model.save_pretrained(f"~/мо дель/{format}", format=format)
        assert torch.equal(GPT.from_pretrained(f"~/мо дель/{format}")(IDX)[0], model(IDX)[0])
        assert (tmp_path / "мо дель" / format / "config.json").is_file()


@pytest.mark.skipif(os.name != "posix", reason="needs a umask")
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        random_model().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o666 & ~umask}


class Adapter(torch.nn.Module):
    """A linear with a correction of low rank beside it."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.a, self.b = (torch.nn.Parameter(torch.zeros(n, 2)) for n in linear.weight.shape)

    def forward(self, x):
        return self.linear(x) + x @ self.b @ self.a.t()


@pytest.mark.parametrize("format", ["fastgpt", "huggingface"])
def test_a_model_that_was_changed_is_not_written_wrong(tmp_path, format):
    model = random_model()
    up = model.blocks[1].mlp.up
    model.blocks[1].mlp.up = Adapter(up)
    with pytest.raises(ValueError, match=r"model: parameter blocks.1.mlp.up.a is not part of .*merge adapters"):
        model.save_pretrained(tmp_path, format=format)
    torch.nn.utils.parametrizations.weight_norm(up)
    model.blocks[1].mlp.up = up
    with pytest.raises(ValueError, match=r"model: parameter blocks.1.mlp.up.parametrizations.*remove parametrizations"):
        model.save_pretrained(tmp_path, format=format)
    assert list(tmp_path.iterdir()) == []
    torch.nn.utils.parametrize.remove_parametrizations(up, "weight")
    model.save_pretrained(tmp_path, format=format)
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(IDX)[0], model(IDX)[0])


@pytest.mark.parametrize("format", ["fastgpt", "huggingface"])
def test_a_bfloat16_model_is_written_as_such(tmp_path, format):
    random_model(bias=False).to(torch.bfloat16).save_pretrained(tmp_path, format=format)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


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
    with pytest.raises(CheckpointError, match=r"holds neither a model's config\.json nor a run's checkpoint/"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="gpt2: no such folder; only folders on this machine are read"):
        GPT.from_pretrained("gpt2")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: "):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").rmdir()
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


@pytest.mark.parametrize("field", ["vocab_size", "n_positions"])
@pytest.mark.parametrize("number", [10**30, 2**31, 2**31 - 1])
def test_numbers_that_no_memory_holds_are_refused_before_it_is_asked_for(tmp_path, field, number):
    random_model(activation="gelu_tanh").save_pretrained(tmp_path, format="huggingface")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: number}))
    with pytest.raises(CheckpointError, match=f"^{tmp_path}.*({field}|block_size|embedding)") as raised:
        GPT.from_pretrained(tmp_path)
    assert str(number) in str(raised.value) and "\n" not in str(raised.value)


def test_a_config_of_brackets_alone(tmp_path):
    random_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        GPT.from_pretrained(tmp_path)
