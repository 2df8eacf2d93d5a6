"""The benchmark suite: turns, arithmetic, what it writes, and that a wrong result is never timed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgpt import machine
from fastgpt.benchmarks import bench_import, bench_time_to_loss
from fastgpt.benchmarks.bench_attention import AttentionShape
from fastgpt.benchmarks.bench_cross_entropy import CrossEntropyShape
from fastgpt.benchmarks.bench_embedding import EmbeddingShape
from fastgpt.benchmarks.bench_generate import GenerationShape, generate_work
from fastgpt.benchmarks.bench_layer_norm import AddLayerNormShape, LayerNormShape
from fastgpt.benchmarks.bench_linear_cross_entropy import LinearCrossEntropyShape
from fastgpt.benchmarks.bench_train_step import TrainStepShape, train_step_work
from fastgpt.benchmarks.harness import measure, models, peers, suite
from fastgpt.benchmarks.harness.op_work import op_work
from fastgpt.benchmarks.publish import rows
from fastgpt.benchmarks.publish.rows import Spread
from fastgpt.data.corpus import Corpus

CPU = torch.device("cpu")
CEILINGS = measure.Ceilings(bytes_per_s=1e9, flops_per_s=1e12, dtype="float32")


@pytest.fixture
def setting() -> suite.Setting:
    return suite.Setting(CPU, seconds=0.0, min_rounds=3, min_time=0.0)


@pytest.fixture
def run(setting, tmp_path, monkeypatch) -> suite.Suite:
    """A suite that writes to tmp_path, with ceilings that are given and nothing compiled."""

    def refuse(*args, **options):
        raise RuntimeError("compiled in the benchmarks, not in their tests")

    monkeypatch.setattr(torch, "compile", lambda *args, **options: refuse)
    monkeypatch.setattr(measure, "measure_ceilings", lambda device: CEILINGS)
    return suite.Suite(setting, tmp_path / "rows.jsonl")


def work(**changes) -> suite.Work:
    calls = {"fastgpt": lambda: None, "torch": lambda: None}
    given = {"op": "thing", "shape": "1", "direction": "forward", "dtype": "float32", "contenders": calls}
    return suite.Work(**{**given, "error_ratio": lambda name: 1.0, **changes})


# --- measuring -------------------------------------------------------------------------------------------------------


def test_contenders_take_turns():
    ran = []
    calls = {name: lambda name=name: ran.append(name) for name in "ABC"}
    times = measure.interleave(calls, measure.WallClock(), seconds=0.0, min_rounds=30, warmups=1)
    rounds = ["".join(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert all(sorted(one) == ["A", "B", "C"] for one in rounds)
    assert len(set(rounds)) == 6  # every order, so that each contender comes after each other one
    assert {name: len(values) for name, values in times.items()} == {"A": 30, "B": 30, "C": 30}


class FakeTime:
    """A clock whose calls are numbers: each takes so many seconds, of a time that nothing else moves."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def round(self, calls, iterations):
        times = [n * seconds for seconds, n in zip(calls, iterations, strict=True)]
        self.now += sum(times)
        return times


@pytest.mark.parametrize(
    ("seconds", "min_rounds", "rounds"),
    [(3.0, 1, 8), (3.0, 20, 20), (0.0, 5, 5), (1e6, 1, measure.MAX_ROUNDS)],  # a round takes 0.75 s
)
def test_rounds_go_on_for_the_time_given(seconds, min_rounds, rounds, monkeypatch):
    clock = FakeTime(monkeypatch)
    times = measure.interleave({"A": 0.5, "B": 0.25}, clock, seconds=seconds, min_rounds=min_rounds)
    assert times == {"A": [0.5] * rounds, "B": [0.25] * rounds}


def test_a_short_call_is_repeated_within_its_turn():
    seen = []

    class Fake:
        def round(self, calls, iterations):
            seen.append(dict(zip(calls, iterations, strict=True)))
            return [n * t for n, t in zip(iterations, calls, strict=True)]

    times = measure.interleave({"A": 0.001, "B": 0.2}, Fake(), seconds=0.0, min_rounds=2, min_time=0.01)
    assert seen == [{0.001: 1, 0.2: 1}, {0.001: 10, 0.2: 1}, {0.001: 10, 0.2: 1}]
    assert times == {"A": [pytest.approx(0.001)] * 2, "B": [0.2, 0.2]}


