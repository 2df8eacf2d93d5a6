"""Exports: a model's folder in a format that needs no FastGPT, each run and compared with the model once it is written.

`onnx` and `torch` hold the graph of plain_graph.py. `huggingface` holds tensors alone, which transformers' own GPT-2
computes with, and `fastgpt` is our own folder (pretrained.py); neither of these two holds code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .files import FileError, expand_path, new_folder
from .language_model import LanguageModel
from .model import GPT
from .ops.accuracy import max_error
from .plain_graph import longest_text, traced
from .settings import check_export_format
from .tokenizer_files import write_tokenizer

ONNX_OPSET = 20  # the first with GELU
# The most by which a logit may differ, times the largest logit where that is above 1. In float32 the sums of two
# programs differ by a hundredth of this; another formula of GELU, or a mask at a wrong place, by more.
BOUND = 1e-4


class ExportError(RuntimeError):
    """An export that cannot be made: PyTorch cannot trace the model, or what was written computes something else."""


class Check(NamedTuple):
    """How an export was compared with its model: all logits of random tokens, for each (B, T) of `sizes`."""

    sizes: tuple[tuple[int, int], ...]
    difference: float  # the largest of a logit
    bound: float  # what it may be at most

    def __str__(self) -> str:
        return (
            f"compared with the model at (B, T) = {', '.join(map(str, self.sizes))}: no logit differs by more than "
            f"{self.difference:.2g}; allowed is {self.bound:.2g}"
        )


def export(model: LanguageModel, directory: str | Path, format: str) -> Check | None:
    """Write `model` into a new folder that can be used without FastGPT, and compare what it computes with the model.

    Args:
        model: in evaluation mode, with float32 parameters on the CPU; its tokenizer, where it has one, goes along.
        directory: a folder that does not exist, or is empty; it is written as a whole or not at all.
        format: "onnx", of standard operations; "torch", a program for torch.export.load; both of any model and of any
            B >= 1 and T, at most block_size where the model has positions. "huggingface" or "fastgpt", of a GPT.

    Returns the comparison; None where the package that runs the format, transformers, is not installed.
    Raises ValueError naming the argument, ImportError for a package that the format needs, ExportError where no export
    can be made, FileError where it cannot be written.
    """
    check_export_format(format)
    check_model(model, format)
    with new_folder(expand_path(directory)) as folder:
        return write(model, folder, format)


def check_model(model: LanguageModel, format: str) -> None:
    """Raises ValueError for a model that `export` does not take."""
    if not isinstance(model, LanguageModel):
        raise TypeError(f"model: expected a model of fastgpt, got {type(model).__name__}")
    if format in ("fastgpt", "huggingface") and not isinstance(model, GPT):
        raise ValueError(
            f"model: is a {model.kind}, and only a gpt can be exported as {format}; onnx and torch take any"
        )
    if model.training:
        raise ValueError("model: is in training mode, where it drops out; call model.eval() first")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            found = f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"
            raise ValueError(f"model: {name} is {found}; an export is made of float32 on the CPU: model.float().cpu()")


def write(model: LanguageModel, folder: Path, format: str) -> Check | None:
    """`export` into a folder that is there, where nothing was checked beforehand and nothing is undone."""
    if format in _GRAPHS:
        file, write_graph = _GRAPHS[format]
        write_graph(_trace(model, format), folder / file)
        _write_config(model, folder, format)
        if model.tokenizer is not None:
            write_tokenizer(folder, model.tokenizer, model.cfg.block_size)
    else:
        assert isinstance(model, GPT)
        model.save_pretrained(folder, format)
    run = _RUNNERS[format](folder)
    return None if run is None else _compare(run, model, format)


# --- writing ----------------------------------------------------------------------------------------------------------


def _trace(model: LanguageModel, format: str) -> ExportedProgram:
    try:
        with _quiet():
            return traced(model)
    except Exception as error:  # PyTorch has many kinds, which share no class
        raise _not_made(format, error) from error


def _not_made(format: str, error: Exception) -> ExportError:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return ExportError(f"format: PyTorch cannot export this model as {format}: {type(error).__name__}: {first_line}")


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    """Weights of more than about 1.5 GB go into a second file, model.onnx.data: one of ONNX's holds less than 2 GB."""
    names: dict[str, Any] = {"input_names": ["idx"], "output_names": ["logits"]}
    with _quiet():
        try:
            made = torch.onnx.export(program, dynamo=True, opset_version=ONNX_OPSET, verbose=False, **names)
            assert made is not None
            sizes: Any = made.model.graph.inputs[0].shape
            made.rename_axes({size: axis for size, axis in zip(sizes, "BT", strict=True) if not isinstance(size, int)})
        except Exception as error:
            raise _not_made("onnx", error) from error
        with _writing(path):
            made.save(path)


