"""Reads PTX, NVIDIA's virtual machine code, for waits that are missing before a result or shared memory is used.

Copies and products of tensor cores go on while a program runs. What they write must not be read, and what they read
must not be overwritten, before the program has waited for them. The compiler places these waits; a missing one shows
only now and then, as a wrong number on a GPU. `faults` follows the code through each loop twice and names each rule
(PTX ISA, "Asynchronous operations") that is broken:

    wgmma       the sums of a group are read only after wait_group; what an earlier turn of the loop multiplied has been
                waited for before shared memory is written again; no group is left at the end
    TMA         a copy announces its bytes to its barrier before it starts; each turn waits for as many barriers as its
                copies signal; nothing is multiplied before the first wait
    cp.async    a turn that copies also waits; what was waited for is read after a barrier of all warps
    tcgen05     products are committed to a barrier before sums are loaded, and sums have been loaded (wait::ld) before
                the next products may overwrite them
    local       no local memory, in which a thread's array or spilled registers would lie

Addresses are not followed, so the rules find a missing wait, not one for the wrong buffer.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_REGISTER = re.compile(r"%r\d+\b")
_LABEL = re.compile(r"(\$L__BB\w+):")
_BRANCH = re.compile(r"(@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$L__BB\w+)")
_SHARED_READ = ("ld.shared", "ldmatrix", "wgmma.mma_async", "tcgen05.mma")
_SHARED_WRITE = ("st.shared", "stmatrix", "cp.async.ca", "cp.async.cg", "cp.async.bulk.tensor")


def _parse(ptx: str) -> tuple[list[str], dict[str, int]]:
    """The instructions without their predicates, except for branches, and the index that each label stands for."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in ptx.splitlines():
        line = line.partition("//")[0].strip()
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif line.endswith(";"):
            lines.append(line if _BRANCH.match(line) else re.sub(r"^@!?%\w+\s+", "", line))
    return lines, labels


def _walk(lines: list[str], labels: dict[str, int]) -> Iterator[tuple[str, int]]:
    """The instructions in the order of a run that takes each loop twice, with the number of turns begun before.

    A conditional branch forward is passed by, and taken where it is met a third time, as the exit of a loop.
    """
    met = [0] * len(lines)
    at = turn = 0
    while at < len(lines) and lines[at] != "ret;":
        line = lines[at]
        yield line, turn
        branch = _BRANCH.match(line)
        at += 1
        if branch is None:
            continue
        met[at - 1] += 1
        target = labels[branch[2]]
        back = target < at
        taken = (met[at - 1] == 1 if back else met[at - 1] > 2) if branch[1] else met[at - 1] < 4
        if taken:
            at, turn = target, turn + back


@dataclass
class _State:
    """What is under way at one point of a run."""

    open: set[str] = field(default_factory=set)  # sums of products that no group has yet
    groups: list[tuple[set[str], int]] = field(default_factory=list)  # sums of each group, and the turn it began in
    announced: set[str] = field(default_factory=set)  # barriers that expect bytes
    waited_for_tma: bool = True
    unseen: bool = False  # copies were waited for, but the other warps' parts may not be there
    uncommitted: bool = False
    loading: bool = False  # tcgen05.ld may still be reading sums


def _in_flight(state: _State, line: str) -> Iterator[str]:
    """Registers of `line` that are still being written."""
    busy = state.open.union(*(sums for sums, _ in state.groups))
    if busy and not busy.isdisjoint(used := _REGISTER.findall(line)):
        yield f"{line.split()[0]} takes {', '.join(sorted(busy.intersection(used))[:2])} before the wait for it"


def _step(state: _State, line: str, turn: int) -> Iterator[str]:
    if line.startswith(_SHARED_READ) and state.unseen:
        yield f"{line.split()[0]} reads copies that other warps waited for, without a barrier"
    if line.startswith(_SHARED_WRITE) and any(begun < turn for _, begun in state.groups):
        yield f"{line.split()[0]} writes shared memory that products of an earlier turn may still read"
    if line.startswith("wgmma.mma_async"):
        if not state.waited_for_tma:
            yield "wgmma.mma_async multiplies before any wait for the copies"
        state.open.update(_REGISTER.findall(line[: line.index("}")]))
    elif line.startswith("wgmma.commit_group"):
        state.groups.append((state.open, turn))
        state.open = set()
    elif line.startswith("wgmma.wait_group"):
        left = int(re.findall(r"\d+", line)[-1])
        del state.groups[: max(0, len(state.groups) - left)]
    elif line.startswith("mbarrier.arrive.expect_tx"):
        state.announced.update(re.findall(r"\[(%r\d+)", line))
    elif line.startswith("cp.async.bulk.tensor") and ".shared::cta.global" in line:
        barrier = re.findall(r"\[(%r\d+)\]", line)[-1]
        if barrier not in state.announced:
            yield f"cp.async.bulk.tensor signals {barrier}, which expects no bytes"
        state.waited_for_tma = False
    elif line.startswith("mbarrier.try_wait"):
        state.waited_for_tma = True
    elif line.startswith("cp.async.wait_group"):
        state.unseen = True
    elif line.startswith("bar.sync"):
        state.unseen = False
    elif line.startswith("tcgen05.mma"):
        if state.loading:
            yield "tcgen05.mma may overwrite sums that are still being loaded"
        state.uncommitted = True
    elif line.startswith("tcgen05.commit"):
        state.uncommitted = False
    elif line.startswith("tcgen05.ld"):
        if state.uncommitted:
            yield "tcgen05.ld loads sums of products that were not committed to a barrier"
        state.loading = True
    elif line.startswith("tcgen05.wait::ld"):
        state.loading = False
    else:
        yield from _in_flight(state, line)


def _of_loops(lines: list[str], labels: dict[str, int]) -> Iterator[str]:
    """Each innermost loop that copies and reads shared memory also waits, for as many barriers as its copies signal."""
    branches = [(labels[match[2]], at) for at, line in enumerate(lines) if (match := _BRANCH.match(line))]
    loops = [(first, last) for first, last in branches if first <= last]
    for first, last in loops:
        if any(first <= other and end < last for other, end in loops):
            continue
        body = lines[first : last + 1]
        if not any(line.startswith(_SHARED_READ) for line in body):
            continue
        copies = [line for line in body if line.startswith("cp.async.bulk.tensor") and ".shared::cta.global" in line]
        barriers = {re.findall(r"\[(%r\d+)\]", line)[-1] for line in copies}
        waits = sum(line.startswith("mbarrier.try_wait") for line in body)
        if waits < len(barriers):
            yield f"a loop's copies signal {len(barriers)} barriers, and it waits for {waits}"
        if any(line.startswith(("cp.async.ca", "cp.async.cg")) for line in body) and not any(
            line.startswith("cp.async.wait_group") for line in body
        ):
            yield "a loop copies by cp.async and never waits for it"


def faults(ptx: str) -> list[str]:
    """The rules that the kernel in `ptx` breaks, in words; none where every wait is in its place."""
    lines, labels = _parse(ptx)
    found = [f"{line.split()[0]}: local memory" for line in lines if line.startswith(("ld.local", "st.local"))]
    found += _of_loops(lines, labels)
    state = _State()
    for line, turn in _walk(lines, labels):
        found += _step(state, line, turn)
    if state.open or state.groups:
        found.append("the kernel ends before the wait for its last products")
    return list(dict.fromkeys(found))
