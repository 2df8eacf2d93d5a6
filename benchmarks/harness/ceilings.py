"""What the machine can do at best: how fast it reads, writes and copies so many bytes, and how fast it multiplies.

A roofline compares the time that a piece of work took with the least time that the machine needs for it: the time to
move its bytes, or to do its matrix products, whichever is longer. Both depend on sizes. Bytes that fit into a cache
move several times faster than those in memory, and a product of few rows is slower than one of many. So the ceilings
are measured at the sizes of each piece of work, on as many threads, in the same run, just before it; and each by every
way that is known here, of which the fastest counts. Otherwise a row could be faster than its ceiling.

Where a size was not measured, the rule is a bound from above. Fewer bytes are never slower to move than more, so the
speed at a size is the largest that was measured at the next smaller size, or at any larger one.

On a GPU the cache is overwritten before each call, so that all bytes come from memory, and products are compared with
the fastest large one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fastgpt.ops.backend import unavailable
from fastgpt.ops.linear import MOST_ROWS

from .measure import Call, clock_of, interleave

MIXED = ("read", "write", "copy", "add")  # how bytes are moved; a call that reads and writes may do it like any of them
LEAST_BYTES, MOST_BYTES = 2**16, 2**30  # what bandwidths are measured with
SIZES = {"cpu": [2**n for n in range(18, 31, 2)], "cuda": [MOST_BYTES]}  # bytes, measured once in a run
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


class Product(NamedTuple):
    """A matrix product (m, k) x (k, n), and how often it is made."""

    m: int
    k: int
    n: int
    count: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        return self[:3]

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n * self.count


LARGE = {"cpu": Product(2048, 2048, 2048), "cuda": Product(8192, 8192, 8192)}


def linear_products(m: int, k: int, n: int, backward: bool, count: int = 1) -> list[Product]:
    """Those of a linear layer (k -> n) of m rows: its output; the gradients of its input and of its weight."""
    found = [Product(m, k, n, count)]
    return [*found, Product(m, n, k, count), Product(n, m, k, count)] if backward else found


@dataclass(frozen=True)
class Traffic:
    """The least that a call has to move, in bytes."""

    read: float
    written: float
    footprint: float  # different bytes; they may be read and written several times

    @property
    def total(self) -> float:
        return self.read + self.written


@dataclass(frozen=True)
class Demand:
    """The least that a call has to do."""

    traffic: Traffic | None = None
    flops: float | None = None
    products: tuple[Product, ...] = ()  # the products among `flops` whose shapes are known

    @property
    def n_bytes(self) -> float | None:
        return self.traffic.total if self.traffic else None


@dataclass(frozen=True)
class Bound:
    """The least seconds of a piece of work, and what it is bound by, in words."""

    seconds: float
    name: str


@dataclass
class Ceilings:
    """The best that was measured so far: bytes per second by (way of moving them, size), flops per second by shape."""

    dtype: str  # of the products
    moved: dict[tuple[str, int], float] = field(default_factory=dict)
    multiplied: dict[tuple[int, int, int], float] = field(default_factory=dict)

    def merge(self, other: Self) -> None:
        for mine, theirs in ((self.moved, other.moved), (self.multiplied, other.multiplied)):
            mine.update({key: max(rate, mine.get(key, 0.0)) for key, rate in theirs.items()})

    def bandwidth(self, footprint: float, ways: Iterable[str] = MIXED) -> float:
        """Bytes per second by the fastest of `ways`, for work on so many different bytes."""
        sizes = sorted({size for _, size in self.moved})
        below = max((size for size in sizes if size <= footprint), default=sizes[0])
        return max(rate for (way, size), rate in self.moved.items() if way in ways and size >= below)

    def product_rate(self, shape: tuple[int, int, int]) -> float:
        """Flops per second of a product; the fastest of all for a shape that was not measured."""
        return self.multiplied.get(shape) or max(self.multiplied.values())

    def bound(self, work: Demand) -> Bound | None:
        """None where nothing is known of what the work has to do."""
        bounds = [*self._bounds_of_traffic(work.traffic), *self._bound_of_products(work)]
        return max(bounds, key=lambda bound: bound.seconds, default=None)

    def _bounds_of_traffic(self, traffic: Traffic | None) -> Iterator[Bound]:
        if traffic is None or not traffic.total:
            return
        for what, n_bytes, ways in (
            ("reading", traffic.read, ("read",)),
            ("writing", traffic.written, ("write",)),
            ("moving", traffic.total, MIXED),
        ):
            rate = self.bandwidth(traffic.footprint, ways)
            yield Bound(n_bytes / rate, f"{what} {traffic.footprint / 1e6:.3g} MB at {rate / 1e9:.3g} GB/s")

    def _bound_of_products(self, work: Demand) -> Iterator[Bound]:
        if not work.flops:
            return
        seconds = sum(product.flops / self.product_rate(product.shape) for product in work.products)
        others = work.flops - sum(product.flops for product in work.products)
        seconds += max(0.0, others) / max(self.multiplied.values())
        yield Bound(seconds, f"products at {work.flops / seconds / 1e9:.4g} GFLOP/s")

    def to_json(self) -> dict[str, Any]:
        """For the line of a run. The first two are those of the largest copy and of the fastest product."""
        largest = max(size for _, size in self.moved)
        moved = [[way, size, round(rate)] for (way, size), rate in sorted(self.moved.items())]
        return {
            "bytes_per_s": self.moved["copy", largest],
            "flops_per_s": max(self.multiplied.values()),
            "dtype": self.dtype,
            "moved": moved,
            "products": [[*shape, round(rate)] for shape, rate in sorted(self.multiplied.items())],
        }


# What a rehearsal has.
MADE_UP = Ceilings("float32", dict.fromkeys(((way, MOST_BYTES) for way in MIXED), 1e9), {(1, 1, 1): 1e9})


# --- measuring -------------------------------------------------------------------------------------------------------


def measure_ceilings(device: torch.device, work: Demand, known: Ceilings | None = None) -> Ceilings:
    """What is not `known` of the sizes of a piece of work and, where nothing is known, of SIZES and a large product.

    On a GPU all is measured each time, because its speed changes with its clock, and the large sizes alone.
    """
    found = Ceilings(str(DTYPES[device.type]).removeprefix("torch."))
    sizes, shapes = SIZES[device.type], [LARGE[device.type].shape]
    if device.type == "cuda":
        known = None
    else:
        sizes = [_size_of(work), *(sizes if known is None else [])]
        shapes = [*(product.shape for product in work.products), *(shapes if known is None else [])]
    for size in sizes:
        if known is None or ("copy", size) not in known.moved:
            found.merge(_of_bytes(size, device, found.dtype))
    for shape in dict.fromkeys(shapes):
        if known is None or shape not in known.multiplied:
            found.merge(_of_product(shape, device, found.dtype))
    return found


def _size_of(work: Demand) -> int:
    footprint = work.traffic.footprint if work.traffic else MOST_BYTES
    return int(min(max(footprint, LEAST_BYTES), MOST_BYTES))


def _of_bytes(size: int, device: torch.device, dtype: str) -> Ceilings:
    """Bytes per second where `size` bytes are read, or written, or the one half copied to the other, or two thirds
    added up into the last."""
    memory = torch.ones(size // 4, device=device)
    half, third = memory.chunk(2), memory[: len(memory) // 3 * 3].chunk(3)
    calls = {
        "read": [memory.sum, *_our_reader(memory)],
        "write": [memory.zero_],
        "copy": [lambda: half[0][: len(half[1])].copy_(half[1])],
        "add": [lambda: torch.add(third[0], third[1], out=third[2])],
    }
    best = {way: _fastest(ways, device) for way, ways in calls.items()}
    return Ceilings(dtype, moved={(way, size): size / seconds for way, seconds in best.items()})


def _our_reader(memory: Tensor) -> list[Call]:
    """One row times a matrix, by the extension's kernel, which does little but read the matrix."""
    width = 1024
    if memory.device.type != "cpu" or unavailable("native", "cpu") or len(memory) < width:
        return []
    matrix, row = memory[: len(memory) // width * width].view(-1, width), torch.ones(1, width)
    return [lambda: torch.ops.fastgpt.linear_native(row, matrix, None)]


def _of_product(shape: tuple[int, int, int], device: torch.device, dtype: str) -> Ceilings:
    m, k, n = shape
    a, b = (torch.randn(*size, device=device, dtype=DTYPES[device.type]) for size in ((m, k), (k, n)))
    seconds = _fastest(list(_ways_to_multiply(a, b)), device)
    return Ceilings(dtype, multiplied={shape: Product(*shape).flops / seconds})


def _ways_to_multiply(a: Tensor, b: Tensor) -> Iterator[Call]:
    """PyTorch's matrix library, and on a CPU the extension's kernels, with both orders of `b` in memory."""
    out, transposed = a.new_empty(a.shape[0], b.shape[1]), b.t().contiguous()
    yield lambda: torch.mm(a, b, out=out)
    if a.device.type == "cpu" and not unavailable("native", "cpu"):
        yield lambda: torch.ops.fastgpt.matmul_(a, b, out, False)
        yield lambda: torch.ops.fastgpt.matmul_(a, transposed.t(), out, False)
        if len(a) <= MOST_ROWS[a.dtype]:
            yield lambda: torch.ops.fastgpt.linear_native(a, transposed, None)


def _fastest(calls: Sequence[Call], device: torch.device) -> float:
    """Seconds of the fastest call, in the best of some rounds."""
    with torch.no_grad():
        named = dict(zip(map(str, range(len(calls))), calls, strict=True))
        times = interleave(named, clock_of(device), seconds=0.03, min_rounds=3, warmups=1, min_time=1e-3)
    return min(min(rounds) for rounds in times.values())
