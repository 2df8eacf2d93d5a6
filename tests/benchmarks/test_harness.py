"""The benchmark suite: turns, arithmetic, what it writes, and that a wrong result is never timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgpt.benchmarks import (
    bench_attention,
    bench_cross_entropy,
    bench_embedding,
    bench_generate,
    bench_import,
    bench_layer_norm,
    bench_time_to_loss,
    bench_train_step,
)
from fastgpt.benchmarks.harness import measure, peers, suite
from fastgpt.benchmarks.publish import rows
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
    monkeypatch.setattr(suite, "measure_ceilings", lambda device: CEILINGS)
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
    assert measure.spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == measure.Spread(3.5, 2.0, 5.0)
    assert measure.spread([2.0]) == measure.Spread(2.0, 2.0, 2.0)


def test_ratios_are_taken_inside_a_round():
    """A machine that is three times slower in half of the rounds: the ratio does not notice."""
    ours, theirs = [1.0, 3.0, 1.0, 3.0], [2.0, 6.0, 2.0, 6.0]
    assert measure.ratio(theirs, ours) == measure.Spread(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("spread", "expected"),
    [((1.5, 1.01, 2.0), "faster"), ((0.8, 0.7, 0.99), "slower"), ((1.2, 0.9, 1.5), "noise"), ((1, 1, 1), "noise")],
)
def test_the_verdict_is_noise_where_the_percentiles_straddle_1(spread, expected):
    assert measure.verdict(measure.Spread(*spread)) == expected


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
    monkeypatch.setattr(suite, "measure_ceilings", lambda device: next(found))
    monkeypatch.setattr(suite, "interleave", lambda contenders, clock, **options: {"fastgpt": [1.0]})
    for shape in "12":
        run.measure(work(shape=shape, n_bytes=1e9, contenders={"fastgpt": lambda: None}))
    assert [row["roofline_fraction"] for row in rows.read(run.path)[0]] == [0.25, 0.25]
    assert run.ceilings == measure.Ceilings(4e9, 1e12, "float32")


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_say_who_is_faster(run):
    times = {"fastgpt": [1.0, 2.0, 1.0], "A": [2.0, 4.0, 2.0], "B": [0.5, 4.0, 0.5]}
    done = work(n_bytes=1e9, flops=1e9, tokens=10, backend="native")
    made = suite.make_rows(done, times, {"fastgpt": 0.5}, {"A": 7}, CEILINGS, dict.fromkeys(rows.FACTS))
    ours, a, b = made
    assert all(tuple(row) == rows.KEYS for row in made)
    assert (ours["implementation"], ours["backend"], ours["best_peer"]) == ("fastgpt", "native", "B")
    assert (ours["ratio"], ours["verdict"]) == (0.5, "noise")
    assert (a["ratio"], a["ratio_p20"], a["verdict"], a["best_peer"], a["backend"]) == (2.0, 2.0, "faster", None, None)
    assert (b["ratio"], b["ratio_p80"]) == (0.5, 1.4)
    assert (ours["median_ms"], ours["rounds"], ours["roofline_fraction"]) == (1000.0, 3, 1.0)
    assert ours["extra"] == {"gb_per_s": 1.0, "tflop_per_s": 0.001, "tokens_per_s": 10.0}
    assert (ours["parity_error_ratio"], a["parity_error_ratio"], a["peak_bytes"]) == (0.5, None, 7)


def test_without_peers_there_is_no_ratio(run):
    run.measure(work(contenders={"fastgpt": lambda: None}))
    (row,) = run.rows
    assert (row["ratio"], row["best_peer"], row["verdict"]) == (None, None, None)


def test_a_row_replaces_the_one_it_repeats(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    row = {"kind": "row", "op": "a", "shape": "1", "dtype": "f", "implementation": "x", "direction": "forward"}
    rows.write(path, [row | {"median_ms": 1.0}, row | {"shape": "2"}], {"kind": "run", "ops": ["a"], "n": 1})
    rows.write(path, [row | {"op": "b"}], {"kind": "run", "ops": ["b"], "n": 2})
    rows.write(path, [row | {"median_ms": 3.0}], {"kind": "run", "ops": ["a"], "n": 3})
    kept, runs = rows.read(path)
    assert [(r["op"], r["shape"], r.get("median_ms")) for r in kept] == [
        ("a", "2", None),
        ("b", "1", None),
        ("a", "1", 3.0),
    ]
    assert [r["n"] for r in runs] == [2, 3]


def test_facts_and_slug():
    facts = rows.facts(CPU)
    assert tuple(facts) == rows.FACTS
    assert facts["torch"] == torch.__version__ and facts["driver"] is None and facts["device"]
    assert rows.slug(CPU) == rows.slug(CPU).lower() and " " not in rows.slug(CPU) and rows.slug(CPU).endswith("-cores")


def test_generations_of_one_name_are_two_devices():
    """A virtual machine may call every generation of a maker's processors by one name; on Arm there is no name."""
    lines = "vendor_id : M\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n"
    names = {rows.cpu_name(lines.format(family, model)) for family, model in ((25, 17), (26, 2))}
    assert names == {"AMD EPYC (family 25, model 17)", "AMD EPYC (family 26, model 2)"}
    assert rows.cpu_name("model name : Intel(R) Xeon(R)\n") == "Intel(R) Xeon(R)"
    assert rows.cpu_name("CPU architecture: 8\n") is None and rows.cpu_name("") is None


