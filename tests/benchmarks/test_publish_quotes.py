"""What documents quote of the rows."""

from __future__ import annotations

import re
from pathlib import Path

from benchmark_rows import row, run_line, write
from fastgpt.benchmarks.publish import quotes, report, rows
from fastgpt.config import GPTConfig
from fastgpt.plan import Job, Plan

ROOT = Path(__file__).resolve().parents[2]


def test_what_documents_quote(tmp_path):
    trained = {"op": "time_to_loss", "shape": "small to 2.4 nats", "direction": "train", "extra": {"steps": 450}}
    whole = {"op": "recipe", "shape": "small", "direction": "train", "extra": {"steps": 2000, "val_loss": 1.87512}}
    step = {"op": "train_step", "direction": "step"}
    sampled = {"op": "generate", "shape": "16 new tokens", "direction": "generate"}
    ops = ("cross_entropy", "linear_cross_entropy", "embedding")
    times = {"compute": 20.0, "communication": 5.0, "overlapped": 20.0, "not_overlapped": 25.0}
    counts = {"counted": {"weights": 4096, "all_reduce": 4096}, "planned": {"weights": 4096, "all_reduce": 4095}}
    scaled = {"op": "scale", "shape": "2 processes, ddp, B4 T8", "direction": "step"}
    data = {"op": "data", "shape": "10 MB of text", "extra": {"peak_mb": 59, "own_mb": 41}}
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
        row(median_ms=812.0, op="patch", shape="a GPT-2", direction="step"),
        row("transformers sdpa", 900.0, 1.11, verdict="faster", op="patch", shape="a GPT-2", direction="step"),
        row(median_ms=210.4, **sampled),
        row(median_ms=50.0, extra={"planned_ms": times, **counts}, **scaled),
        row("nanoGPT", 900.0, 4.56, verdict="faster", **sampled),
        row(median_ms=1234.5, direction="prepare", **data),
        row(median_ms=98.7, direction="start", **data),
        row(median_ms=0.456, direction="step", **data | {"shape": "10 MB of text, B2 T8"}),
        *(row(peak_bytes=2e6, **kernel) for kernel in kernels),
        *(row("torch", 5.0, 2.5, peak_bytes=5.5e6, **kernel) for kernel in kernels),
    )
    names = [name for name in quotes.QUOTES if not name.startswith("gpu_")]
    text = "".join(f"<!-- results: {name} cpu -->\nold\n<!-- end of results -->\n" for name in names)
    lines = quotes.with_quotes(text, tmp_path).replace("\n", " ")
    for said in (
        "`small to 2.4 nats`: 16.4 seconds of training, 450 steps; nanoGPT takes 1.25x "
        "(1.21 – 1.29) as long (A CPU, AVX2, 2 threads, float32, torch 2.13.0, triton 3.9.0, 2026-01-02, commit "
        "0123456789+).",
        "`fastgpt train --preset small --data tinyshakespeare` ends, after 2000 steps and 86 seconds of training, at a "
        "validation loss of 1.875 nats per character (A CPU,",
        "| B4 T64            | 36.3 ms | 0.99x (noise) | –       |",
        "| another           | 36.3 ms | –             | 1.10x   |",
        "| a GPT-2                    | 812 ms  | 1.11x             |",
        "the bytes of what all exchange in a step (B4 T8): ",
        "| all reduce |                     4,095 |                     4,096 |",
        "| 2 processes, ddp | 50 ms    | 20 ms              | 5 ms             | 20 ms               | 25 ms     ",
        "| 2.00x                     |",
        "| one sequence  | fastgpt | nanoGPT |",
        "| 16 new tokens | 210 ms  | 4.56x   |",
        "| 10 MB | 1.23 s     | 59 MB  | 98.7 ms  | 0.456 ms        | 41 MB               |",
        "2.50x (2.42 – 2.58) | 2.0 MB             | 5.5 MB  |",
    ):
        assert said in lines
    assert " old " not in lines
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
        ("<!-- results: recipe tpu -->\n<!-- end of results -->", "tpu.jsonl: no such file"),
    ):
        (tmp_path / "doc.md").write_text(text)
        assert quotes.main([str(tmp_path / "doc.md"), "--results", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err and (tmp_path / "doc.md").read_text(encoding="utf-8") == text


def test_a_document_has_plans():
    text = "<!-- plan of 1 16 GPUs: --preset gpt2 --parallel fsdp -->\nold\n<!-- end of plan -->\n"
    written = quotes.with_quotes(text, ROOT)
    lines = written.splitlines()
    assert "old" not in lines and quotes.with_quotes(written, ROOT) == written
    assert lines[1].startswith("Memory of each GPU in GB, by `fastgpt plan --preset gpt2 --parallel fsdp --gpus N`")
    plan = Plan(GPTConfig.preset("gpt2"), Job(16, "fsdp", 16 * 12))
    (memory, step) = (line.strip("| ").split(" | ") for line in lines if line.startswith("|   16 |"))
    assert memory[6].strip() == f"{plan.total_memory / 1e9:.2f}" and memory[7].strip() == f"{plan.largest_batch:,}"
    assert step[3].strip() == f"{1e3 * plan.seconds['compute']:.1f}"


GPU = {
    "device": "NVIDIA Made Up",
    "cuda": "13.0",
    "dtype": "bfloat16",
    "date": "2026-01-02",
    "commit": "0123456789abcdef",
}


def gpu_rows(out: Path) -> Path:
    """What a GPU check leaves in its folder; the figures are made up."""
    attention = {"op": "attention", "shape": "B16 H12 T1024 D64 causal", **GPU}
    step = {"op": "train_step", "direction": "step", "verdict": "faster", **GPU}
    write(
        out / "nvidia-made-up.jsonl",
        run_line(**GPU),
        row(
            median_ms=0.25, ratio=1.2, best_peer="sdpa cudnn", roofline_fraction=0.61, eager_ms=0.3, graph_ms=0.24,
            verdict="faster", **attention,
        ),
        row("sdpa cudnn", 0.3, 1.2, verdict="faster", graph_ms=0.36, **attention),
        row(median_ms=30.0, shape="B16 T1024", extra={"tokens_per_s": 546_000.0}, **step),
        row(median_ms=27.3, shape="B16 T1024, CUDA graph", extra={"tokens_per_s": 600_000.0}, best_peer="nanoGPT",
            ratio=1.4, **step),
        row("nanoGPT", 38.2, 1.4, shape="B16 T1024, CUDA graph", **step),
        row(median_ms=9.0, shape="B64 T256", extra={"tokens_per_s": 1_800_000.0}, **step),
        row(median_ms=25.6, op="generate", shape="L12, 128 new tokens", direction="generate",
            extra={"tokens_per_s": 5000.0}, **GPU),
        row(median_ms=29_000.0, op="recipe", shape="shakespeare-char to 1.4697 nats", direction="train", **GPU),
    )  # fmt: skip
    return out


def test_a_gpu_checks_rows_make_the_results_the_kernels_times_and_the_readmes_lines(tmp_path):
    """The way of `make results`, from the committed rows and those of a GPU."""
    results = gpu_rows(tmp_path / "results")
    write(results / "cpu.jsonl", row(median_ms=3.0))
    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/kernels.md")}
    blocks, before = {}, {}
    for name, text in pages.items():
        (block,) = re.findall(r"<!-- results: \S+ gpu -->\n.*?<!-- end of results -->\n", text, re.DOTALL)
        (tmp_path / Path(name).name).write_text(block, encoding="utf-8")
        before[name] = block
        assert quotes.main([str(tmp_path / Path(name).name), "--results", str(results)]) == 0
        blocks[name] = (tmp_path / Path(name).name).read_text(encoding="utf-8")
    said = blocks["README.md"].replace("\n", " ")
    assert "training, `B16 T1024, CUDA graph`: 600,000 tokens/s (nanoGPT takes 1.40x)" in said
    assert (
        "generation, `L12, 128 new tokens`: 5,000 tokens/s" in said and "29 seconds (NVIDIA Made Up, bfloat16" in said
    )
    readme = pages["README.md"].replace(before["README.md"], blocks["README.md"])
    assert len(readme.splitlines()) < 200, "the README has room for them"
    assert re.search(
        r"causal +\| +0.24 +\| sdpa cudnn +\| 1.50x +\| +0.25 +\| sdpa cudnn +\| 1.20x", blocks["docs/kernels.md"]
    )
    page = report.markdown(rows.read([results]))
    assert "\n## NVIDIA Made Up\n" in page and "20 %" in page and "host's share" in page
    (tmp_path / "none").mkdir()
    write(tmp_path / "none" / "cpu.jsonl", row())
    assert quotes.NOT_MEASURED in quotes.with_quotes(blocks["docs/kernels.md"], tmp_path / "none")
