"""The compiled extension: what it says of itself, when it is loaded, and why it is missing where it is."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastgpt import doctor, ops
from fastgpt.ops import backend, native
from fastgpt.ops.backend import unavailable
from fastgpt.triton_kernels import tuned
from helpers import run_command

REASON = unavailable("native", "cpu")
built = pytest.mark.skipif(REASON is not None, reason=str(REASON))
TRITON = importlib.util.find_spec("triton")  # its wheel carries a disassembler


@built
def test_build_info() -> None:
    info = native.build_info()
    assert info["torch"].split(".")[0].isdigit() and "-O3" in info["flags"] and info["compiler"] != "unknown"
    from fastgpt import _build_info

    features = _build_info.cpu_features()
    used = native.load("cpu").instruction_set()
    assert used in ("avx512", "avx2", "generic")
    assert used == "generic" or any(feature.startswith(used) for feature in features)


@built
def test_doctor_shows_the_instruction_set() -> None:
    text = doctor.report()
    assert re.search(r"backend native: works \((avx512|avx2|generic), built by ", text), text


@built
def test_importing_fastgpt_does_not_load_the_extension() -> None:
    code = "import sys, fastgpt; assert 'fastgpt._C' not in sys.modules, 'loaded'"
    run_command(sys.executable, "-c", code, cwd=Path.cwd())


@built
def test_an_exported_program_finds_the_kernels_in_a_new_process(tmp_path: Path) -> None:
    from fastgpt import GPT, GPTConfig

    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16)).eval()
    tokens = torch.randint(11, (2, 8))
    with torch.no_grad():
        program = torch.export.export(model, (tokens, tokens))
        expected = model(tokens, tokens)
    assert {"fastgpt.embedding_native.default", "fastgpt.cross_entropy_native.default"} <= {
        str(node.target) for node in program.graph.nodes
    }
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((tokens, *expected), tmp_path / "results.pt")
    code = """
import sys, torch, fastgpt
tokens, logits, loss = torch.load("results.pt")
program = torch.export.load("program.pt2").module()
assert "fastgpt._C" not in sys.modules
found = program(tokens, tokens)
torch.testing.assert_close(found, (logits, loss))
try:
    torch.ops.fastgpt.linear_native(torch.eye(2).to_sparse(), torch.eye(2), None)
except NotImplementedError as error:
    assert "fastgpt::linear_native has no kernel for these tensors on cpu" in str(error)
else:
    raise AssertionError("a sparse tensor was taken")
"""
    run_command(sys.executable, "-c", code, cwd=tmp_path)


BACKENDS = [name for name, there in (("native", REASON is None), ("triton", TRITON is not None)) if there]
FIRST_CALLS = {
    "fake tensors": "with FakeTensorMode(): embed(torch.zeros(3, 4))",
    "default dtype": "torch.set_default_dtype(torch.float64); embed(torch.zeros(3, 4, dtype=torch.float32))",
    "trace": "graph = make_fx(embed)(torch.zeros(3, 4)); assert len(graph.graph.nodes) <= 4, graph.code",
    "gradient": "torch.func.grad(lambda table: embed(table).sum())(torch.zeros(3, 4))",
}


@pytest.mark.parametrize("context", FIRST_CALLS)
def test_where_the_first_call_is_made_does_not_decide_for_the_process(context: str) -> None:
    """Triton too, whose test launches a kernel."""
    code = f"""
import torch, fastgpt
from fastgpt import ops
from fastgpt.ops.backend import unavailable
from fastgpt.triton_kernels import tuned
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
def embed(table):
    unavailable("triton", "cpu")
    return ops.embedding(torch.zeros(1, 2, dtype=torch.int64), table)
{FIRST_CALLS[context]}
for backend in {BACKENDS}:
    assert unavailable(backend, "cpu") is None, unavailable(backend, "cpu")
