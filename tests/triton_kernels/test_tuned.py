"""Tuned tables: what a file may say, which calls an entry serves, and that the launchers follow it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt import ops
from fastgpt.triton_kernels import tuned
from fastgpt.triton_kernels.tuned import KERNELS, Table, TableError, entry_of, read

configs = pytest.importorskip("fastgpt.triton_kernels.attention_configs")
attention = pytest.importorskip("fastgpt.triton_kernels.attention")
layer_norm = pytest.importorskip("fastgpt.triton_kernels.layer_norm")

ORIGIN = {
    "time_us": 10.0,
    "default_us": 12,
    **dict.fromkeys(("device", "driver", "torch", "triton", "commit"), "a test"),
    "date": "2026-01-01",
}
COMPILED = {"registers": 128, "shared_bytes": 65536}
TILED = {"head_size": 64, "element_size": 2, "longest": 1024, "descriptors": True, "dropout": False}
TILE = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
ROWS = {
    "attention.forward": TILED | TILE | {"persistent": 1},
    "attention.grad_q": TILED | TILE,
    "attention.grad_kv": TILED | TILE | {"group": 1},
    "attention.decode": {"head_size": 64, "element_size": 2, "n_rows": 16}
    | {"BLOCK_N": 32, "num_warps": 2, "num_stages": 3, "programs": 1},
    "layer_norm.forward": {"width": 1024, "ROWS": 2, "num_warps": 2},
    "layer_norm.backward": {"width": 1024, "ROWS": 4, "STAGES": 1, "num_warps": 8, "programs": 1},
    "cross_entropy": {"element_size": 2, "passes": 2, "classes": 65536, "threads": 256, "blocks": 2},
    "embedding": {"element_size": 2, "tokens": 16384, "chunk": 64},
}
COMPILED_HERE = [kernel for kernel in KERNELS if not KERNELS[kernel].of_csrc]


def row(kernel: str, /, **changes) -> dict:
    """A valid row; a change of None takes the key out."""
    compiled = COMPILED if kernel in COMPILED_HERE else {}
    found = {"arch": 90, "kernel": kernel} | ROWS[kernel] | compiled | ORIGIN | changes
    return {key: value for key, value in found.items() if value is not None}


def table_of(*rows: dict) -> Table:
    return Table.of(*map(entry_of, rows))


def write(path: Path, *rows: dict) -> Path:
    import tomli_w

    path.write_text(tomli_w.dumps({"entry": list(rows)}), encoding="utf-8")
    return path


def test_every_kernel_of_a_table_has_a_row_here():
    assert ROWS.keys() == KERNELS.keys()
    for kernel in ROWS:
        assert entry_of(row(kernel)).row() == row(kernel)


def test_the_committed_tables_can_be_read_and_name_a_device_that_was_measured():
    table = read(*tuned.named_files())
    assert tuned.DEFAULT in table.files
    assert not [e for e in table.entries.values() if e.facts["device"] == tuned.MADE_UP]


REFUSED = {
    "unknown key": ({"BLOCK_K": 32}, "BLOCK_K: attention.forward has no such key"),
    "a key of another kernel": ({"ROWS": 4}, "ROWS: attention.forward has no such key"),
    "missing key": ({"num_warps": None}, "num_warps: is missing; expected a power of two from 1 to 32"),
    "missing origin": ({"device": None}, "device: is missing"),
    "wrong type": ({"BLOCK_M": "64"}, "BLOCK_M: expected a power of two from 16 to 256, got '64'"),
    "a flag for a number": ({"num_stages": True}, "num_stages: expected an integer from 1 to 8, got True"),
    "a number for a flag": ({"dropout": 0}, "dropout: expected true or false, got 0"),
    "a fraction": ({"BLOCK_N": 64.0}, "BLOCK_N: expected a power of two"),
    "not a power of two": ({"BLOCK_M": 96}, "BLOCK_M: expected a power of two from 16 to 256, got 96"),
    "not a bucket": ({"longest": 1000}, "longest: expected a power of two"),
    "warps out of range": ({"num_warps": 64}, "num_warps: expected a power of two from 1 to 32, got 64"),
    "unknown kernel": ({"kernel": "attention.backward"}, "kernel: expected one of attention.forward"),
    "unknown architecture": ({"arch": 91}, "arch: expected one of 80"),
    "no time": ({"time_us": 0.0}, "time_us: expected a number above 0, got 0.0"),
    "empty text": ({"commit": " "}, "commit: expected a text that is not empty"),
    "shared memory": (
        {"shared_bytes": 232449},
        "shared_bytes: 232449 are more than the 232448 that a program may have",
    ),
    "shared memory of a smaller chip": ({"arch": 86, "shared_bytes": 101377}, "more than the 101376"),
    "tiles beyond shared memory": (
        {"BLOCK_N": 256, "num_stages": 8},
        "BLOCK_N: tiles of 256 rows in 8 stages take at least 458752 bytes",
    ),
    "registers": ({"registers": 255, "num_warps": 16}, "registers: 255 for each of 512 threads"),
}


REFUSED_PLANS = {
    "no such chunk": ("embedding", {"chunk": 60}, "chunk: expected a multiple of 8 from 8 to 128, got 60"),
    "figures of a compiler": ("embedding", {"registers": 64}, "registers: embedding has no such key"),
    "no such cluster": ("cross_entropy", {"blocks": 16}, "blocks: expected 0, 1, 2, 4 or 8, got 16"),
    "kept for one pass": ("cross_entropy", {"passes": 1}, "blocks: a row that is read once is not kept"),
    "a chip without clusters": ("cross_entropy", {"arch": 80}, "blocks: clusters of 2 need sm_90 or newer"),
    "few threads": ("cross_entropy", {"threads": 128}, "blocks: clusters of 2 need sm_90 or newer, and 256 threads"),
    "a long row in registers": ("cross_entropy", {"threads": 32, "blocks": 1}, "threads: fewer than 128 are 32"),
    "a row beyond shared memory": (
        "cross_entropy",
        {"element_size": 4, "blocks": 1},
        "blocks: 262144 bytes of a row for each of 1 blocks are more than the 231424",
    ),
}


@pytest.mark.parametrize("name", REFUSED_PLANS)
def test_a_plan_that_does_not_fit_is_refused(name):
    kernel, changes, reason = REFUSED_PLANS[name]
    with pytest.raises(TableError) as error:
        entry_of(row(kernel, **changes))
    assert str(error.value).startswith(reason)


def test_plans_are_numbers_in_the_order_that_the_kernels_take():
    rows = [row("cross_entropy"), row("cross_entropy", arch=100), row("embedding"), row("layer_norm.forward")]
    with tuned.use(table_of(*rows)):
        assert tuned.plans("cross_entropy", 90) == [(2, 2, 65536, 256, 2)]
        assert tuned.plans("embedding", 90) == [(2, 16384, 64)] and tuned.plans("embedding", 80) == []


@pytest.mark.parametrize("name", REFUSED)
def test_an_entry_that_does_not_fit_is_refused_with_file_entry_and_reason(name, tmp_path):
    changes, reason = REFUSED[name]
    file = write(tmp_path / "tuned.toml", row("layer_norm.forward"), row("attention.forward", **changes))
    with pytest.raises(TableError) as error:
        read(file)
    kernel = changes.get("kernel", "attention.forward")
    assert str(error.value).startswith(f"{file}: entry 2 ({kernel}): ") and reason in str(error.value)


def test_files_that_are_no_tables_are_refused(tmp_path):
    twice = write(tmp_path / "twice.toml", row("attention.grad_q"), row("attention.grad_q", BLOCK_M=128))
    with pytest.raises(TableError, match=r"twice.toml: entry 2 \(attention.grad_q\): another entry before it"):
        read(twice)
    for text, reason in (
        ("[[entry]\n", "cannot be read"),
        ("[entry]\narch = 90\n", "begin with"),
        ("[[row]]\n", "row"),
        ("[[entry]]\n", r"entry 1 \(of no kernel\): arch"),
    ):
        file = tmp_path / "broken.toml"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(TableError, match=reason) as error:
            read(file)
        assert str(file) in str(error.value)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(TableError, match="cannot be read"):
        read(tmp_path / "bytes.toml")


def test_a_missing_table_is_no_error_unless_it_was_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "DEFAULT", tmp_path / "none.toml")
    assert tuned.named_files() == () and read().entries == {}
    named = tmp_path / "mine.toml"
    monkeypatch.setenv("FASTGPT_TUNED", str(named))
    with pytest.raises(TableError, match=r"FASTGPT_TUNED: there is no file .*mine.toml; name a table"):
        tuned.named_files()
    write(named)
    assert tuned.named_files() == (named,)
    beside = write(tmp_path / "mine_cuda.toml")
    assert tuned.named_files() == (named, beside)


def test_a_table_is_read_once_and_a_bad_one_reaches_the_caller(tmp_path):
    """In a process of its own: this one has read its table."""
    file = write(tmp_path / "tuned.toml", row("layer_norm.forward"))
    code = """
