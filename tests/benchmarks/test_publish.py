"""What is made of the benchmarks' rows: reading them, deciding whether a run was slower than another, the report."""

from __future__ import annotations

import base64
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgpt import ops
from fastgpt.benchmarks.bench_layer_norm import LayerNormShape
from fastgpt.benchmarks.harness import measure, peers
from fastgpt.benchmarks.harness.measure import Ceilings
from fastgpt.benchmarks.harness.op_work import op_work
from fastgpt.benchmarks.harness.suite import Setting, Suite
from fastgpt.benchmarks.publish import compare, quotes, report, rows
from fastgpt.benchmarks.publish.rows import Spread

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MACHINE = {
    "device": "A CPU",
    "cpu_capability": "AVX2",
    "threads": 2,
    "cuda": None,
    "torch": "2.13.0",
    "triton": "3.9.0",
}


NEEDED = ("op", "shape", "dtype", "implementation", "direction", "device", "median_ms")


def row(implementation: str = "fastgpt", median_ms: float = 10.0, ratio: float | None = None, **changed) -> dict:
    """A row in which the 20th and 80th percentile are 3 % below and above the median."""
    spread = {"ratio_p20": ratio and ratio * 0.97, "ratio_p80": ratio and ratio * 1.03}
    values = {
        "kind": "row", "op": "embedding", "shape": "B4 T64", "dtype": "float32", "direction": "forward",
        "implementation": implementation, "median_ms": median_ms, "p20_ms": median_ms * 0.97,
        "p80_ms": median_ms * 1.03, "rounds": 20, "ratio": ratio, **spread, **MACHINE,
    }  # fmt: skip
    return values | changed


def run_line(**changed) -> dict:
    ceilings = {"bytes_per_s": 15e9, "flops_per_s": 160e9, "dtype": "float32"}
    absent = {"embedding": {"liger-kernel": "its kernels run on CUDA devices only"}}
    return {"kind": "run", "ops": ["embedding"], "ceilings": ceilings, "absent": absent, **MACHINE} | changed


def cells_of(text: str) -> list[list[str]]:
    """The cells of every line of a table."""
    return [re.split(r" +\| +", line[2:-2].strip()) for line in text.splitlines() if line.startswith("| ")]


def write(path: Path, *lines: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def comparison(tmp_path: Path, base: list[dict], head: list[dict]) -> compare.RunComparison:
    paths = write(tmp_path / "base.jsonl", *base), write(tmp_path / "head.jsonl", *head)
    return compare.compare_runs(*(rows.read([path]) for path in paths))


def command(*arguments: object) -> int:
    return compare.main([str(argument) for argument in arguments])


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", 'expected an object with "kind": "row" or "run"'),
        ('{"kind": "sheet"}', 'expected an object with "kind": "row" or "run"'),
        (json.dumps(row(op=None)), "op: expected text, got None"),
        (json.dumps(row() | {"median_ms": "fast"}), "median_ms: expected a number above 0, got 'fast'"),
        (json.dumps(row(median_ms=0)), "median_ms: expected a number above 0, got 0"),
        (json.dumps(row(rounds=True)), "rounds: expected a number or null, got True"),
        (json.dumps(row(ratio_p20=-1.0)), "ratio_p20: expected a number or null, got -1.0"),
        (json.dumps(row(torch=2)), "torch: expected text or null, got 2"),
        (json.dumps(row(extra=[])), r"extra: expected an object or null, got \[\]"),
        (json.dumps(row(extra={"tokens_per_s": float("inf")})), "Infinity is not a measurement"),
    ],
)
def test_a_malformed_line_is_named_with_its_file(line, message, tmp_path):
    path = write(tmp_path / "some.jsonl", row(), row("torch"))
    path.write_text(path.read_text(encoding="utf-8") + "\n" + line + "\n")  # blank lines count, and are no rows
    with pytest.raises(rows.ResultsError, match=rf"some\.jsonl, line 4: {message}"):
        rows.read([path])


