"""The tables of docs/scale.md: plans for several numbers of GPUs, and plans beside what was measured."""

import shlex
from collections.abc import Sequence

from fastgpt.config import GPTConfig
from fastgpt.options import read
from fastgpt.plan import GB, TIMES, Cluster, Job, Plan
from fastgpt.report import cell, markdown_table
from fastgpt.settings import PlanSettings, with_sources

from .cells import short
from .rows import Row

OWN_COLUMN = ("weights", "gradients", "moments", "activations")  # of the memory's parts


def planned(gpus: Sequence[int], options: str) -> str:
    """Two tables of `fastgpt plan` with the options, a row for each number of GPUs: memory, and one step."""
    plans = [_plan(n, options) for n in gpus]
    about = f"Memory of each GPU in GB, by `fastgpt plan {options} --gpus N`; the largest batch is that of all GPUs:"
    return "\n\n".join(
        [about, _memory(plans), "One step, on each GPU; the tokens are those of all GPUs:", _step(plans)]
    )


def _plan(gpus: int, options: str) -> Plan:
    given = read(PlanSettings, [*shlex.split(options), "--gpus", str(gpus)], "fastgpt plan")
    settings = with_sources(PlanSettings, given)
    return Plan(settings.part(GPTConfig), settings.part(Job), settings.part(Cluster))


def _memory(plans: Sequence[Plan]) -> str:
    headers = ["GPUs", *OWN_COLUMN, "other", "in all", "largest batch"]
    body = []
    for plan in plans:
        own = [plan.memory[name] for name in OWN_COLUMN]
        sums = [plan.total_memory - sum(own), plan.total_memory]
        body.append([plan.job.gpus, *(f"{n / GB:.2f}" for n in own + sums), plan.largest_batch])
    return markdown_table(headers, body)


def _step(plans: Sequence[Plan]) -> str:
    headers = ["GPUs", "TFLOP", "GB sent", *(f"{name}, ms" for name in TIMES.values()), "tokens/s, all hidden"]
    body = []
    for plan in plans:
        work = f"{plan.flops / 1e12:.1f}", f"{sum(plan.sent.values()) / GB:.2f}"
        times = (f"{1e3 * plan.seconds[name]:.1f}" for name in TIMES)
        body.append([plan.job.gpus, *work, *times, round(plan.tokens_per_s)])
    return markdown_table(headers, body)


def beside_plans(rows: Sequence[Row]) -> str:
    """What was counted beside what was planned, in each of the benchmark's cases, and the times of a step."""
    model = rows[0].shape.partition(", B")[2]
    about = (
        f"What one process holds, in bytes, its operations, and the bytes of what all exchange in a step (B{model}):"
    )
    return "\n\n".join([about, _counts(rows), "Time of a step:", _times(rows)])


def _counts(rows: Sequence[Row]) -> str:
    headers = ["", *(f"{_way(row)}: {what}" for row in rows for what in ("planned", "counted"))]
    names = dict.fromkeys(name for row in rows for name in row.extra["planned"])
    body = [
        [name.replace("_", " "), *(row.extra[what].get(name) for row in rows for what in ("planned", "counted"))]
        for name in names
    ]
    return markdown_table(headers, body)


def _times(rows: Sequence[Row]) -> str:
    headers = ["", "measured", *(f"planned: {name}" for name in TIMES.values()), "measured / nothing hidden"]
    body = []
    for row in rows:
        of_plan = row.extra["planned_ms"]
        times = (f"{cell(short(ms))} ms" for ms in (row.median_ms, *(of_plan[name] for name in TIMES)))
        body.append([_way(row), *times, f"{row.median_ms / of_plan['not_overlapped']:.2f}x"])
    return markdown_table(headers, body)


def _way(row: Row) -> str:
    return row.shape.partition(", B")[0]
