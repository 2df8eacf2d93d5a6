"""One training step on the CPU, forward to optimizer, in float32: FastGPT against the models it would replace.

    python benchmarks/bench_train_step.py --nanogpt DIR --lecture gpt.py --out benchmarks/results/NAME.jsonl

Parity comes first: FastGPT's loss and gradients on the backends it takes must equal those of the formulas in float64,
or nothing is timed. Then all contenders take turns in one process; medians, and the ratio to the fastest peer.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from interleaved import interleaved, machine
from peers import Shape, build, training_step

import fastgpt
from fastgpt import ops
from fastgpt.ops.backend import OPS

SHAPES = [
    Shape(B=12, T=64, L=4, H=4, C=128, V=65, dropout=0.0),
    Shape(B=4, T=256, L=6, H=6, C=384, V=65, dropout=0.2),
    Shape(B=2, T=256, L=4, H=8, C=512, V=50304, dropout=0.0),
]


def parity_ratio(model: fastgpt.GPT, x: torch.Tensor, y: torch.Tensor) -> float:
    """Our largest gradient error against float64, over that of the torch backend in float32. Dropout is off."""
    exact = copy.deepcopy(model).eval().double()
    exact(x, y)[1].backward()
    errors = {}
    for backend in ("auto", "torch"):
        copied = copy.deepcopy(model).eval()
        with fastgpt.use_backend(backend):
            copied.loss(x, y).backward()
        pairs = zip(copied.parameters(), exact.parameters(), strict=True)
        errors[backend] = max(float((p.grad.double() - q.grad).abs().max() / q.grad.abs().max()) for p, q in pairs)
    return errors["auto"] / max(errors["torch"], 1e-7)


def facts() -> dict[str, object]:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return {
        "device": machine().split(",")[0],
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastgpt": fastgpt.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def measure(shape: Shape, seconds: float, nanogpt: str | None, lecture: str | None) -> list[dict[str, object]]:
    present, absent = build(shape, nanogpt, lecture)
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randint(shape.V, (shape.B, shape.T), generator=g) for _ in range(2))
    ratio = parity_ratio(present["fastgpt"][0], x, y)
    if not ratio <= 2.0:
        sys.exit(f"{shape}: parity failed, {ratio:.2f} times the torch backend's error; no timing is reported")
    steps = {name: training_step(*made) for name, made in present.items()}
    times = interleaved({name: lambda s=step: s(x, y) for name, step in steps.items()}, seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min((m, name) for name, m in medians.items() if name != "fastgpt")
    backends = {op: str(ops.explain(op, *_example(op)).backend) for op in OPS}
    rows: list[dict[str, object]] = []
    print(f"\n{shape}  (parity: {ratio:.2f} times the torch backend's gradient error)")
    for name, values in times.items():
        p20, p80 = statistics.quantiles(values, n=5)[0], statistics.quantiles(values, n=5)[-1]
        print(f"  {name:<20}{medians[name]:9.1f} ms  ({p20:.1f} - {p80:.1f}, n={len(values)})  "
              f"{medians[name] / medians['fastgpt']:5.2f}x fastgpt")  # fmt: skip
        rows.append({
            "op": "train_step", "shape": str(shape), "dtype": "float32", "direction": "forward+backward+optimizer",
            "implementation": name, "median_ms": round(medians[name], 3), "p20_ms": round(p20, 3),
            "p80_ms": round(p80, 3), "rounds": len(values), "best_peer": best[1],
            "ratio_to_best_peer": round(best[0] / medians[name], 3),
            "parity_error_ratio": round(ratio, 3) if name == "fastgpt" else None,
            "backends": backends if name == "fastgpt" else None, **facts(),
        })  # fmt: skip
    for name, reason in absent.items():
        print(f"  {name:<20}absent: {reason}")
    return rows


def _example(op: str) -> tuple:
    from fastgpt.doctor import example_call

    return example_call(op, "cpu")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--lecture", help="gpt.py of karpathy/ng-video-lecture")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each shape")
    parser.add_argument("--out", type=Path, help="JSON lines; rows of the same op are replaced")
    options = parser.parse_args()
    print(machine())
    rows = [row for shape in SHAPES for row in measure(shape, options.seconds, options.nanogpt, options.lecture)]
    if options.out:
        kept = options.out.read_text().splitlines() if options.out.exists() else []
        kept = [line for line in kept if json.loads(line)["op"] != "train_step"]
        options.out.write_text("\n".join([*kept, *map(json.dumps, rows)]) + "\n")


if __name__ == "__main__":
    main()
