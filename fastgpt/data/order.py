"""The order of epochs: every example once before any comes again, shuffled anew each time, in no memory.

A shuffled list of all examples would need memory that grows with the corpus. Here the example at each place of an epoch
is computed, by a permutation that a key chooses: a Feistel network over the numbers below a * b. Its round takes a pair
(left, right) to (right, left + F(right)), which can be undone whatever F is, so that no number comes twice. a * b is at
least the number of examples, and hardly more. The few numbers above are sent through the network again until they fall
below, which keeps it a permutation (cycle walking).

Sources: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002; Bellare, Ristenpart, Rogaway and Stegers,
"Format-Preserving Encryption", 2009, whose FE1 this follows; F is the finaliser of SplitMix64 (Steele et al., 2014).
"""

from __future__ import annotations

import math

import numpy as np

_UINT64 = 2**64 - 1
_ROUNDS = 8  # even, so that left and right have changed places back


def philox(seed: int, number: int) -> np.random.Generator:
    """The generator of the step, or of the epoch, `number`. It follows from the two alone."""
    return np.random.Generator(np.random.Philox(key=np.array([seed & _UINT64, number & _UINT64], dtype=np.uint64)))


def epoch_size(n_examples: int, stride: int) -> int:
    """Examples of an epoch: every `stride`-th, as many as there are from any offset below `stride`."""
    return max(1, n_examples // stride)


def of_epochs(places: np.ndarray, n_examples: int, stride: int, seed: int) -> np.ndarray:
    """The examples, below `n_examples`, at `places` (N,) of the epochs that follow one another from place 0 on.

    An epoch has the examples offset, offset + stride, offset + 2 stride, ...: its offset and their order are drawn
    for each epoch.
    """
    n = epoch_size(n_examples, stride)
    found = np.empty(len(places), dtype=np.int64)
    epochs = places // n
    for epoch in np.unique(epochs).tolist():
        generator = philox(seed, epoch)
        offset = generator.integers(0, min(stride, n_examples))
        keys = generator.integers(0, 2**64, size=_ROUNDS, dtype=np.uint64)
        here = epochs == epoch
        found[here] = offset + stride * permuted(places[here] % n, n, keys)
    return found


def permuted(numbers: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of range(n), n at most 2**62, applied to `numbers` (N,): int64 (N,). `keys`, an even number of
    uint64, choose the permutation."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    found = _network(numbers.astype(np.uint64), a, b, keys)
    while (outside := found >= n).any():
        found[outside] = _network(found[outside], a, b, keys)
    return found.astype(np.int64)


def _network(numbers: np.ndarray, a: int, b: int, keys: np.ndarray) -> np.ndarray:
    """The Feistel network: a permutation of range(a * b)."""
    sizes = np.array([a, b], dtype=np.uint64)
    left, right = numbers // sizes[1], numbers % sizes[1]  # below a, below b
    for i, key in enumerate(keys):
        left, right = right, (left + _mixed(right + key)) % sizes[i % 2]
    return left * sizes[1] + right


def _mixed(values: np.ndarray) -> np.ndarray:
    """32 bits of a hash of each uint64; adding a number below 2**32 to them does not overflow."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values >> np.uint64(32)