def test_files_that_are_none(tmp_path):
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").mkdir()
    for path, message in (("bytes.jsonl", "not UTF-8"), ("none.jsonl", "no such file"), ("empty", "no results")):
        with pytest.raises(rows.ResultsError, match=f"{path}: .*{message}"):
            rows.read([tmp_path / path])


def test_a_folder_is_all_its_files_and_later_rows_replace_earlier_ones(tmp_path):
    write(tmp_path / "a.jsonl", row(median_ms=1.0), run_line())
    write(tmp_path / "b.jsonl", row(median_ms=2.0), row(median_ms=3.0, cuda="13.0"))
    (tmp_path / "notes.txt").write_text("no rows")
    found = rows.read([tmp_path])
    assert [r.median_ms for r in found.rows] == [2.0, 3.0] and len(found.runs) == 1
    assert found.machines() == ["A CPU, AVX2, 2 threads", "A CPU"], "on a GPU the host's threads do not matter"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.jsonl")), ids=lambda file: file.stem)
def test_a_row_that_is_read_and_written_again_is_the_same_line(file, tmp_path):
    """The committed rows, and keys that a newer version may have added."""
    lines = file.read_text(encoding="utf-8").splitlines()
    newer = json.dumps(json.loads(lines[-1]) | {"watts": 300.5})
    for line in [*lines, newer]:
        assert rows.from_json(line).to_json() == line
    again = tmp_path / "again.jsonl"
    again.write_text("\n".join(lines), encoding="utf-8")
    first = rows.read([again]).rows[0]
    rows.write(again, [first], rows.Run(device="A CPU", ops=["a new one"]))
    written = again.read_text(encoding="utf-8").splitlines()
    assert len(written) == len(lines) + 1 and set(lines) < set(written) and written[-1] == first.to_json()


# --- comparing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "verdict"),
    [
        (Spread(1.3, 1.2, 1.4), "slower"),
        (Spread(0.7, 0.6, 0.8), "faster"),
        (Spread(1.0, 0.9, 1.1), "same"),
        (Spread(1.08, 1.07, 1.09), "same"),  # beyond both spreads, below the threshold
        (Spread(1.3, 0.95, 1.5), "same"),  # its own rounds reach down to what the other's took
        (Spread(0.8, 0.7, 1.02), "same"),
    ],
)
def test_a_change_must_be_beyond_the_threshold_and_both_spreads(head, verdict):
    assert compare.judge(Spread(1.0, 0.95, 1.05), head, 0.1) == verdict


def test_a_median_within_the_other_runs_spread_is_no_change():
    assert compare.judge(Spread(1.0, 0.9, 1.4), Spread(1.3, 1.28, 1.32), 0.1) == "same"


def test_what_counts_is_the_ratio_to_the_same_peers(tmp_path):
    """A machine that is half as fast today is no slowdown; a call that lost to its peers is one, on any machine."""
    base = [row(), row("torch", 20.0, 2.0), row("torch.compile", 15.0, 1.5)]
    slower_machine = [row(median_ms=20.0), row("torch", 40.0, 2.0), row("torch.compile", 30.0, 1.5)]
    (change,) = comparison(tmp_path, base, slower_machine).changes
    assert change.verdict == "same" and change.factor == pytest.approx(1.0)
    assert change.measured == "against torch, torch.compile"
    slower_call = [row(median_ms=9.0), row("torch", 12.0, 1.333), row("torch.compile", 9.0, 1.0)]
    (change,) = comparison(tmp_path, base, slower_call).changes
    assert change.verdict == "slower" and change.factor == pytest.approx(1.5, rel=1e-3)


def test_more_than_half_of_the_peers_must_agree(tmp_path):
    base = [row(), row("torch", 20.0, 2.0), row("torch.compile", 20.0, 2.0)]
    head = [row(), row("torch", 20.0, 2.0), row("torch.compile", 13.0, 1.3)]  # the peer became faster
    assert comparison(tmp_path, base, head).changes[0].verdict == "same"


