"""What documents quote of the rows."""

from __future__ import annotations

from benchmark_rows import row, write
from fastgpt.benchmarks.publish import quotes


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