def test_a_reported_clock_takes_the_calls_word():
    assert measure.ReportedClock().round([lambda: 3.0, lambda: 4], [1, 1]) == [3.0, 4.0]


def test_spread_is_median_and_percentiles():
    assert measure.spread_of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == Spread(3.5, 2.0, 5.0)
    assert measure.spread_of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_ratios_are_taken_inside_a_round():
    """A machine that is three times slower in half of the rounds: the ratio does not notice."""
    ours, theirs = [1.0, 3.0, 1.0, 3.0], [2.0, 6.0, 2.0, 6.0]
    assert measure.ratio_of(theirs, ours) == Spread(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("spread", "expected"),
    [((1.5, 1.01, 2.0), "faster"), ((0.8, 0.7, 0.99), "slower"), ((1.2, 0.9, 1.5), "noise"), ((1, 1, 1), "noise")],
)
def test_the_verdict_is_noise_where_the_percentiles_straddle_1(spread, expected):
    assert measure.verdict_of(Spread(*spread)) == expected


def test_roofline():
    assert CEILINGS.fraction(2.0, n_bytes=1e9, flops=None) == 0.5  # a second to move them
    assert CEILINGS.fraction(4.0, n_bytes=1e9, flops=2e12) == 0.5  # two to multiply
    assert CEILINGS.fraction(1.0, None, None) is None


def test_ceilings_are_the_best_rounds_of_a_copy_and_a_product(monkeypatch):
    """The calls are run; how long they take is given: the copy 4, 2 and 3 seconds, the product half of that."""
    monkeypatch.setitem(measure.CEILING_SIZES, "cpu", (2**20, 64, torch.float32))
    seconds = iter([9.0, 4.0, 2.0, 3.0])  # the first is the warm-up's

    class Fake:
        def round(self, calls, iterations):
            copy = next(seconds)
            shapes = [call().shape for call in calls]
            return [copy if shape == (2**18,) else copy / 2 for shape in shapes]

    monkeypatch.setattr(measure, "clock_of", lambda device: Fake())
    found = measure.measure_ceilings(CPU, rounds=3)
    assert found == measure.Ceilings(bytes_per_s=2 * 2**20 / 2.0, flops_per_s=2 * 64**3 / 1.0, dtype="float32")


def test_peak_memory_is_what_a_call_adds_however_often_it_ran():
    call = lambda: torch.ones(2**23)  # noqa: E731  (32 MiB)
    if measure.peak_bytes(call, CPU) is None:
        pytest.skip("resident memory cannot be read from /proc here")
    for _ in range(3):
        assert 30 << 20 < measure.peak_bytes(call, CPU) < 40 << 20


def test_the_best_ceilings_of_a_run_count_for_all_its_rows(run, monkeypatch):
    found = iter([measure.Ceilings(1e9, 1e12, "float32"), measure.Ceilings(4e9, 1e11, "float32")])
    monkeypatch.setattr(measure, "measure_ceilings", lambda device: next(found))
    monkeypatch.setattr(measure, "interleave", lambda contenders, clock, **options: {"fastgpt": [1.0]})
    for shape in "12":
        run.measure_contenders(work(shape=shape, n_bytes=1e9, contenders={"fastgpt": lambda: None}))
    assert [row.roofline_fraction for row in rows.read([run.path]).rows] == [0.25, 0.25]
    assert run.ceilings == measure.Ceilings(4e9, 1e12, "float32")


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_say_who_is_faster(run):
    times = {"fastgpt": [1.0, 2.0, 1.0], "A": [2.0, 4.0, 2.0], "B": [0.5, 4.0, 0.5]}
    done = work(n_bytes=1e9, flops=1e9, tokens=10, backend="native")
    ours, a, b = suite.make_rows(done, times, {"fastgpt": 0.5}, {"A": 7}, CEILINGS, {"device": "A CPU"})
    assert (ours.implementation, ours.backend, ours.best_peer) == ("fastgpt", "native", "B")
    assert (ours.ratio, ours.verdict) == (0.5, "noise")
    assert (a.ratio, a.ratio_p20, a.verdict, a.best_peer, a.backend) == (2.0, 2.0, "faster", None, None)
    assert (b.ratio, b.ratio_p80) == (0.5, 1.4)
    assert (ours.median_ms, ours.rounds, ours.roofline_fraction) == (1000.0, 3, 1.0)
    assert ours.extra == {"gb_per_s": 1.0, "tflop_per_s": 0.001, "tokens_per_s": 10.0}
    assert (ours.parity_error_ratio, a.parity_error_ratio, a.peak_bytes) == (0.5, None, 7)