def test_without_the_same_peers_it_is_the_time(tmp_path):
    base, head = [row(), row("torch", 20.0, 2.0)], [row(median_ms=20.0), row("liger-kernel", 40.0, 2.0)]
    (change,) = comparison(tmp_path, base, head).changes
    assert (change.verdict, change.measured, change.factor) == ("slower", "by time", 2.0)
    other_torch = [row(torch="2.14.0"), row("torch", 10.0, 1.0, torch="2.14.0")]  # another PyTorch is another peer
    (change,) = comparison(tmp_path, base, other_torch).changes
    assert (change.verdict, change.measured) == ("same", "by time")


def test_one_round_decides_nothing(tmp_path):
    once = {"rounds": 1, "p20_ms": None, "p80_ms": None}
    (change,) = comparison(tmp_path, [row(**once)], [row(median_ms=30.0, **once)]).changes
    assert (change.verdict, change.factor) == ("undecided", 3.0)


def test_missing_and_new_cases_and_other_machines_are_listed(tmp_path):
    base = [row(), row(shape="gone"), row(device="An older CPU"), row("torch", shape="a peer alone")]
    found = comparison(tmp_path, base, [row(), row(op="attention")])
    assert [case[2] for case in found.missing] == ["gone"] and [case[1] for case in found.new] == ["attention"]
    assert found.other_machines == ["An older CPU, AVX2, 2 threads"] and not found.slower
    text = compare.summary(found, 0.1)
    for said in (
        "missing in HEAD:\n- embedding / gone / float32 / forward",
        "not in BASE:\n- attention",
        "An older CPU",
    ):
        assert said in text


def test_exit_codes_and_the_table(tmp_path, capsys):
    base = write(tmp_path / "base" / "cpu.jsonl", row(), row("torch", 20.0, 2.0), row(shape="a|b"))
    slow = write(tmp_path / "slow" / "cpu.jsonl", row(median_ms=15.0), row("torch", 20.0, 1.333), row(shape="a|b"))
    assert command(base, base) == 0
    assert command(base.parent, slow.parent, "--out", tmp_path / "table.md") == 1
    text = capsys.readouterr().out
    assert text.endswith((tmp_path / "table.md").read_text(encoding="utf-8"))
    table = [line for line in text.splitlines() if line.startswith("|")][-4:]
    assert len(set(map(len, table))) == 1, "straight columns"
    work = ["embedding", "B4 T64", "float32", "forward"]
    assert cells_of(table[2]) == [[*work, "10", "15", "+50.0 %", "slower", "against torch"]]
    assert "a\\|b" in table[3] and "1 slower, 1 same (beyond 10 % and both spreads)" in text
    assert command(base, slow, "--threshold", "0.6") == 0


