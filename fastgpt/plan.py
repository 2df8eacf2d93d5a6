"""What training on one or many GPUs will take, by arithmetic: memory, operations, bytes moved and time.

Everything follows from the settings of the model and of the run, and nothing is measured or allocated, so that a plan
of 1024 GPUs takes a moment on a laptop. Importing this needs no PyTorch.

A function below has one formula and its source. The counts (parameters, bytes that are kept for the backward pass,
operations, bytes of a collective) are tested against those of real models and processes; docs/scale.md has both. The
times are bounds: they take the machine's rates as given, and leave out the latency of a collective and the speed of
memory.

B sequences of T tokens in one process, C channels, H heads, V tokens in the vocabulary, L blocks, P parameters,
N processes, each with a GPU of its own. A gigabyte is 10**9 bytes.

Sources:
    Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models: activations of a block.
    Rajbhandari et al. 2020, ZeRO: bytes per parameter, and bytes moved where they are sharded.
    Chowdhery et al. 2022, PaLM, appendix B, and Hoffmann et al. 2022, Chinchilla, appendix F: operations.
    Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms: what a ring sends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from .chunks import chunk_rows
from .config import DTYPES, PARALLELS, ConfigError, GPTConfig

Shape = tuple[int, ...]
FLOAT32 = 4  # bytes: of weights, gradients and moments, and of the residual stream
GB = 10**9
TIMES = {  # the names of a step's times, and what a reader sees of them
    "compute": "computing",
    "communication": "sending",
    "overlapped": "all hidden",
    "not_overlapped": "nothing hidden",
}


def _expect(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class Job:
    """How a model is trained.

    Args:
        gpus: how many GPUs train together, N; each has a process of its own.
        parallel: ddp (each GPU has the whole model) or fsdp (each has a part of every parameter, gradient and moment);
            auto is ddp.
        batch_size: sequences of a micro-step over all processes, which share them equally.
        grad_accum: micro-steps per optimizer step.
        dtype: of the matrix products; auto is bfloat16, as in training on a GPU.
        activation_checkpointing: keep the input of each block alone, and compute the block again in backward.
    """

    gpus: int = 1
    parallel: str = "auto"
    batch_size: int = 1
    grad_accum: int = 1
    dtype: str = "auto"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("gpus", "batch_size", "grad_accum"):
            _expect(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        _expect(self.parallel in PARALLELS, "parallel", self.parallel, f"one of {', '.join(PARALLELS)}")
        _expect(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        is_half = self.is_sharded and self.dtype == "float16"
        _expect(not is_half, "dtype", self.dtype, "bfloat16 or float32 with parallel=fsdp, as in training")
        _expect(self.batch_size % self.gpus == 0, "batch_size", self.batch_size, f"a multiple of gpus={self.gpus}")

    @property
    def sequences(self) -> int:
        """B: sequences of a micro-step in one process."""
        return self.batch_size // self.gpus

    @property
    def is_sharded(self) -> bool:
        return self.parallel == "fsdp" and self.gpus > 1

    @property
    def compute_dtype(self) -> str:
        return "bfloat16" if self.dtype == "auto" else self.dtype

    @property
    def size(self) -> int:
        """Bytes of a number that the matrix products read and write."""
        return FLOAT32 if self.dtype == "float32" else 2


@dataclass(frozen=True)
class Cluster:
    """What the GPUs and the links between them can do. The defaults are those of nodes with eight H100.

    Args:
        memory_gb: gigabytes of a GPU, for the tensors of training; what CUDA and its allocator take beside them is not
            planned.
        flops: operations per second of a GPU's matrix products in the dtype of the plan.
        efficiency: the share of these operations that training reaches.
        bandwidth_gb_s: gigabytes per second that a GPU sends to another one of its node, in one direction.
        network_gb_s: gigabytes per second that a node sends to another one, in one direction, by all its adapters.
        gpus_per_node: GPUs of a node, which are linked without the network.
    """

    memory_gb: float = 80.0
    flops: float = 989e12
    efficiency: float = 0.4
    bandwidth_gb_s: float = 450.0
    network_gb_s: float = 400.0
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        for name in ("memory_gb", "flops", "bandwidth_gb_s", "network_gb_s"):
            _expect(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        _expect(0 < self.efficiency <= 1, "efficiency", self.efficiency, "a number in (0, 1]")
        for name in ("memory_gb", "flops", "efficiency", "bandwidth_gb_s", "network_gb_s"):
            # Beyond, a time or a size would be infinite.
            _expect(1e-30 <= getattr(self, name) <= 1e30, name, getattr(self, name), "a number from 1e-30 to 1e30")
        _expect(self.gpus_per_node >= 1, "gpus_per_node", self.gpus_per_node, "an integer of at least 1")


# ---- parameters ----


def block_shapes(cfg: GPTConfig) -> list[Shape]:
    """The shapes of the parameters of one block."""
    C = cfg.n_embd
    outputs = [3 * C, C]  # of qkv and proj, for each of C inputs
    matrices = [(n, C) for n in outputs]
    if cfg.feed_forward:
        matrices += [(4 * C, C), (C, 4 * C)]
    n_norms = (2 if cfg.feed_forward else 1) if cfg.norm != "none" else 0
    vectors = [(C,)] * n_norms
    if cfg.bias:
        vectors += [(C,)] * n_norms + [(rows,) for rows, _ in matrices]
    return [*matrices, *vectors]


def root_shapes(cfg: GPTConfig) -> list[Shape]:
    """The shapes of the parameters outside the blocks: embeddings, the last norm, and a head of its own if untied."""
    C = cfg.n_embd
    tables = [(cfg.vocab_size, C), (cfg.block_size, C)] + ([] if cfg.tie_weights else [(cfg.vocab_size, C)])
    norm = [(C,)] * (2 if cfg.bias else 1) if cfg.norm == "pre" else []
    return [*tables, *norm]


def count(shapes: Iterable[Shape], n_shards: int = 1) -> int:
    """Numbers in the largest shard. FSDP2 cuts each parameter along its rows, into parts of equal size but the last."""
    return sum(-(-shape[0] // n_shards) * prod(shape[1:]) for shape in shapes)


def parameters(cfg: GPTConfig, n_shards: int = 1) -> int:
    """Numbers in all parameters, P, or in the largest shard of each."""
    return count(root_shapes(cfg), n_shards) + cfg.n_layer * count(block_shapes(cfg), n_shards)


# ---- memory ----


def block_activations(cfg: GPTConfig, size: int) -> int:
    """Bytes per token that the backward pass of one block reads.

    After Korthikanti et al. 2022, section 4.1, with what is fused here: attention keeps the logsumexp of each row
    instead of T weights, dropout keeps a seed instead of a mask, and the norm keeps the residual stream in float32.
    """
    C, has_norm = cfg.n_embd, cfg.norm != "none"
    stream = FLOAT32 if cfg.residual else size
    norm = stream * C + 2 * FLOAT32 if has_norm else 0  # its input; mean and 1 / standard deviation
    attention = size * (C + 3 * C + C) + FLOAT32 * cfg.n_head  # input; q, k, v; output; logsumexp
    feed_forward = size * (C + 4 * C + 4 * C)  # input; before and after the activation
    return norm + attention + (norm + feed_forward if cfg.feed_forward else 0)


def block_inputs(cfg: GPTConfig, size: int) -> int:
    """Bytes per token of what all blocks read: the stream and, where the norm of the next block adds it, a branch.

    The first block reads no branch. A block of attention alone adds the branch that it reads, and no other, so that the
    second block of such a model reads the stream of the first.
    """
    stream, is_fused = FLOAT32 if cfg.residual else size, cfg.norm == "pre" and cfg.residual
    n_branches = cfg.n_layer - 1 if is_fused else 0
    n_streams = max(1, n_branches) if is_fused and not cfg.feed_forward else cfg.n_layer
    return cfg.n_embd * (stream * n_streams + size * n_branches)


def outer_activations(cfg: GPTConfig, size: int) -> int:
    """Bytes per token that are kept outside the blocks: tokens, targets, the last norm and the input of the head."""
    C = cfg.n_embd
    indices = 2 * 8  # int64
    mask = C if cfg.dropout > 0 else 0  # of the dropout after the embeddings, one byte a number
    norm = FLOAT32 * C + 2 * FLOAT32 if cfg.norm == "pre" else 0
    return indices + mask + norm + size * C


def seeds(cfg: GPTConfig) -> int:
    """Bytes of the seeds of dropout: one int64 for each attention, and for each branch that a norm adds."""
    n_branches = 2 if cfg.feed_forward else 1
    fused = n_branches if cfg.residual and cfg.norm != "none" else 0
    return 8 * cfg.n_layer * (1 + fused) if cfg.dropout > 0 else 0


def activations(cfg: GPTConfig, sequences: int, size: int, checkpointing: bool = False) -> int:
    """Bytes that a process keeps between forward and backward: with checkpointing, of each block its input alone."""
    blocks = block_inputs(cfg, size) if checkpointing else cfg.n_layer * block_activations(cfg, size)
    n_seeds = 0 if checkpointing else seeds(cfg)
    return sequences * cfg.block_size * (blocks + outer_activations(cfg, size)) + n_seeds


def logits_chunk(cfg: GPTConfig, sequences: int, size: int) -> int:
    """Bytes of the logits that `ops.linear_cross_entropy` holds at a time, on a GPU."""
    n_tokens = sequences * cfg.block_size
    return size * cfg.vocab_size * min(n_tokens, chunk_rows(n_tokens, cfg.vocab_size, "cuda"))


def head_gradients(cfg: GPTConfig, sequences: int, size: int) -> int:
    """Bytes of the gradients that the fused loss makes in forward: of its input, and of the head in float32."""
    return cfg.n_embd * (size * sequences * cfg.block_size + FLOAT32 * cfg.vocab_size)


def half_copies(cfg: GPTConfig, size: int, is_sharded: bool = False) -> int:
    """Bytes of the copies that autocast makes of the matrices that products read; none in float32.

    FSDP gathers a block's matrices in half precision, so that the head's alone is copied.
    """
    matrices = 0 if is_sharded else cfg.n_layer * count(shape for shape in block_shapes(cfg) if len(shape) == 2)
    return 0 if size == FLOAT32 else size * (matrices + cfg.vocab_size * cfg.n_embd)


def memory(cfg: GPTConfig, job: Job) -> dict[str, int]:
    """Bytes of a GPU by part, all that are held at once where backward begins, and what its first steps add.

    Weights, gradients and AdamW's two moments take 16 bytes per parameter (ZeRO, section 3.1); FSDP divides all of them
    by N, as ZeRO's third stage. It gathers the outer parameters, which both ends of the model read, in float32, and the
    block that is computed and the next one, and makes whole gradients of the outer parameters and of one block.
    """
    size, shard = job.size, parameters(cfg, job.gpus if job.is_sharded else 1)
    parts = {
        "weights": FLOAT32 * shard,
        "gradients": FLOAT32 * shard,
        "moments": 2 * FLOAT32 * shard,
        "activations": activations(cfg, job.sequences, size, job.activation_checkpointing),
        "logits_chunk": logits_chunk(cfg, job.sequences, size),
        "head_gradients": head_gradients(cfg, job.sequences, size),
        "half_precision_weights": half_copies(cfg, size, job.is_sharded),
    }
    if job.activation_checkpointing:
        parts["block_again"] = job.sequences * cfg.block_size * block_activations(cfg, size)
    if job.is_sharded:
        block, root = count(block_shapes(cfg)), count(root_shapes(cfg))
        parts["gathered_weights"] = FLOAT32 * root + size * 2 * block
        parts["whole_gradients"] = FLOAT32 * root + size * block
        parts["communication_buffers"] = size * block + FLOAT32 * max(root, block)  # gathered; gradients to be reduced
    else:
        parts["communication_buffers"] = 0  # gradients are views of DDP's buckets
    return parts


def largest_batch(cfg: GPTConfig, job: Job, cluster: Cluster) -> int:
    """The most sequences of a micro-step over all processes for which `memory` fits; 0 where one each does not."""

    def fits(sequences: int) -> bool:
        asked = dataclasses.replace(job, batch_size=sequences * job.gpus)
        return sum(memory(cfg, asked).values()) <= cluster.memory_gb * GB

    if not fits(1):
        return 0
    most = 1
    while fits(2 * most):
        most *= 2
    step = most
    while step := step // 2:  # `most` fits, and twice as many do not
        most += step if fits(most + step) else 0
    return most * job.gpus


# ---- operations ----


@dataclass(frozen=True)
class Flops:
    """Operations, a multiply-add as two: matrix products alone, attention as if nothing were masked."""

    forward: int
    backward: int  # with what activation checkpointing computes again

    @property
    def total(self) -> int:
        return self.forward + self.backward


def flops(cfg: GPTConfig, sequences: int, checkpointing: bool = False) -> Flops:
    """Of one micro-step of `sequences`, as `torch.utils.flop_counter` counts them.

    A matrix of n numbers takes 2 n operations per token forward and 4 n backward: the 6 N of PaLM and Chinchilla.
    Attention takes two products of T C forward. PaLM counts four more in backward; here it is five, because the scores
    are computed again instead of kept. Activation checkpointing computes a block again, but its last matrix only where
    a norm reads the result (post-norm).
    """
    n_tokens, C = sequences * cfg.block_size, cfg.n_embd
    matrices = 2 * n_tokens * count(shape for shape in block_shapes(cfg) if len(shape) == 2)
    product = 2 * n_tokens * cfg.block_size * C  # queries and keys, or weights and values
    head = 2 * n_tokens * C * cfg.vocab_size
    forward = matrices + 2 * product
    backward = 2 * matrices + 5 * product
    if checkpointing:
        last = 2 * n_tokens * C * (4 * C if cfg.feed_forward else C)
        backward += forward - (0 if cfg.norm == "post" else last)
    return Flops(cfg.n_layer * forward + head, cfg.n_layer * backward + 2 * head)


# ---- bytes between processes ----


def ring_all_reduce(n_bytes: float, n: int) -> float:
    """What each of n processes sends, to the last byte of which all have the sum: a reduce-scatter, then a gather."""
    return 2 * (n - 1) / n * n_bytes


def ring_half(n_bytes: float, n: int) -> float:
    """What each of n processes sends in an all-gather or a reduce-scatter of n_bytes in all."""
    return (n - 1) / n * n_bytes


@dataclass(frozen=True)
class Collective:
    """Tensors that all processes exchange in one step: of how many bytes, and what each process sends."""

    name: str
    n_bytes: int  # of the whole tensors
    sent: float
    phase: str  # forward or backward, in whose computation it can hide


def collectives(cfg: GPTConfig, job: Job) -> list[Collective]:
    """The exchanges of one optimizer step.

    DDP adds up the float32 gradients once, after the last micro-step (Li et al. 2020). In each micro-step FSDP gathers
    the blocks twice and the outer parameters once, because they stay whole, and scatters the sums of the gradients
    (ZeRO, section 7.2.2).
    """
    n = job.gpus
    if n == 1:
        return []
    if not job.is_sharded:
        gradients = FLOAT32 * parameters(cfg)
        return [Collective("all_reduce", gradients, ring_all_reduce(gradients, n), "backward")]
    blocks, root = n * cfg.n_layer * count(block_shapes(cfg), n), n * count(root_shapes(cfg), n)
    made = (
        ("all_gather_forward", job.size * blocks + FLOAT32 * root, "forward"),
        ("all_gather_backward", job.size * blocks, "backward"),
        ("reduce_scatter", FLOAT32 * (blocks + root), "backward"),
    )
    steps = job.grad_accum
    return [Collective(name, steps * n_bytes, ring_half(steps * n_bytes, n), phase) for name, n_bytes, phase in made]


# ---- time ----


def link(job: Job, cluster: Cluster) -> float:
    """Bytes per second at which each process sends.

    A ring over several nodes leaves and enters each node once, and its parts use the adapters of a node side by side:
    it is as fast as the slower of a GPU's link in the node and all the adapters of a node.
    """
    inside = job.gpus <= cluster.gpus_per_node
    return GB * (cluster.bandwidth_gb_s if inside else min(cluster.bandwidth_gb_s, cluster.network_gb_s))


def seconds(cfg: GPTConfig, job: Job, cluster: Cluster) -> dict[str, float]:
    """Of one step: computing, communicating, one after the other, and with all hidden that can be.

    DDP's exchange can hide behind the backward pass of the last micro-step alone, FSDP's behind the pass it belongs to.
    """
    of_step = flops(cfg, job.sequences, job.activation_checkpointing)
    rate = cluster.flops * cluster.efficiency
    forward, backward = (job.grad_accum * n / rate for n in (of_step.forward, of_step.backward))
    waits = {"forward": 0.0, "backward": 0.0}
    for exchange in collectives(cfg, job):
        waits[exchange.phase] += exchange.sent / link(job, cluster)
    communication = sum(waits.values())
    hides = backward if job.is_sharded else backward / job.grad_accum
    exposed = max(0.0, waits["forward"] - forward) + max(0.0, waits["backward"] - hides)
    compute = forward + backward
    return {
        "compute": compute,
        "communication": communication,
        "not_overlapped": compute + communication,
        "overlapped": compute + exposed,
    }


# ---- the plan ----


@dataclass(frozen=True)
class Plan:
    """A model, a job and a cluster, and what follows from them."""

    cfg: GPTConfig
    job: Job
    cluster: Cluster = dataclasses.field(default_factory=Cluster)

    @property
    def memory(self) -> dict[str, int]:
        return memory(self.cfg, self.job)

    @property
    def total_memory(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total_memory <= self.cluster.memory_gb * GB

    @property
    def largest_batch(self) -> int:
        return largest_batch(self.cfg, self.job, self.cluster)

    @property
    def n_parameters(self) -> int:
        return parameters(self.cfg)

    @property
    def tokens(self) -> int:
        """Of one step, over all processes."""
        return self.job.batch_size * self.job.grad_accum * self.cfg.block_size

    @property
    def flops(self) -> int:
        """Of one step in one process."""
        one = flops(self.cfg, self.job.sequences, self.job.activation_checkpointing)
        return self.job.grad_accum * one.total

    @property
    def sent(self) -> dict[str, float]:
        """Bytes that a process sends in one step."""
        return {exchange.name: exchange.sent for exchange in collectives(self.cfg, self.job)}

    @property
    def seconds(self) -> dict[str, float]:
        return seconds(self.cfg, self.job, self.cluster)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds["overlapped"]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": dataclasses.asdict(self.cfg) | {"parameters": self.n_parameters},
            "job": dataclasses.asdict(self.job) | {"parallel": self.way, "dtype": self.job.compute_dtype},
            "cluster": dataclasses.asdict(self.cluster),
            "memory_bytes": {**self.memory, "total": self.total_memory},
            "fits": self.fits,
            "largest_batch_size": self.largest_batch,
            "tokens_per_step": self.tokens,
            "flops_per_step_and_gpu": self.flops,
            "bytes_sent_per_step_and_gpu": self.sent,
            "seconds_per_step": self.seconds,
            "tokens_per_s": self.tokens_per_s,
        }

    @property
    def way(self) -> str:
        """How the processes work together, in a word."""
        if self.job.gpus == 1:
            return "alone"
        return "fsdp" if self.job.is_sharded else "ddp"

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(plan: Plan) -> list[str]:
    """A plan as a person reads it."""
    job, cluster = plan.job, plan.cluster
    each = f", {job.sequences:,} on each GPU" if job.gpus > 1 else ""
    accumulated = f", {job.grad_accum} micro-steps" if job.grad_accum > 1 else ""
    n_nodes = -(-job.gpus // cluster.gpus_per_node)
    nodes = f" in {n_nodes} nodes" if n_nodes > 1 else ""
    gpus = "1 GPU" if job.gpus == 1 else f"{job.gpus} GPUs{nodes}, {plan.way}"
    again = ", activation checkpointing" if job.activation_checkpointing else ""
    most = plan.largest_batch
    largest = f"the largest --batch-size that fits is {most:,}" if most else "not even one sequence on each GPU fits"
    fits = "fits" if plan.fits else "does not fit"
    return [
        f"model: {plan.n_parameters:,} parameters, {plan.cfg.block_size:,} tokens of context",
        f"on: {gpus}, {job.compute_dtype}{again}",
        f"batch: {job.batch_size:,} sequences{each}{accumulated}: {plan.tokens:,} tokens per step",
        "",
        f"memory of a GPU: {plan.total_memory / GB:,.2f} GB of {cluster.memory_gb:g} GB: {fits}; {largest}",
        *_table({name: f"{n / GB:,.2f} GB" for name, n in plan.memory.items() if n}),
        *([] if plan.fits else [f"less memory is taken with {' or with '.join(_savings(job))}"]),
        "",
        "one step, on each GPU:",
        *_table(
            {
                "operations": f"{plan.flops / 1e12:,.1f} TFLOP",
                **{f"{name}, sent": f"{n / GB:,.2f} GB" for name, n in plan.sent.items()},
                **{f"time, {shown}": f"{1e3 * plan.seconds[name]:,.1f} ms" for name, shown in TIMES.items()},
            }
        ),
        f"{plan.tokens_per_s:,.0f} tokens/s, where computing hides all of the sending that it can",
    ]


def _savings(job: Job) -> list[str]:
    """What a job that does not fit can still do, in words."""
    sharding = [] if job.is_sharded else [f"--parallel fsdp{' on several GPUs' if job.gpus == 1 else ''}"]
    computing_again = [] if job.activation_checkpointing else ["--activation-checkpointing"]
    return [*sharding, *computing_again, "a smaller --batch-size" if job.sequences > 1 else "a smaller model"]


def _table(cells: Mapping[str, str]) -> list[str]:
    """Names on the left, values below each other on the right."""
    left, right = (max(map(len, column)) for column in (cells.keys(), cells.values()))
    return [f"  {name.replace('_', ' ').ljust(left)}  {value.rjust(right)}" for name, value in cells.items()]
