"""A step of training by one and by two processes on this machine, against what `fastgpt plan` says of it.

A row is the time of a step. In its `extra` are the counts of one process, each as it was counted and as it was planned,
and the planned time, for which the machine's own rates are measured in as many processes: of matrix products while all
of them multiply, and of collectives of as many bytes as the model has gradients.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgpt.benchmarks.harness.accuracy import model_error_ratio
from fastgpt.benchmarks.harness.ceilings import Ceilings, Demand, Traffic, linear_products, measure_ceilings
from fastgpt.benchmarks.harness.counted import Exchanged, Saved, bytes_of, flops_of, moments
from fastgpt.benchmarks.harness.models import ModelShape, fastgpt_model
from fastgpt.benchmarks.harness.processes import together
from fastgpt.benchmarks.harness.suite import OURS, Setting, Work
from fastgpt.config import TrainConfig
from fastgpt.plan import GB, Cluster, Job, Plan, collectives, ring_all_reduce
from fastgpt.training.parallel import parallel_loss
from fastgpt.training.processes import Processes
from fastgpt.training.step import Precision, make_optimizer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ScaleShape(ModelShape):
    """A model whose B sequences are shared out to some processes."""

    processes: int = 1
    parallel: str = "ddp"
    dtype: str = "float32"

    def __str__(self) -> str:
        way = f"{self.processes} processes, {self.parallel}" if self.processes > 1 else "1 process"
        return f"{way}, {super().__str__()}"

    @property
    def plan(self) -> Plan:
        """Without the machine's rates."""
        model, _ = fastgpt_model(self)
        return Plan(model.cfg, Job(self.processes, self.parallel, self.B, dtype=self.dtype))


ALONE = ScaleShape(B=8, T=128, L=4, H=4, C=256, V=1024)
WAYS = [ALONE, *(replace(ALONE, processes=2, parallel=way) for way in ("ddp", "fsdp"))]


@pytest.mark.shapes(cpu=WAYS, cuda=[])
def bench_scale(run_work, setting, shape):
    run_work(scale_work(setting, shape))


def scale_work(setting: Setting, shape: ScaleShape) -> Work:
    measured = together(shape.processes, rates, shape)[0]
    bandwidth = measured.get("bytes_per_s")
    cluster = Cluster(flops=measured["flop_per_s"], efficiency=1.0)
    if bandwidth is not None:
        cluster = replace(cluster, bandwidth_gb_s=bandwidth / GB)
    planned = replace(shape.plan, cluster=cluster)
    extra = {
        "counted": together(shape.processes, counts, shape)[0],
        "planned": planned_counts(planned),
        "planned_ms": {name: 1e3 * seconds for name, seconds in planned.seconds.items()},
        "gflop_per_s": cluster.flops / 1e9,
        "gb_per_s": None if bandwidth is None else cluster.bandwidth_gb_s,
    }
    return Work(
        op="scale", shape=str(shape), direction="step", dtype=setting.dtype_name, tokens=shape.B * shape.T,
        contenders={OURS: lambda: together(shape.processes, seconds_of_a_step, shape)[0]}, extra={OURS: extra},
        reports_seconds=True,
        error_ratio=lambda name: model_error_ratio(fastgpt_model(shape)[0], shape),
    )  # fmt: skip


def planned_counts(plan: Plan) -> dict[str, int]:
    """What `counts` finds, by the same names, as the plan says it."""
    parts = {name: plan.memory[name] for name in ("weights", "gradients", "moments", "activations")}
    parts["activations"] += plan.memory["half_precision_weights"]  # autograd keeps both
    return {**parts, "flops": plan.flops, **{one.name: one.n_bytes for one in collectives(plan.cfg, plan.job)}}


# ---- in each of the processes ----


class Training:
    """A model of the shape, the same in every process, its optimizer, and this process's rows of a batch."""

    def __init__(self, shape: ScaleShape) -> None:
        torch.manual_seed(1)
        self.model, _ = fastgpt_model(shape)
        self.model.train()
        cfg, processes = TrainConfig(parallel=shape.parallel), Processes(dist.get_rank(), shape.processes)
        self._precision = Precision(CPU, shape.dtype)
        self._loss = parallel_loss(self.model, cfg, processes, self._precision)
        self.optimizer = make_optimizer(self.model, cfg)
        ((x, y),) = shape.random_batches(CPU, 1)
        self.x, self.y = (whole[processes.rows(shape.B)].clone() for whole in (x, y))

    def loss(self) -> Tensor:
        with self._precision.autocast():
            return self._loss(self.x, self.y)

    def count_buckets(self, exchanged: Exchanged) -> None:
        if isinstance(self._loss, nn.parallel.DistributedDataParallel):
            self._loss.register_comm_hook(None, exchanged.all_reduce_bucket)

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def counts(shape: ScaleShape) -> dict[str, int]:
    """Bytes that this process holds, operations that it computes, bytes of the tensors that all exchange in a step."""
    training = Training(shape)
    saved, exchanged = Saved(training.model), Exchanged()
    training.count_buckets(exchanged)
    training.step()
    exchanged.n_bytes.clear()
    with exchanged:
        with saved.counting():
            loss = training.loss()
        exchanged.phase = "backward"
        loss.backward()
    parameters = list(training.model.parameters())
    _, plain_loss = fastgpt_model(shape)
    return {
        "weights": bytes_of(parameters),
        "gradients": bytes_of(p.grad for p in parameters if p.grad is not None),
        "moments": bytes_of(moments(training.optimizer)),
        "activations": saved.n_bytes,
        "flops": flops_of(lambda: plain_loss(training.x, training.y).backward()),
        **exchanged.n_bytes,
    }


def rates(shape: ScaleShape) -> dict[str, float]:
    """Operations per second of products while all processes multiply, and bytes per second that each sends.

    The products are those of a block's first feed-forward matrix, in both passes. One process alone sends nothing.
    """
    dist.barrier()
    rows = shape.B // shape.processes * shape.T
    products = tuple(linear_products(rows, shape.C, 4 * shape.C, backward=True))
    demand = Demand(Traffic(0, 0, 0), sum(product.flops for product in products), products)
    bound = measure_ceilings(CPU, demand, Ceilings("float32")).bound(demand)
    assert bound is not None
    found = {"flop_per_s": demand.flops / bound.seconds}
    if shape.processes > 1:
        exchange = _exchange(shape)
        seconds = statistics.median(_seconds(exchange) for _ in range(10))
        found["bytes_per_s"] = ring_all_reduce(4 * shape.plan.n_parameters, shape.processes) / seconds
    return found


def _exchange(shape: ScaleShape) -> Callable[[], Any]:
    """What DDP does with the gradients, or FSDP with as many bytes, which are sent in two halves."""
    whole = torch.ones(-(-shape.plan.n_parameters // shape.processes), shape.processes)
    if shape.parallel == "ddp":
        return lambda: dist.all_reduce(whole)
    own = whole.flatten().chunk(shape.processes)[0].clone()

    def gather_and_scatter() -> None:
        dist.all_gather_into_tensor(whole.view(-1), own)
        dist.reduce_scatter_tensor(own, whole.view(-1))

    return gather_and_scatter


def seconds_of_a_step(shape: ScaleShape) -> float:
    """The median of some steps, after the first ones."""
    training = Training(shape)
    return statistics.median([_seconds(training.step) for _ in range(20)][5:])


def _seconds(call: Callable[[], Any]) -> float:
    dist.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