# --- who is left out, and why ----------------------------------------------------------------------------------------


def test_a_peer_that_fails_or_computes_something_else_is_left_out(run):
    def fails():
        raise RuntimeError("no kernel for this\nand more")

    ratios = {"fastgpt": 1.0, "wrong": 21.0, "rough": 19.0, "unknown": None, "fails": 1.0}
    calls = {name: fails if name == "fails" else lambda: None for name in ratios}
    run.measure(work(contenders=calls, error_ratio=ratios.get, absent={"elsewhere": "not installed"}))
    assert [row["implementation"] for row in run.rows] == ["fastgpt", "rough", "unknown"]
    absent = run.absent["thing"]
    assert absent["elsewhere"] == "not installed" and absent["fails, 1, forward"] == "no kernel for this"
    assert "21 times" in absent["wrong, 1, forward"]
    (written,) = rows.read(run.path)[1]
    assert written["absent"] == run.absent and written["ceilings"]["bytes_per_s"] == 1e9 and written["ops"] == ["thing"]


@pytest.mark.parametrize("ratio", [2.01, float("inf"), float("nan")])
def test_a_wrong_result_is_not_timed(run, ratio):
    ran = []
    with pytest.raises(suite.ParityError, match="no time is kept"):
        run.measure(work(contenders={"fastgpt": lambda: ran.append(1)}, error_ratio=lambda name: ratio))
    assert not ran and not run.rows and not run.path.exists()


def test_peers_that_are_not_here_say_why(tmp_path):
    shape = peers.Shape(B=1, T=8, L=1, H=1, C=8, V=11)
    _, absent = peers.models(shape, CPU, None, str(tmp_path / "nothing.py"))
    assert absent["nanoGPT"] == "give a checkout: --nanogpt DIR" and "is not a file" in absent["lecture"]
    for make in (peers.cross_entropy(CPU)["liger-kernel"], peers.attention(CPU, True, 0.0, False)["sdpa cudnn"]):
        with pytest.raises(peers.Absent, match="CUDA devices only"):
            make()
    with pytest.raises(peers.Absent, match="flash-attn is not installed"):
        peers._import("package_that_is_nowhere", "flash-attn")


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
    assert all(tuple(row) == rows.KEYS for row in run.rows) and rows.read(run.path)[0] == run.rows
    ours = [row for row in run.rows if row["implementation"] == "fastgpt"]
    assert all(row["median_ms"] > 0 and row["verdict"] and row["backend"] in ("torch", "native") for row in ours)
    return {row["implementation"] for row in run.rows} - {"fastgpt"}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_op_benchmarks(run, setting, direction):
    bench_attention.bench_attention(run.measure, setting, bench_attention.Case(1, 2, 16, 8), direction)
    dropout = bench_attention.Case(1, 2, 16, 8, Hkv=1, dropout=0.2)
    bench_attention.bench_attention(run.measure, setting, dropout, direction)
    bench_embedding.bench_embedding(run.measure, setting, bench_embedding.Case(2, 8, 30, 16, zipf=True), direction)
    bench_layer_norm.bench_layer_norm(run.measure, setting, bench_layer_norm.Case(8, 16), direction)
    bench_layer_norm.bench_add_layer_norm(run.measure, setting, bench_layer_norm.Case(8, 16, 0.1), direction)
    bench_cross_entropy.bench_cross_entropy(run.measure, setting, bench_cross_entropy.Case(8, 33), direction)
    bench_cross_entropy.bench_linear_cross_entropy(
        run.measure, setting, bench_cross_entropy.Linear(8, 16, 33), direction
    )
    assert peer_names(run) == {"sdpa flash", "sdpa math", "torch"}
    assert run.absent["attention"]["flash-attn"] == "its kernels run on CUDA devices only"
    assert "flex attention, B1 H2 T16 D8 causal, " + direction in run.absent["attention"]
    assert {row["direction"] for row in run.rows} == {direction}
    assert [row["parity_error_ratio"] is None for row in run.rows if ", dropout" in row["shape"]].count(False) == 2