def test_without_peers_there_is_no_ratio(run):
    run.measure_contenders(work(contenders={"fastgpt": lambda: None}))
    (row,) = run.rows
    assert (row.ratio, row.best_peer, row.verdict) == (None, None, None)


def test_a_row_replaces_the_one_it_repeats(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"

    def add(n: int, *made: tuple[str, str, float]) -> None:
        work = {"dtype": "f", "implementation": "x", "direction": "forward", "device": "A CPU", "threads": n}
        new = [rows.Row(op=op, shape=shape, median_ms=ms, **work) for op, shape, ms in made]
        rows.write(path, new, rows.Run(device="A CPU", threads=n, ops=[op for op, _, _ in made]))

    add(1, ("a", "1", 1.0), ("a", "2", 2.0))
    add(2, ("b", "1", 3.0))
    add(3, ("a", "1", 4.0))
    found = rows.read([path])
    assert [(r.op, r.shape, r.median_ms) for r in found.rows] == [("a", "2", 2.0), ("b", "1", 3.0), ("a", "1", 4.0)]
    assert [r.threads for r in found.runs] == [2, 3]


def test_every_line_has_every_key_the_facts_of_the_machine_last():
    facts = machine.facts(CPU)
    (row,) = suite.make_rows(work(), {"fastgpt": [1.0]}, {}, {}, CEILINGS, facts)
    assert list(json.loads(row.to_json()))[-len(facts) :] == list(facts)
    keys = {field.name for field in dataclasses.fields(rows.Row)} - {"other_keys"}
    assert set(json.loads(row.to_json())) == keys | {"kind"}
    assert list(json.loads(rows.Run(**facts).to_json())) == ["kind", "ops", "ceilings", "absent", *facts]


# --- who is left out, and why ----------------------------------------------------------------------------------------


def test_a_peer_that_fails_or_computes_something_else_is_left_out(run):
    def fails():
        raise RuntimeError("no kernel for this\nand more")

    ratios = {"fastgpt": 1.0, "wrong": 21.0, "rough": 19.0, "unknown": None, "fails": 1.0}
    calls = {name: fails if name == "fails" else lambda: None for name in ratios}
    run.measure_contenders(work(contenders=calls, error_ratio=ratios.get, absent={"elsewhere": "not installed"}))
    assert [row.implementation for row in run.rows] == ["fastgpt", "rough", "unknown"]
    absent = run.absent["thing"]
    assert absent["elsewhere"] == "not installed" and absent["fails, 1, forward"] == "no kernel for this"
    assert "21 times" in absent["wrong, 1, forward"]
    (written,) = rows.read([run.path]).runs
    assert written.absent == run.absent and written.ceilings["bytes_per_s"] == 1e9 and written.ops == ["thing"]


@pytest.mark.parametrize("ratio", [2.01, float("inf"), float("nan")])
def test_a_wrong_result_is_not_timed(run, ratio):
    ran = []
    with pytest.raises(suite.ParityError, match="no time is kept"):
        run.measure_contenders(work(contenders={"fastgpt": lambda: ran.append(1)}, error_ratio=lambda name: ratio))
    assert not ran and not run.rows and not run.path.exists()


def test_peers_that_are_not_here_say_why(tmp_path):
    shape = models.ModelShape(B=1, T=8, L=1, H=1, C=8, V=11)
    _, absent = models.make_models(shape, suite.Setting(CPU, lecture=str(tmp_path / "nothing.py")))
    assert absent["nanoGPT"] == "give a checkout: --nanogpt DIR" and "is not a file" in absent["lecture"]
    for shape, peer in ((CrossEntropyShape(8, 33), "liger-kernel"), (AttentionShape(1, 2, 16, 8), "sdpa cudnn")):
        with pytest.raises(peers.Absent, match="CUDA devices only"):
            shape.peers(CPU)[peer]()
    with pytest.raises(peers.Absent, match="flash-attn is not installed"):
        peers.import_peer("package_that_is_nowhere", "flash-attn")


MODEL = """
import torch
class GPTLanguageModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, vocab_size)
    def forward(self, x, y=None):
        logits = self.table(x)
        return logits, None if y is None else torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""
NANOGPT = MODEL.replace("GPTLanguageModel", "GPT").replace("__init__(self):", "__init__(self, c):").replace(
    "vocab_size", "c.vocab_size"
) + """
    def generate(self, x, n):
        return torch.cat([x, x.new_zeros(1, n)], dim=1)
class GPTConfig:
    def __init__(self, **settings):
        self.__dict__.update(settings)
"""  # fmt: skip


@pytest.fixture
def checkouts(tmp_path, setting) -> suite.Setting:
    """Stand-ins for the two checkouts; the lecture's script would train, and must not run."""
    (tmp_path / "model.py").write_text(NANOGPT)
    (tmp_path / "gpt.py").write_text(MODEL + "\nraise SystemExit('the script ran')\n")
    given = {"nanogpt": str(tmp_path), "lecture": str(tmp_path / "gpt.py")}
    return suite.Setting(CPU, seconds=0.0, min_rounds=3, min_time=0.0, **given)


# --- the benchmarks, on small shapes ---------------------------------------------------------------------------------


def peer_names(run: suite.Suite) -> set[str]:
    assert rows.read([run.path]).rows == run.rows
    ours = [row for row in run.rows if row.implementation == "fastgpt"]
    assert all(row.median_ms > 0 and row.verdict and row.backend in ("torch", "native") for row in ours)
    return {row.implementation for row in run.rows} - {"fastgpt"}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_op_benchmarks(run, setting, direction):
    for shape in (
        AttentionShape(1, 2, 16, 8),
        AttentionShape(1, 2, 16, 8, Hkv=1, dropout=0.2),
        EmbeddingShape(2, 8, 30, 16, zipf=True),
        LayerNormShape(8, 16),
        AddLayerNormShape(8, 16, 0.1),
        CrossEntropyShape(8, 33),
        LinearCrossEntropyShape(8, 16, 33),
    ):
        run.measure_contenders(op_work(setting, shape, direction))
    assert peer_names(run) == {"sdpa flash", "sdpa math", "torch"}
    assert run.absent["attention"]["flash-attn"] == "its kernels run on CUDA devices only"
    assert "flex attention, B1 H2 T16 D8 causal, " + direction in run.absent["attention"]
    assert {row.direction for row in run.rows} == {direction}
    assert [row.parity_error_ratio is None for row in run.rows if ", dropout" in row.shape].count(False) == 2


def test_decoding_benchmark(run, setting):
    run.measure_contenders(op_work(setting, AttentionShape(1, 2, 16, 8, one_query=True), "forward"))
    assert "sdpa flash" in {row.implementation for row in run.rows}
    assert run.rows[0].flops == 4 * 2 * 16 * 8


def test_training_step_benchmark(run, checkouts):
    run.measure_contenders(train_step_work(checkouts, TrainStepShape(B=2, T=8, L=1, H=2, C=16, V=33)))
    assert {row.implementation for row in run.rows} == {
        "fastgpt", "nanoGPT", "lecture", "transformers sdpa", "transformers eager",
    }  # fmt: skip
    assert run.rows[0].extra["tokens_per_s"] > 0 and run.rows[0].parity_error_ratio <= 2.0


def test_generation_benchmark(run, checkouts):
    run.measure_contenders(generate_work(checkouts, GenerationShape(B=1, T=40, L=1, H=2, C=16, V=33, new=5)))
    names = [row.implementation for row in run.rows]
    assert names == ["fastgpt", "nanoGPT", "transformers sdpa", "transformers eager"]
    assert run.rows[0].parity_error_ratio <= 2.0 and run.rows[0].extra["tokens_per_s"] > 0


def test_time_to_loss_benchmark(run, checkouts, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_time_to_loss, "EVAL_INTERVAL", 2)
    monkeypatch.setattr(bench_time_to_loss, "EVAL_BATCHES", 1)
    (tmp_path / "text.txt").write_text("To be, or not to be: that is the question. " * 100)
    goal, corpus = bench_time_to_loss.Goal("shakespeare-char-cpu", 9.0), Corpus.load(str(tmp_path / "text.txt"))
    run.measure_contenders(bench_time_to_loss.time_to_loss_work(checkouts, goal, corpus))
    assert {row.implementation for row in run.rows} == {"fastgpt", "nanoGPT"}
    assert all(row.extra["val_loss"] <= 9.0 and row.rounds == 3 for row in run.rows)


def test_import_benchmark(run, monkeypatch):
    statements = {"fastgpt": "import json", "transformers": "import package_that_is_nowhere", "csv": "import csv"}
    monkeypatch.setattr(bench_import, "STATEMENTS", statements)
    monkeypatch.setattr(bench_import, "PROGRAM", bench_import.PROGRAM.replace("import torch", "import abc"))
    bench_import.bench_import(run.measure_contenders)
    assert [row.implementation for row in run.rows] == ["fastgpt", "csv"]
    assert "is not installed" in run.absent["import"]["transformers"]
    assert run.rows[0].extra["import_torch_ms"] >= 0.0


# --- as it is started ------------------------------------------------------------------------------------------------

SMALL = """
import dataclasses
from fastgpt.benchmarks.harness import op_work, peers
@dataclasses.dataclass(frozen=True)
class SmallShape(op_work.OpShape):
    op = "embedding"
    B: int
    def __str__(self):
        return f"B{self.B}"
    def arguments(self, draw):
        return {"tokens": draw.index(11, self.B, 8), "token_table": draw.normal(11, 16)}
    def few(self):
        return self
    def peers(self, device):
        return {"torch": lambda: peers.Peer(lambda tokens, table: table[tokens])}
    def elements_moved(self, backward):
        return 1
bench_small = op_work.op_benchmark(cpu=[SmallShape(4), SmallShape(5)], cuda=[], directions=["forward"])
"""
GIVEN_CEILINGS = """
from fastgpt.benchmarks.harness import measure
measure.measure_ceilings = lambda device: measure.Ceilings(1e10, 1e11, "float32")
"""
WRONG = """
from fastgpt.ops import backend, embedding
def wrong(tokens, token_table, position_table=None, *, position_offset=0):
    return token_table[tokens] * 1.001
for name in ("torch", "native"):
    backend.register("embedding", name, wrong)
"""


def start(folder: Path, *options: str, setup: str = "") -> subprocess.CompletedProcess[str]:
    settings = Path(measure.__file__).parent.parent / "pytest.ini"
    (folder / "conftest.py").write_text(GIVEN_CEILINGS + setup + "\nfrom fastgpt.benchmarks.conftest import *\n")
    (folder / "bench_small.py").write_text(SMALL)
    command = [sys.executable, "-m", "pytest", "-c", str(settings), "--rootdir", str(folder), "--device", "cpu"]
    command += ["--rows", str(folder / "rows.jsonl"), "--benchmark-max-time", "0.01", *options]
    # Seen from the worker of pytest-xdist that runs this test, pytest-benchmark would measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command.append(str(folder / "bench_small.py"))
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_a_session_writes_rows_and_hands_its_times_to_pytest_benchmark(tmp_path):
    done = start(tmp_path, "--benchmark-json", str(tmp_path / "raw.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows.read([tmp_path / "rows.jsonl"])
    written, (run,) = found.rows, found.runs
    assert [(r.shape, r.implementation) for r in written] == [
        ("B4", "fastgpt"), ("B4", "torch"), ("B5", "fastgpt"), ("B5", "torch"),
    ]  # fmt: skip
    raw = json.loads((tmp_path / "raw.json").read_text(encoding="utf-8"))["benchmarks"]
    assert [b["name"] for b in raw] == ["fastgpt", "torch"] * 2 and len({b["fullname"] for b in raw}) == 4
    for row, entry in zip(written, raw, strict=True):
        assert len(entry["stats"]["data"]) == row.rounds
        assert entry["stats"]["median"] * 1e3 == pytest.approx(row.median_ms, rel=1e-3)
    assert run.ops == ["embedding"] and "torch takes" in done.stdout


def test_quick_takes_the_first_case(tmp_path):
    assert start(tmp_path, "--quick").returncode == 0
    assert {row.shape for row in rows.read([tmp_path / "rows.jsonl"]).rows} == {"B4"}


def test_disabled_it_checks_and_times_nothing(tmp_path):
    done = start(tmp_path, "--benchmark-disable")
    assert done.returncode == 0 and "2 passed" in done.stdout and not (tmp_path / "rows.jsonl").exists()


def test_a_wrong_kernel_fails_the_session_and_leaves_no_row(tmp_path):
    done = start(tmp_path, setup=WRONG)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ParityError" in done.stdout and "no time is kept" in done.stdout and "2 failed" in done.stdout
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_device_that_is_not_there_is_a_usage_error(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = start(tmp_path, "--device", "cuda")
    assert done.returncode == 4 and "finds no CUDA device" in done.stderr