def test_bad_usage_is_2(tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", row())
    gpu = write(tmp_path / "gpu.jsonl", row(device="A GPU", cuda="13.0"))
    other = write(tmp_path / "other.jsonl", row(op="attention"))
    (tmp_path / "bad.jsonl").write_text("not json\n")
    for arguments, message in (
        ((good, tmp_path / "none.jsonl"), "none.jsonl: no such file"),
        ((tmp_path / "bad.jsonl", good), "bad.jsonl, line 1: "),
        ((good, gpu), "nothing to compare: BASE measured A CPU, AVX2, 2 threads, HEAD A GPU"),
        ((good, other), "nothing to compare: the same device but no case in common"),
        ((good, good, "--out", tmp_path), "Is a directory"),
    ):
        assert command(*arguments) == 2
        assert message in capsys.readouterr().err
        assert command(*arguments, "--if-comparable") == (0 if "nothing to compare" in message else 2)
    for arguments in ((good,), (good, good, "--threshold", "nan"), (good, good, "--threshold", "-1")):
        with pytest.raises(SystemExit) as stopped:
            command(*arguments)
        assert stopped.value.code == 2


def test_it_runs_as_a_script_and_as_a_module(tmp_path):
    good = str(write(tmp_path / "good.jsonl", row()))
    for how in ([str(ROOT / "benchmarks" / "publish" / "compare.py")], ["-m", "fastgpt.benchmarks.publish.compare"]):
        done = subprocess.run([sys.executable, *how, good, good], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "1 same" in done.stdout, done.stderr


class Machine:
    """A clock on which a call takes the seconds given for it; the machine is up to three times slower by turns."""

    def __init__(self, seed: int) -> None:
        self.now, self.slowness, self.draw = 0.0, 1.0, random.Random(seed)

    def taking(self, seconds: float, call: Callable) -> Callable:
        def timed(*tensors, **options):
            self.now += seconds * self.slowness * self.draw.uniform(0.97, 1.03)
            return call(*tensors, **options)

        return timed

    def round(self, calls, iterations):
        times, self.slowness = [], self.draw.uniform(1.0, 3.0)
        for call in calls:
            start = self.now
            call()
            times.append(self.now - start)
        return times


def measured(path: Path, monkeypatch, *, seed: int, ours: float) -> Path:
    """Rows of a small comparison by the suite, in which torch takes 2 seconds and our layer norm as many as given."""

    machine = Machine(seed)

    class Shape(LayerNormShape):
        def peers(self, device):
            function = super().peers(device)["torch"]().function
            return {"torch": lambda: peers.Peer(machine.taking(2.0, function))}

    setting = Setting(torch.device("cpu"), seconds=0.0, min_rounds=15, min_time=0.0)
    session = Suite(setting, path)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "clock_of", lambda device: machine)
        patch.setattr(measure, "measure_ceilings", lambda device: Ceilings(1e10, 1e11, "float32"))
        patch.setattr(ops, "layer_norm", machine.taking(ours, ops.layer_norm))
        session.measure_contenders(op_work(setting, Shape(4, 8), "forward"))
    return path


def test_a_slow_kernel_is_caught_and_two_honest_runs_are_not(tmp_path, monkeypatch, capsys):
    base = measured(tmp_path / "base.jsonl", monkeypatch, seed=0, ours=1.0)
    again = measured(tmp_path / "again.jsonl", monkeypatch, seed=1, ours=1.0)
    slower = measured(tmp_path / "slower.jsonl", monkeypatch, seed=2, ours=1.3)
    assert command(base, again) == 0, capsys.readouterr().out
    assert command(base, slower) == 1
    assert re.search(r"layer_norm .* slower .* against torch ", capsys.readouterr().out)


# --- reporting -------------------------------------------------------------------------------------------------------


def some_results(tmp_path: Path) -> rows.Results:
    work = {"bytes": 4e6, "flops": 1e6, "roofline_fraction": 0.5}
    more = {"peak_bytes": 12_300_000, "parity_error_ratio": 0.9312, "extra": {"gb_per_s": 7.5049, "steps": None}}
    lines = [
        run_line(date="2026-01-02"),
        row(ratio=1.6, best_peer="torch.compile", verdict="faster", backend="native", **work, **more),
        row("torch", 20.0, 2.0, **work),
        row("torch.compile", 16.0, 1.6, **work),
        row(shape="B1|T1", ratio=1.01, best_peer="torch", verdict="noise", backend="native"),
        row("torch", 10.1, 1.01, shape="B1|T1"),
        row(op="import", direction="import", median_ms=1234.5, p20_ms=None, p80_ms=None, rounds=1),
    ]
    return rows.read([write(tmp_path / "rows.jsonl", *lines)])


def test_the_markdown_says_what_the_rows_say(tmp_path):
    text = report.markdown(some_results(tmp_path))
    assert text == report.markdown(some_results(tmp_path))
    assert "\n## A CPU, AVX2, 2 threads\n" in text
    assert "\ntorch 2.13.0, triton 3.9.0.\n" in text and "\nfloat32, forward, backend native.\n" in text
    lines = [" | ".join(cells) for cells in cells_of(text)]
    for line in (
        "embedding | forward | 2 | 1 | 1 | 0 | 1.01x | 1.27x | 1.60x",
        "B4 T64 | 10 (9.7 – 10.3) | 7.5 | 50 % | 12.3 | 0.93 | faster than torch.compile | 2.00x (1.94 – 2.06) | "
        "1.60x (1.55 – 1.65)",
        "B1\\|T1 | 10 (9.7 – 10.3) | – | – | – | – | noise against torch | 1.01x (0.98 – 1.04) | –",
        "B4 T64 | 1,230",  # an op without peers, measured once
        "embedding | float32 | 15.0 GB/s | 160 GFLOP/s | 2026-01-02",
        "liger-kernel | embedding | its kernels run on CUDA devices only",
    ):
        assert line in lines
    assert "![" in text and "![" not in report.markdown(some_results(tmp_path), pictures=None)


def test_the_page_and_its_pictures(tmp_path):
    found = some_results(tmp_path)
    html = report.write(found, tmp_path / "out").read_text(encoding="utf-8")
    pictures = {path.name for path in (tmp_path / "out" / "results").glob("*.png")}
    assert pictures == {f"a-cpu-avx2-2-threads-{name}.png" for name in ("embedding", "roofline")}
    linked = re.findall(r"\]\((results/.*?)\)", (tmp_path / "out" / "results.md").read_text(encoding="utf-8"))
    assert {f"results/{name}" for name in pictures} == set(linked)
    assert not re.search(r'(src|href)="(?!data:)', html) and "<script" not in html
    for embedded in re.findall(r'src="data:image/png;base64,([^"]+)"', html):
        assert base64.b64decode(embedded).startswith(b"\x89PNG")
    assert "B1|T1" in html and "faster than torch.compile" in html


def test_the_bars_are_the_ratios(tmp_path):
    (axes,) = report.ratio_figure("embedding", some_results(tmp_path).of_op("embedding")).axes
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == pytest.approx([2.0, 1.6, 1.01])
    spans = [list(line.get_xdata()) for line in axes.lines]
    assert spans[:3] == [pytest.approx([r * 0.97, r * 1.03]) for r in (2.0, 1.6, 1.01)], "noise bounds"
    assert spans[3] == [1.0, 1.0]
    assert axes.patches[2].get_alpha() < axes.patches[0].get_alpha(), "noise is pale"


def test_the_roofline_has_its_runs_ceilings_and_a_point_for_ours_and_the_best_peer(tmp_path):
    (axes,) = report.roofline_figure("A CPU", some_results(tmp_path)).axes
    roof, peer, ours = axes.lines
    assert max(roof.get_ydata()) == 160e9 and roof.get_ydata()[0] / roof.get_xdata()[0] == pytest.approx(15e9)
    assert list(ours.get_xdata()) == list(peer.get_xdata()) == [0.25]
    assert list(ours.get_ydata()) == pytest.approx([1e8]) and list(peer.get_ydata()) == pytest.approx([1e6 / 0.016])


def test_rows_with_nothing_but_a_time_make_a_report(tmp_path):
    bare = {key: row()[key] for key in ("kind", *NEEDED)}
    found = rows.read([write(tmp_path / "rows.jsonl", bare, run_line(ceilings=None, absent=None))])
    assert ["B4 T64", "10"] in cells_of(report.markdown(found))
    assert report.write(found, tmp_path / "out").exists()
    assert not list((tmp_path / "out").rglob("*.png"))


def test_no_rows_is_an_error(tmp_path):
    with pytest.raises(rows.ResultsError, match="no rows"):
        report.write(rows.read([write(tmp_path / "rows.jsonl", run_line())]), tmp_path / "out")


# --- quoting ---------------------------------------------------------------------------------------------------------


def test_what_documents_quote(tmp_path):
    trained = {"op": "time_to_loss", "shape": "small to 2.4 nats", "direction": "train", "extra": {"steps": 450}}
    whole = {"op": "recipe", "shape": "small", "direction": "train", "extra": {"steps": 2000, "val_loss": 1.87512}}
    step = {"op": "train_step", "direction": "step"}
    sampled = {"op": "generate", "shape": "16 new tokens", "direction": "generate"}
    ops = ("cross_entropy", "linear_cross_entropy", "embedding")
    kernels = [{"op": op, "shape": "9 x 5", "direction": "forward+backward"} for op in ops]
    write(
        tmp_path / "cpu.jsonl",
        row(median_ms=16_420.0, date="2026-01-02", commit="0123456789abcdef+", **trained),
        row("nanoGPT", 20_000.0, 1.25, **trained),
        row(median_ms=86_040.0, **whole),
        row(median_ms=36.26, **step),
        row("nanoGPT", 36.0, 0.99, verdict="noise", **step),
        row("lecture", 40.0, 1.1, verdict="faster", shape="another", **step),
        row(median_ms=36.3, shape="another", **step),
        row(median_ms=210.4, **sampled),
        row("nanoGPT", 900.0, 4.56, verdict="faster", **sampled),
        *(row(peak_bytes=2e6, **kernel) for kernel in kernels),
        *(row("torch", 5.0, 2.5, peak_bytes=5.5e6, **kernel) for kernel in kernels),
    )
    text = "".join(f"<!-- results: {name} cpu -->\nold\n<!-- end of results -->\n" for name in quotes.QUOTES)
    lines = quotes.with_quotes(text, tmp_path).replace("\n", " ")
    for said in (
        "`small to 2.4 nats`: 16.4 seconds of training, 450 steps; nanoGPT on the same batches takes 1.25x "
        "(1.21 – 1.29) as long (A CPU, AVX2, 2 threads, float32, torch 2.13.0, triton 3.9.0, 2026-01-02, commit "
        "0123456789+).",
        "`fastgpt train --preset small --data tinyshakespeare` ends, after 2000 steps and 86 seconds of training, at a "
        "validation loss of 1.875 nats per character (A CPU,",
        "| B4 T64            | 36.3 ms | 0.99x (noise) | –       |",
        "| another           | 36.3 ms | –             | 1.10x   |",
        "| one sequence  | fastgpt | nanoGPT |",
        "| 16 new tokens | 210 ms  | 4.56x   |",
        "2.50x (2.42 – 2.58) | 2.0 MB             | 5.5 MB  |",
    ):
        assert said in lines
    assert "old" not in lines
    document = tmp_path / "doc.md"
    document.write_text(text)
    assert quotes.main([str(document), "--results", str(tmp_path)]) == 0
    assert (
        document.read_text(encoding="utf-8")
        == quotes.with_quotes(text, tmp_path)
        == quotes.with_quotes(document.read_text(encoding="utf-8"), tmp_path)
    )


def test_a_quote_that_cannot_be_had_is_an_error(tmp_path, capsys):
    write(tmp_path / "cpu.jsonl", row(op="recipe"))
    for text, message in (
        ("<!-- results: weather cpu -->\n<!-- end of results -->", "weather: expected one of train_step"),
        ("<!-- results: train_step cpu -->\n<!-- end of results -->", "no row of FastGPT's for 'train_step'"),
        ("<!-- results: recipe cpu -->\n<!-- end of results -->", "'recipe' has no 'steps'"),
        ("<!-- results: recipe gpu -->\n<!-- end of results -->", "gpu.jsonl: no such file"),
    ):
        (tmp_path / "doc.md").write_text(text)
        assert quotes.main([str(tmp_path / "doc.md"), "--results", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err and (tmp_path / "doc.md").read_text(encoding="utf-8") == text