def test_decoding_benchmark(run, setting):
    case = bench_attention.Case(1, 2, 16, 8, one_query=True)
    run.measure(bench_attention.work(setting, case, "forward"))
    assert "sdpa flash" in {row["implementation"] for row in run.rows}
    assert run.rows[0]["flops"] == 4 * 2 * 16 * 8


def test_training_step_benchmark(run, checkouts):
    run.measure(bench_train_step.work(bench_train_step.Case(B=2, T=8, L=1, H=2, C=16, V=33), checkouts))
    assert {row["implementation"] for row in run.rows} == {
        "fastgpt", "nanoGPT", "lecture", "transformers sdpa", "transformers eager",
    }  # fmt: skip
    assert run.rows[0]["extra"]["tokens_per_s"] > 0 and run.rows[0]["parity_error_ratio"] <= 2.0


def test_generation_benchmark(run, checkouts):
    run.measure(bench_generate.work(bench_generate.Case(B=1, T=40, L=1, H=2, C=16, V=33, new=5), checkouts))
    names = [row["implementation"] for row in run.rows]
    assert names == ["fastgpt", "nanoGPT", "transformers sdpa", "transformers eager"]
    assert run.rows[0]["parity_error_ratio"] <= 2.0 and run.rows[0]["extra"]["tokens_per_s"] > 0


def test_time_to_loss_benchmark(run, checkouts, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_time_to_loss, "EVAL_INTERVAL", 2)
    monkeypatch.setattr(bench_time_to_loss, "EVAL_BATCHES", 1)
    (tmp_path / "text.txt").write_text("To be, or not to be: that is the question. " * 100)
    case = bench_time_to_loss.Case("shakespeare-char-cpu", 9.0)
    run.measure(bench_time_to_loss.work(case, checkouts, Corpus.load(str(tmp_path / "text.txt"))))
    assert {row["implementation"] for row in run.rows} == {"fastgpt", "nanoGPT"}
    assert all(row["extra"]["val_loss"] <= 9.0 and row["rounds"] == 3 for row in run.rows)


def test_import_benchmark(run, monkeypatch):
    statements = {"fastgpt": "import json", "transformers": "import package_that_is_nowhere", "csv": "import csv"}
    monkeypatch.setattr(bench_import, "STATEMENTS", statements)
    monkeypatch.setattr(bench_import, "PROGRAM", bench_import.PROGRAM.replace("import torch", "import abc"))
    bench_import.bench_import(run.measure)
    assert [row["implementation"] for row in run.rows] == ["fastgpt", "csv"]
    assert "is not installed" in run.absent["import"]["transformers"]
    assert run.rows[0]["extra"]["import_torch_ms"] >= 0.0


# --- as it is started ------------------------------------------------------------------------------------------------

SMALL = """
import pytest
from fastgpt.benchmarks.harness import peers
from fastgpt.benchmarks.harness.suite import op_work
CASES = {"cpu": [(4, 8), (5, 8)], "cuda": []}
def bench_small(bench, setting, case):
    make = lambda draw: {"tokens": draw.index(11, *case), "token_table": draw.normal(11, 16)}
    torchs = peers.Peer(lambda tokens, table: table[tokens])
    bench(op_work(setting, "embedding", f"B{case[0]}", "forward", arguments=make, few=make,
                  peers={"torch": lambda: torchs}))
"""
GIVEN_CEILINGS = """
from fastgpt.benchmarks.harness import measure, suite
suite.measure_ceilings = lambda device: measure.Ceilings(1e10, 1e11, "float32")
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
    written, (run,) = rows.read(tmp_path / "rows.jsonl")
    assert [(r["shape"], r["implementation"]) for r in written] == [
        ("B4", "fastgpt"), ("B4", "torch"), ("B5", "fastgpt"), ("B5", "torch"),
    ]  # fmt: skip
    raw = json.loads((tmp_path / "raw.json").read_text(encoding="utf-8"))["benchmarks"]
    assert [b["name"] for b in raw] == ["fastgpt", "torch"] * 2 and len({b["fullname"] for b in raw}) == 4
    for row, entry in zip(written, raw, strict=True):
        assert len(entry["stats"]["data"]) == row["rounds"]
        assert entry["stats"]["median"] * 1e3 == pytest.approx(row["median_ms"], rel=1e-3)
    assert run["ops"] == ["embedding"] and "torch takes" in done.stdout


def test_quick_takes_the_first_case(tmp_path):
    assert start(tmp_path, "--quick").returncode == 0
    assert {row["shape"] for row in rows.read(tmp_path / "rows.jsonl")[0]} == {"B4"}


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
