"""Text in batches to tokens, in the order of the text, by as many processes as are asked for.

A batch has pieces of documents, cut where a cut changes no token. This process reads the text, and the others tokenize
it: a piece has to be read to know where it can be cut.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from ..bpe import cut
from ..tokenizer import CharTokenizer, Tokenizer, tokenizer_from_json
from .shards import token_dtype

Batch = list[tuple[str, bool]]  # pieces of text, and whether a document ends behind each
Encoded = tuple[np.ndarray, list[int], int]  # tokens, numbers of them at the ends of documents, characters
BATCH_CHARACTERS = 1 << 19
_WAITING = 3  # batches for each process


def batches_of(documents: Iterable[Iterable[str]], with_ends: bool) -> Iterator[Batch]:
    """Batches of at least BATCH_CHARACTERS, but for the last, of documents that are given in pieces.

    They are the same each time. Empty documents are left out.
    """
    batch: Batch = []
    size = 0
    for document in documents:
        pieces: list[str] = []
        for piece in cut(document):
            if size >= BATCH_CHARACTERS:
                yield [*batch, ("".join(pieces), False)]
                batch, pieces, size = [], [], 0
            pieces.append(piece)
            size += len(piece)
        if pieces:
            batch.append(("".join(pieces), with_ends))
    if batch:
        yield batch


def encode(batch: Batch, tokenizer: Tokenizer) -> Encoded:
    """The tokens of a batch, in the dtype of shards; an `end_of_text` behind each document."""
    dtype = token_dtype(tokenizer)
    parts, ends, n = [], [], 0
    for text, is_end in batch:
        parts.append(tokenizer.encode_array(text).astype(dtype))
        n += len(parts[-1])
        if is_end:
            parts.append(np.array([tokenizer.end_of_text], dtype))
            n += 1
            ends.append(n)
    return np.concatenate(parts), ends, sum(len(text) for text, _ in batch)


def encoded(batches: Iterable[Batch], tokenizer: Tokenizer, processes: int) -> Generator[Encoded, None, None]:
    """`encode` of each batch, in their order. Raises ValueError for text that the tokenizer cannot encode.

    Characters are looked up in this process: to send the text to another one takes longer.
    """
    if processes == 1 or isinstance(tokenizer, CharTokenizer):
        yield from (encode(batch, tokenizer) for batch in batches)
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin, (tokenizer.to_json(),))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode, batch))
            if len(waiting) >= _WAITING * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a process that tokenizes was ended from outside, perhaps for lack of memory: give fewer --processes; the "
            "same command goes on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# ---- in the other processes ----


_tokenizer: Tokenizer


def _begin(tokenizer: str) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets it too, ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = tokenizer_from_json(tokenizer)


def _end_with_parent() -> None:
    """A parent that is killed cannot end this process, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(batch: Batch) -> Encoded:
    return encode(batch, _tokenizer)
