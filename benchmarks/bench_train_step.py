"""A training step, forward to optimizer, against the models that one would train instead.

All have the same shape and dropout, and are trained by FastGPT's own `training_step`: the same fused AdamW and the same
clipping; float32 on a CPU, bfloat16 autocast on a GPU. A shape that is compiled gives torch.compile to all of them on a
GPU; on a CPU to the peers alone, with which FastGPT's eager step is compared, and their rows say how long the first
step took, which waits for the compiler. A shape that is graphed takes whole steps by CUDA graphs, as `fastgpt train
--cuda-graph` does. On a CPU, FastGPT's row and nanoGPT's have the time of a step by kind of work.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
import torch

from fastgpt import cuda_graph
from fastgpt.benchmarks.harness.accuracy import model_error_ratio
from fastgpt.benchmarks.harness.ceilings import Demand, Traffic
from fastgpt.benchmarks.harness.models import ModelShape, make_models, measured_precision
from fastgpt.benchmarks.harness.suite import OURS, Setting, Work
from fastgpt.config import TrainConfig
from fastgpt.training.graph import CHECKED_STEPS, GraphedStep
from fastgpt.training.step import Batch, make_optimizer, training_step


@dataclass(frozen=True)
class TrainStepShape(ModelShape):
    compiled: bool = False
    peers_compiled: bool = False
    graphed: bool = False

    def __str__(self) -> str:
        ways = {", torch.compile": self.compiled, ", peers compiled": self.peers_compiled, ", CUDA graph": self.graphed}
        return super().__str__() + "".join(way for way, is_taken in ways.items() if is_taken)


_SMALL = TrainStepShape(B=12, T=64, L=4, H=4, C=128, V=65)
_CHARACTERS = TrainStepShape(B=64, T=256, L=6, H=6, C=384, V=65, dropout=0.2)
_GPT2 = TrainStepShape(B=16, T=1024, L=12, H=12, C=768, V=50304)
_ON_A_CPU = [_SMALL, replace(_CHARACTERS, B=4), TrainStepShape(B=2, T=256, L=4, H=8, C=512, V=50304)]
GRAPHED = (OURS, "nanoGPT")  # each graph keeps the memory of a step
COMPILED = (OURS, "nanoGPT", "transformers sdpa")  # compiling the others would take minutes more
PROFILED = (OURS, "nanoGPT")


@pytest.mark.shapes(
    cpu=[replace(shape, peers_compiled=compiled) for shape in _ON_A_CPU for compiled in (False, True)],
    cuda=[
        _GPT2,
        replace(_GPT2, graphed=True),
        replace(_GPT2, compiled=True),
        _CHARACTERS,
        replace(_CHARACTERS, graphed=True),
    ],
)
def bench_train_step(run_work, setting, shape):
    run_work(train_step_work(setting, shape))


def train_step_work(setting: Setting, shape: TrainStepShape) -> Work:
    present, absent = make_models(shape, setting)
    ours = present[OURS][0]
    if shape.compiled or shape.peers_compiled:
        torch.compiler.reset()
        eager = (OURS,) if shape.peers_compiled else ()
        present = {
            name: (model, loss if name in eager else torch.compile(loss))
            for name, (model, loss) in present.items()
            if name in COMPILED
        }
    if shape.graphed:
        present = {name: made for name, made in present.items() if name in GRAPHED}
    batches = shape.random_batches(setting.device, 4)

    def stepper(model, loss):
        model.train()
        optimizer, precision = make_optimizer(model, TrainConfig()), measured_precision(setting)
        turn = itertools.cycle(batches)

        def step(micro_batches, lr=None):
            return training_step(model, loss, optimizer, micro_batches, precision, grad_clip=1.0, lr=lr)

        if not shape.graphed:
            return lambda: step([next(turn)])
        recorder = RunAgain() if setting.rehearsal else cuda_graph.recorder(setting.device)
        return _graphed(GraphedStep(step, model, optimizer, precision, recorder), turn)

    warmups = 0 if setting.device.type == "cpu" else 3
    if shape.graphed:
        warmups = CHECKED_STEPS + 2  # the first step is eager, and the next ones are taken twice
    contenders = {name: stepper(*made) for name, made in present.items()}
    extra: dict[str, dict] = {name: {} for name in contenders}
    if shape.peers_compiled:
        contenders |= {name: first_told(contenders[name], extra[name]) for name in contenders if name != OURS}
    is_plain = setting.device.type == "cpu" and not (shape.compiled or shape.peers_compiled or shape.graphed)
    return Work(
        op="train_step", shape=str(shape), direction="step", dtype=setting.dtype_name, absent=absent,
        contenders=contenders, extra=extra, profiled=PROFILED if is_plain and not setting.rehearsal else (),
        error_ratio=lambda name: model_error_ratio(ours, shape, shape.compiled) if name == OURS else None,
        demand=step_demand(shape, ours.num_parameters()), tokens=shape.B * shape.T, warmups=warmups,
    )  # fmt: skip


def first_told(step: Callable[[], object], extra: dict) -> Callable[[], object]:
    """The step, whose first call notes its seconds; torch.compile finds nothing there of what it compiled before."""

    def call() -> object:
        if "first_step_s" in extra:
            return step()
        with TemporaryDirectory() as cache, patch.dict("os.environ", TORCHINDUCTOR_CACHE_DIR=cache):
            start = time.perf_counter()
            result = step()
            extra["first_step_s"] = round(time.perf_counter() - start, 1)
        return result

    return call


def step_demand(shape: ModelShape, n_parameters: int) -> Demand:
    """AdamW reads weights, gradients and two moments, and writes weights and moments; and all products are made."""
    state = 4 * n_parameters
    return Demand(Traffic(4 * state, 3 * state, 4 * state), shape.step_flops, tuple(shape.step_products))


def _graphed(step: GraphedStep, turn: Iterator[Batch]) -> Callable[[], None]:
    """A step that is not taken by a graph is not measured as one."""

    def call() -> None:
        step([next(turn)], TrainConfig().lr)
        if step.reason is not None:
            raise RuntimeError(f"no CUDA graph: {step.reason}")

    return call


class RunAgain:
    """In a rehearsal, what makes graphs: they run the function again."""

    def warm_up(self, run):
        return run()

    def record(self, run, generator=None):
        return run
