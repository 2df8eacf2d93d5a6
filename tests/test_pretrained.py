"""A model's folder: written and read again, and an error that names file and field where it does not fit."""

from __future__ import annotations

import json
import os
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import GPT
from fastgpt.checkpoint import CheckpointError
from pretrained_models import IDX, random_model, refuses, set_config, write_shards

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


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="cannot be written"):
        random_model().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="format: expected 'fastgpt' or 'huggingface', got 'onnx'"):
        random_model().save_pretrained(tmp_path, format="onnx")


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
    with pytest.raises(CheckpointError, match=r"gpt2: no such folder on this machine; fastgpt.load fetches"):
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
