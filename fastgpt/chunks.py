"""How many rows of logits `ops.linear_cross_entropy` holds at a time. `plan.py` asks, too, so this needs no PyTorch.

The bounds of a chunk do not depend on the cache sizes that a system reports: the last cache of a virtual machine
belongs to a whole socket, which other machines use, too.
"""

from __future__ import annotations

LARGEST_CHUNK = {"cpu": 2**23, "cuda": 2**26}  # logits: a CPU's stay near its caches, a GPU wants thousands of rows
SMALLEST_CHUNK = 2**20  # logits: 4 MB of float32, which any machine has
FEWEST_ROWS = 256  # with fewer, the products of a chunk take less time than reading and writing dW
PARTS = 12  # a twelfth of the logits, and what the products need beside it, are less than an eighth


def chunk_rows(n_rows: int, vocab_size: int, device_type: str = "cpu", copies: int = 1) -> int:
    """Rows per chunk: chunks of equal size, of at most LARGEST_CHUNK logits and about a twelfth of all of them.

    Where a twelfth is less than FEWEST_ROWS rows, or than SMALLEST_CHUNK logits, a chunk has that many. `copies` is how
    often the backend holds a chunk, in units of its logits.
    """
    rows = min(LARGEST_CHUNK.get(device_type, LARGEST_CHUNK["cpu"]) // vocab_size, n_rows // (PARTS * copies))
    rows = max(rows, FEWEST_ROWS, SMALLEST_CHUNK // vocab_size)
    n_chunks = max(1, -(-n_rows // rows))
    return max(1, -(-n_rows // n_chunks))
