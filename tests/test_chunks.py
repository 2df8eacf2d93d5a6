"""The chunks of logits of the fused loss: their size is bounded, whatever the sizes of the work."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastgpt.chunks import chunk_rows


@given(st.integers(0, 10**7), st.integers(1, 300_000), st.sampled_from(["cpu", "cuda", "mps"]), st.sampled_from([1, 3]))
def test_chunks_are_bounded(n_rows: int, vocab_size: int, device_type: str, copies: int) -> None:
    rows = chunk_rows(n_rows, vocab_size, device_type, copies)
    n_chunks = -(-n_rows // rows)
    floor = max(256, 2**20 // vocab_size)
    assert rows <= max(n_rows / (8 * copies), floor), "an eighth, and room for the products' own workspace"
    assert rows * vocab_size <= max(2**26, floor * vocab_size)
    assert n_chunks <= 1 or rows >= floor / 2, "deep enough for the products"
    assert n_chunks * rows - n_rows < max(n_chunks, 1), "of equal size"