from fastgpt.triton_kernels import tuned
import sys
assert not {"torch", "triton"} & set(sys.modules)
print(tuned.describe(90))
from fastgpt.triton_kernels import layer_norm
print(layer_norm.forward_config(768, 90)["ROWS"], layer_norm.forward_config(4096, 90)["ROWS"])
open(tuned.named_files()[0], "w").write("[[entry]]")
layer_norm.forward_config(100, 90)
"""
    environment = os.environ | {"FASTGPT_TUNED": str(file)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"tuned table: {file}; entries: 1, 1 for sm_90", "2 1"]
    code = "import torch; from fastgpt import ops; print(ops.explain('layer_norm', torch.ones(2), torch.ones(2)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert f"{file}: entry 1 (of no kernel): arch: expected one of 80" in done.stdout, done.stderr


def test_the_table_of_a_rehearsal_is_not_followed(tmp_path, monkeypatch):
    file = write(tmp_path / "tuned.toml", row("layer_norm.forward"), row("layer_norm.backward", device=tuned.MADE_UP))
    monkeypatch.setenv("FASTGPT_TUNED", str(file))
    monkeypatch.setattr(tuned, "_in_use", None)
    with pytest.raises(TableError, match=r"tuned.toml: a rehearsal wrote this table, and its times are made up"):
        tuned.table()
    assert "cannot be used: " in tuned.describe(90)


def test_the_description_says_what_is_in_use(monkeypatch, tmp_path):
    with tuned.use(table_of(row("attention.forward"), row("attention.grad_q", arch=80))):
        assert tuned.describe(90) == "tuned table: none; entries: 2, 1 for sm_90"
        assert tuned.describe(None).endswith("entries: 2, no GPU here")
    monkeypatch.setenv("FASTGPT_TUNED", str(tmp_path / "nowhere.toml"))
    monkeypatch.setattr(tuned, "_in_use", None)
    assert "cannot be used: FASTGPT_TUNED" in tuned.describe(90)


def test_an_entry_serves_its_bucket_and_no_other_call():
    forward = (64, 2, 1024, True, False, 90)
    with tuned.use(Table()):
        default = configs.forward_config(*forward)
    with tuned.use(table_of(row("attention.forward"))):
        assert configs.forward_config(*forward) == default | TILE
        assert configs.forward_programs(*forward) == 1
        assert configs.forward_config(33, 2, 513, True, False, 90) == default | TILE
        for other in (
            (64, 2, 512, True, False, 90), (64, 2, 1025, True, False, 90), (64, 2, 1024, False, False, 90),
            (64, 2, 1024, True, True, 90), (64, 2, 1024, True, False, 100), (128, 2, 1024, True, False, 90),
        ):  # fmt: skip
            chosen = configs.forward_config(*other), configs.forward_programs(*other)
            with tuned.use(Table()):
                assert chosen == (configs.forward_config(*other), configs.forward_programs(*other))
    with tuned.use(Table()):
        assert configs.forward_config(*forward) == default and configs.forward_programs(*forward) == 2


def test_a_table_that_a_chip_refuses_does_not_stay(monkeypatch):
    refused, before = table_of(row("attention.forward")), tuned.table()

    def follow():
        if tuned.table() is refused:
            raise RuntimeError("this device has no such clusters")

    monkeypatch.setattr(tuned, "_followers", [follow])
    with pytest.raises(RuntimeError, match="no such clusters"), tuned.use(refused):
        pass
    assert tuned.table() is before


def test_every_choice_reaches_its_configuration():
    calls = {
        "attention.forward": (configs.forward_config, configs.forward_programs, (64, 2, 1000, True, False, 90)),
        "attention.grad_q": (configs.grad_q_config, None, (64, 2, 1000, True, False, 90)),
        "attention.grad_kv": (configs.grad_kv_config, None, (64, 2, 1000, True, False, 1, 90)),
        "attention.decode": (configs.decode_config, configs.decode_programs, (64, 2, 12, 90)),
        "layer_norm.forward": (layer_norm.forward_config, None, (768, 90)),
        "layer_norm.backward": (layer_norm.backward_config, layer_norm.backward_programs, (768, 90)),
    }
    assert list(calls) == COMPILED_HERE
    with tuned.use(table_of(*map(row, COMPILED_HERE))):
        for kernel, (config, programs, call) in calls.items():
            chosen = dict(config(*call))
            if programs is not None:
                chosen["persistent" if kernel == "attention.forward" else "programs"] = programs(*call)
            assert {key: chosen[key] for key in KERNELS[kernel].choices} == entry_of(row(kernel)).choices
            with tuned.use(Table()):  # nothing but the choices differs, and the launcher takes all of them
                assert chosen.keys() - {"persistent", "programs"} == config(*call).keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the table is for the interpreter, which counts as sm_90")
def test_the_launchers_follow_a_table():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 300, 16, dtype=torch.float16).requires_grad_()
    shape = {"head_size": 16, "longest": 512}
    rows = [row(kernel, **shape) for kernel in ("attention.forward", "attention.grad_q", "attention.grad_kv")]
    x, weight = torch.randn(50, 100), torch.ones(100, requires_grad=True)
    rows += [row("layer_norm.forward", width=128), row("layer_norm.backward", width=128)]
    with tuned.use(Table()):
        expected = ops.attention(q, k, v, backend="triton")
        expected_grads = torch.autograd.grad(expected.float().sum(), (q, k, v))
        expected_y = ops.layer_norm(x, weight, backend="triton")
        (expected_grad,) = torch.autograd.grad(expected_y.sum(), weight)
    launched = []

    def record(kernel):
        class Recorder:
            def __getitem__(self, grid):
                return lambda *args, **kwargs: (launched.append((grid, kwargs)), kernel[grid](*args, **kwargs))

        return Recorder()

    with pytest.MonkeyPatch.context() as patch, tuned.use(table_of(*rows)):
        for module, name in (
            (attention, "forward_kernel"), (attention, "grad_q_kernel"), (attention, "grad_kv_kernel"),
            (layer_norm, "forward_kernel"), (layer_norm, "backward_kernel"),
        ):  # fmt: skip
            patch.setattr(module, name, record(getattr(module, name)))
        out = ops.attention(q, k, v, backend="triton")
        grads = torch.autograd.grad(out.float().sum(), (q, k, v))
        y = ops.layer_norm(x, weight, backend="triton")
        (grad_weight,) = torch.autograd.grad(y.sum(), weight)
    assert [kwargs["num_warps"] for _, kwargs in launched] == [4, 4, 4, 2, 8]
    assert [grid for grid, _ in launched][3:] == [(25,), (2,)]
    assert all(kwargs["BLOCK_M"] == 64 and kwargs["BLOCK_N"] == 32 for _, kwargs in launched[:3])
    for ours, theirs in zip(
        (out, *grads, y, grad_weight), (expected, *expected_grads, expected_y, expected_grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=4e-3, rtol=2e-3)