"""
    run_command(sys.executable, "-c", code, cwd=Path.cwd(), TRITON_INTERPRET="1")


def test_a_missing_module_says_why(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    monkeypatch.setitem(native.MODULES, "cpu", "_not_there")
    with pytest.raises(ImportError, match="this installation was made without it"):
        native.load("cpu")
    (tmp_path / "_build_error.txt").write_text("fastgpt._not_there: tensor.h:1: error: no\n")
    with pytest.raises(ImportError, match=r"fastgpt\._not_there is not built: tensor\.h:1: error: no"):
        native.load("cpu")
    (tmp_path / "_build_error.txt").write_text("the extension: there was no torch\n")
    with pytest.raises(ImportError, match=r"fastgpt\._not_there is not built: there was no torch"):
        native.load("cpu")
    with pytest.raises(ImportError, match="no kernels for mps"):
        native.load("mps")


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ({"url": "file://{folder}", "dir_info": {}}, "'{path}'"),
        ({"url": "file://{folder}", "dir_info": {"editable": True}}, "-e '{path}'"),
        ({"url": "https://example.org/f.git", "vcs_info": {"vcs": "git"}}, "git+https://example.org/f.git"),
        ({"url": "file://{folder}/gone", "dir_info": {}}, ". in a copy of FastGPT's sources"),
        ({"url": "https://example.org/f.whl", "archive_info": {}}, ". in a copy of FastGPT's sources"),
        (None, ". in a copy of FastGPT's sources"),
    ],
)
def test_the_remedy_of_a_build_apart_from_torch_works_from_any_folder(tmp_path, monkeypatch, origin, expected) -> None:
    sources = tmp_path / "a clone"
    sources.mkdir()
    (sources / "setup.py").touch()
    info = tmp_path / "site" / "a_test-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-test\nVersion: 1\n")
    if origin is not None:
        origin = origin | {"url": origin["url"].replace("{folder}", str(sources).replace(" ", "%20"))}
        (info / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(info.parent)
    command = native.rebuild_command("a-test")
    assert command == "pip install --no-build-isolation --no-deps --force-reinstall " + expected.format(path=sources)


def _asked_twice(monkeypatch, tmp_path, error: str) -> list[str]:
    """What is said where two ops find no extension, for the reason that the installation wrote down."""
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    monkeypatch.setitem(native.MODULES, "cpu", "_not_there")
    monkeypatch.setattr(backend, "_availability", {})
    monkeypatch.setattr(backend, "_warned", set())
    (tmp_path / "_build_error.txt").write_text(f"the extension: {error}\n")
    x, ones = torch.ones(2, 64, requires_grad=True), torch.ones(64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ops.activation(x, kind="gelu")
        ops.add_layer_norm(x, x, ones)
        ops.embedding(torch.zeros(1, 2, dtype=torch.int64), x)
    return [str(warning.message) for warning in caught]


def test_a_build_apart_from_torch_is_told_once_with_the_remedy(monkeypatch, tmp_path) -> None:
    (said,) = _asked_twice(monkeypatch, tmp_path, native.BUILT_APART)
    assert said.startswith("fastgpt: the native backend does not run here: ") and native.rebuild_command() in said


def test_kernels_that_nobody_wanted_are_not_missed(monkeypatch, tmp_path) -> None:
    assert _asked_twice(monkeypatch, tmp_path, native.SWITCHED_OFF) == []
    assert "switched off" in backend.unavailable("native", "cpu")


def test_helpers_say_nothing(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "another process")
    assert _asked_twice(monkeypatch, tmp_path, native.BUILT_APART) == []


def test_the_kernels_on_a_gpu_get_the_plans_of_a_table(monkeypatch) -> None:
    origin = dict.fromkeys(("device", "driver", "torch", "triton", "date", "commit"), "a test")
    row = {
        "arch": 90,
        "kernel": "embedding",
        "element_size": 2,
        "tokens": 1024,
        "chunk": 64,
        "time_us": 1,
        "default_us": 2,
    }
    entry, given = tuned.entry_of(row | origin), []
    assert native._plan_setters.keys() == {name for name, kernel in tuned.KERNELS.items() if kernel.of_csrc}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tuned, "_followers", list(tuned._followers))
    monkeypatch.setattr(native, "_plan_setters", {"embedding": lambda device, plans: given.append((device, plans))})
    device = torch.device("cuda", 0)
    with tuned.use(tuned.Table.of(entry)):
        native.follow_table(device)
        with tuned.use(tuned.Table()):
            pass
    assert given[:3] == [(device, [(2, 1024, 64)]), (device, []), (device, [(2, 1024, 64)])]