def _write_torch(program: ExportedProgram, path: Path) -> None:
    with _writing(path), _Patient(io.FileIO(path, "w")) as file:
        with _quiet():
            torch.export.save(program, file)
        if file.error is not None:
            raise file.error


class _Patient(io.BufferedWriter):
    """A file that keeps the error of a write: PyTorch's writer would end the whole process at one."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            super().write(data)
        except OSError as error:
            self.error = error
        return len(data)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # some libraries report a full disk by a RuntimeError
        raise FileError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


_GRAPHS: dict[str, tuple[str, Callable[[ExportedProgram, Path], None]]] = {
    "onnx": ("model.onnx", _write_onnx),
    "torch": ("model.pt2", _write_torch),
}


def _write_config(model: LanguageModel, folder: Path, format: str) -> None:
    """What the user of the graph needs to know, and where the graph came from."""
    config = {
        "model_type": f"fastgpt-{format}",
        "input": "idx (B, T) int64",
        "output": "logits (B, T, V) float32",
        "max_length": longest_text(model),  # of T; null: any
        "eos_token_id": None if model.tokenizer is None else model.tokenizer.end_of_text,
        "layout": model.layout,
        "model": model.kind,
        **dataclasses.asdict(model.cfg),
    }
    if format == "onnx":
        config["opset"] = ONNX_OPSET
    with _writing(folder / "config.json"):
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings in which PyTorch's exporters speak to their own developers."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


# --- running what was written -----------------------------------------------------------------------------------------

Run = Callable[[Tensor], Tensor]  # idx (B, T) -> logits (B, T, V)


def _compare(run: Run, model: LanguageModel, format: str) -> Check:
    """Raises ExportError where a logit differs by more than BOUND allows."""
    sizes = _sizes(model)
    generator = torch.Generator().manual_seed(0)
    worst, bound = 0.0, BOUND
    for B, T in sizes:
        idx = torch.randint(model.cfg.vocab_size, (B, T), generator=generator)
        with torch.no_grad():
            expected, found = model(idx)[0], run(idx)
        bound = max(bound, BOUND * float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()))
        difference = max_error(found, expected.double()) if found.shape == expected.shape else float("inf")
        if difference > bound:
            raise ExportError(
                f"format: the export as {format} cannot be made: at B={B}, T={T} its logits differ from the model's by "
                f"{difference:.2g}, and may by {bound:.2g}"
            )
        worst = max(worst, difference)
    return Check(sizes, worst, bound)


def _sizes(model: LanguageModel) -> tuple[tuple[int, int], ...]:
    """Texts of one token, of some, of as many as the model reads or was trained on, and of more where it takes more."""
    block, longest = model.cfg.block_size, longest_text(model)
    sizes = [(1, 1), (3, 1), (2, min(7, block)), (1, block)]
    if longest is None:
        sizes.append((1, block + 1))
    return tuple(dict.fromkeys(sizes))


def _run_onnx(folder: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda idx: torch.from_numpy(session.run(["logits"], {"idx": idx.numpy()})[0])


def _run_torch(folder: Path) -> Run:
    with _quiet():
        return torch.export.load(folder / "model.pt2").module()


def _run_huggingface(folder: Path) -> Run | None:
    try:
        import transformers
    except ImportError:
        return None
    log = transformers.utils.logging
    verbosity, has_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    finally:
        log.set_verbosity(verbosity)
        if has_bars:
            log.enable_progress_bar()
    return lambda idx: model(idx).logits


def _run_fastgpt(folder: Path) -> Run:
    model = GPT.from_pretrained(folder)
    return lambda idx: model(idx)[0]


_RUNNERS: dict[str, Callable[[Path], Run | None]] = {
    "onnx": _run_onnx,
    "torch": _run_torch,
    "huggingface": _run_huggingface,
    "fastgpt": _run_fastgpt,
}
