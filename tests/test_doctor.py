"""`fastgpt doctor` on machines that are not at hand: which device and dtype training takes there, and why."""

import contextlib

import pytest
import torch

from fastgpt import doctor
from fastgpt.ops import native
from fastgpt.ops.backend import OPS
from fastgpt.triton_kernels import tuned


@pytest.fixture
def elsewhere(monkeypatch):
    """Make this machine answer as another one, whose tensors are shapes alone; gives a function that says which."""
    example_call = doctor.example_call
    monkeypatch.setattr(
        doctor, "example_call", lambda op, device: example_call(op, "cpu" if device == "cpu" else "meta")
    )
    monkeypatch.setattr(doctor, "unavailable", lambda backend, device: None if backend == "torch" else "not tried")
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")

    def answer(cuda: bool = False, mps: bool = False, capability: tuple[int, int] = (0, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: cuda and (including_emulation or capability >= (8, 0)),
        )

    return answer


def test_each_fact_has_a_line():
    lines = doctor.report().partition("\n\n")[0].splitlines()
    assert all(": " in line for line in lines)
    names = [line.partition(":")[0] for line in lines]
    assert names[:3] == ["fastgpt", "Python", "system"] and set(doctor.PACKAGES) < set(names)
    assert any(line.startswith("load: ") for line in lines)
    assert f"threads: {torch.get_num_threads()}" in lines and f"torch: {torch.__version__}" in lines


def test_a_gpu_without_bfloat16(elsewhere):
    elsewhere(cuda=True, capability=(7, 5))
    text = doctor.report()
    assert "\nGPU: a GPU\nGPU architecture: sm_75\nCUDA of this PyTorch: " in text
    assert "\n--device auto: cuda\n--dtype auto: float16 (this GPU emulates bfloat16)\n" in text
    assert "\nOn cuda:\n" in text


def test_a_gpu_with_bfloat16(elsewhere):
    elsewhere(cuda=True, capability=(9, 0))
    assert "\n--device auto: cuda\n--dtype auto: bfloat16 (this GPU has it)\n" in doctor.report()


def test_whether_training_by_a_graph_works(elsewhere, monkeypatch):
    elsewhere(cuda=True, capability=(9, 0))
    for answer, said in (
        (lambda device: None, "works: for a small model it gave what training without it gives"),
        (lambda device: "the loss differs", "does not work here: the loss differs"),
        (lambda device: int("no number"), "does not work here: invalid literal for int() with base 10: 'no number'"),
    ):
        monkeypatch.setattr(doctor.graph, "try_out", answer)
        assert f"\n--cuda-graph: {said}\n" in doctor.report()


def test_which_tuned_table_is_in_use(elsewhere, monkeypatch, tmp_path):
    def said():
        return next(line for line in doctor.report().splitlines() if line.startswith("tuned table: "))

    elsewhere(cuda=True, capability=(9, 0))
    with tuned.use(tuned.Table()):
        assert said() == "tuned table: none; entries: 0, 0 for sm_90"
    elsewhere()
    assert "tuned.toml" in said() and said().endswith("no GPU here")
    monkeypatch.setenv("FASTGPT_TUNED", str(tmp_path / "nowhere.toml"))
    monkeypatch.setattr(tuned, "_in_use", None)
    assert "cannot be used: FASTGPT_TUNED: there is no file" in said()


def test_a_mac(elsewhere):
    elsewhere(mps=True)
    text = doctor.report()
    assert "\n--cuda-graph: needs a CUDA device\n" in text
    assert "\n--device auto: mps\n--dtype auto: float32 (half precision is the default on CUDA alone)\n" in text
    on_mps = text.partition("\nOn mps:\n")[2]
    for op in OPS:
        assert f"  {op}: runs on torch\n" in on_mps
    assert "  backend torch: works\n  backend triton: does not work here: not tried\n" in on_mps


def test_a_machine_without_a_gpu(elsewhere):
    elsewhere()
    text = doctor.report()
    assert "\nGPU: none that this PyTorch can use\n--device auto: cpu\n--dtype auto: float32 (" in text
    assert "matrix products: by PyTorch's library, because the native backend does not work here" in text
    assert "\nOn cpu:\n" in text and "\nOn cuda:\n" not in text and "\nOn mps:\n" not in text
    nothing = "\n--self-test: has nothing to do, because there is no CUDA device here\n"
    assert nothing in doctor.report(run_self_tests=True) and nothing not in text


@pytest.mark.parametrize("maker", ["amd", "intel", "other"])
def test_whose_matrix_products_run(maker, monkeypatch):
    """On processors where ours were not measured to be faster, the library is taken, and the report says so."""
    monkeypatch.setattr(native, "cpu_maker", lambda: maker)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    if native.load("cpu").instruction_set() == "generic":
        pytest.skip("no kernel of ours was measured with these instructions")
    lines = doctor.report().splitlines()
    assert f"  maker of the processor: {maker}" in lines
    products = [line for line in lines if line.startswith("  matrix products of")]
    assert len(products) == 4
    for line in products:
        assert ("the extension" in line) == (maker == "amd")
        assert (f"this one's maker: {maker}" in line) == (maker != "amd")
