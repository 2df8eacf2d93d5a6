"""Layer norm over rows in Triton, alone and fused with the dropout and the residual add that come before it.

For a row of C columns (Ba et al. 2016, arXiv:1607.06450), with M the dropout mask, 0 or 1 / (1 - p) for each element:

    h = residual + M * x        (`add_layer_norm`; for `layer_norm` h is x)
    mean = sum(h) / C        rstd = 1 / sqrt(sum((h - mean)^2) / C + eps)        x_hat = (h - mean) * rstd
    y = x_hat * weight + bias

With dy and dh the gradients of the outputs y and h, and g = dy * weight:

    dresidual = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) + dh        dx = M * dresidual
    dweight = sum over rows of dy * x_hat        dbias = sum over rows of dy

What is fused, forward: dropout, add and norm. A row is read once, stays in registers while its mean and then its
variance are computed, and is written once. Two passes over the registers lose no digits where the mean is large. The
dropout mask is drawn in registers and not stored.

What is fused, backward: the gradients of h, x and residual, and the sums for weight and bias. Each program goes over
many rows, and while it works on some, the next ones are copied into shared memory. It keeps its own sums in registers
and writes them once, as one float32 row; the rows of all programs are then added up. No atomic additions are needed,
and the same inputs give the same bits every time. A gradient that nobody asks for (of a frozen weight, or of an input
that needs none) is neither computed nor written.

Above `MAX_FUSED_WIDTH` columns, a row does not fit the registers beside its gradient and the sums. There one kernel
computes the gradient of h block by block, going over the row twice, and another one, tiled over columns, the sums.

Memory traffic in bytes for each element, in 16 bits:

                                        here               separate kernels for dropout, add and norm
    layer_norm, forward                 2 + 2              the same
    add_layer_norm, forward             4 + 4              (2 + 1 + 2) + (2 + 2 + 2) + (2 + 2) = 15, a byte for the mask
    add_layer_norm, backward            6 + 4              (4 + 2) + (4 + 2) + (2 + 1 + 2) = 17
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import keep_tile, last_dropped
from .rounding import round_to
from .target import architecture, cdiv, device_of, multiprocessors, next_power_of_2
from .tuned import tunable

MAX_FUSED_WIDTH = 4096
# Of the backward kernels whose programs go over many rows. With up to 128 registers a thread, so many run at one time;
# programs that had to wait for others to end would double the time. Adding up their partial sums takes little of it.
_WARPS_PER_MULTIPROCESSOR = 16
# No a * b + c as one instruction: weight * grad_y would be rounded in its mean, but not where that is subtracted.
# In a row of equal values that error is all that is left of the gradient, times 1 / sqrt(eps).
_OPTIONS = {"enable_fp_fusion": False}
# For the two backward kernels of wide rows. 128 columns are whole lines of 128 bytes in every dtype.
WIDE_CONFIG = {"BLOCK": 4096, "num_warps": 8, **_OPTIONS}
AFFINE_GRAD_CONFIG = {"ROWS": 16, "BLOCK": 128, "STAGES": 2, "num_warps": 4, **_OPTIONS}


@triton.jit(do_not_specialize=["rows_before"])
def forward_kernel(
    X, Residual, Weight, Bias, Y, Sum, Stats, Seed,
    n_rows, width, x_stride, residual_stride, eps, rows_before: tl.int64, last_dropped, keep_scale,
    ADD: tl.constexpr, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS rows. Sum is h, written where ADD; Stats (2, n_rows) float32 is mean and rstd."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    rows = first_row + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < n_rows) & (columns < width)
    x = tl.load(X + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        if DROPOUT:
            keep = keep_tile(tl.load(Seed), rows_before + first_row, 0, last_dropped, ROWS, BLOCK)
            x = tl.where(keep, x * keep_scale, 0.0)
        x += tl.load(Residual + rows * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
        stored = round_to(x, Sum.dtype.element_ty)
        tl.store(Sum + rows * width + columns, stored, mask=mask)
        x = stored.to(tl.float32)  # the norm is that of h as it is stored, because backward reads it from there
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    y = centred * rstd[:, None] * tl.load(Weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(Bias + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(Y + rows * width + columns, round_to(y, Y.dtype.element_ty), mask=mask)
    row = first_row + tl.arange(0, ROWS)
    tl.store(Stats + row, mean, mask=row < n_rows)
    tl.store(Stats + n_rows + row, rstd, mask=row < n_rows)


@triton.jit(do_not_specialize=["rows_before"])
def backward_kernel(
    GradY, GradSum, X, Weight, Stats, Seed, GradResidual, GradX, Partial,
    n_rows, width, grad_y_stride, grad_sum_stride, x_stride, rows_before: tl.int64, last_dropped, keep_scale,
    HAS_GRAD_SUM: tl.constexpr, WRITE_GRAD_RESIDUAL: tl.constexpr, WRITE_GRAD_X: tl.constexpr,
    WRITE_GRAD_WEIGHT: tl.constexpr, WRITE_GRAD_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program takes every n-th tile of ROWS rows. X is what was normalised: x, or the sum h.

    With STAGES 2, the loads of the next tile are copies into shared memory that run while this tile is worked on.
    Partial is (number of sums asked for, programs, width) float32: each program's sums for dweight, then for dbias.
    """
    columns = tl.arange(0, BLOCK)[None, :]
    in_row = columns < width
    # Loaded as a whole tile, so that its elements are spread over the threads as those of the other tiles are. From a
    # single row the compiler took another layout for all of them, whose sums along a row exchange twice the values.
    weight_columns = columns + tl.zeros((ROWS, 1), tl.int32)
    weight = tl.load(Weight + weight_columns, mask=weight_columns < width, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        first_row = tile * ROWS
        row = first_row + tl.arange(0, ROWS).to(tl.int64)
        rows = row[:, None]
        mask = (rows < n_rows) & in_row
        grad_y = tl.load(GradY + rows * grad_y_stride + columns, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(Stats + row, mask=row < n_rows, other=0.0)[:, None]
        rstd = tl.load(Stats + n_rows + row, mask=row < n_rows, other=0.0)[:, None]
        x_hat = tl.where(mask, (x - mean) * rstd, 0.0)
        if WRITE_GRAD_WEIGHT:
            grad_weight += grad_y * x_hat
        if WRITE_GRAD_BIAS:
            grad_bias += grad_y
        if WRITE_GRAD_RESIDUAL or WRITE_GRAD_X:
            grad = grad_y * weight
            along_mean = tl.sum(grad, axis=1) / width
            along_x = tl.sum(grad * x_hat, axis=1) / width
            grad = (grad - along_mean[:, None] - x_hat * along_x[:, None]) * rstd
            if HAS_GRAD_SUM:
                grad += tl.load(GradSum + rows * grad_sum_stride + columns, mask=mask, other=0.0).to(tl.float32)
            out = rows * width + columns
            if WRITE_GRAD_RESIDUAL:
                tl.store(GradResidual + out, round_to(grad, GradResidual.dtype.element_ty), mask=mask)
            if WRITE_GRAD_X:
                if DROPOUT:
                    keep = keep_tile(tl.load(Seed), rows_before + first_row, 0, last_dropped, ROWS, BLOCK)
                    grad = tl.where(keep, grad * keep_scale, 0.0)
                tl.store(GradX + out, round_to(grad, GradX.dtype.element_ty), mask=mask)
    out = tl.program_id(0).to(tl.int64) * width + columns
    if WRITE_GRAD_WEIGHT:
        tl.store(Partial + out, tl.sum(grad_weight, axis=0)[None, :], mask=in_row)
        out += tl.num_programs(0).to(tl.int64) * width
    if WRITE_GRAD_BIAS:
        tl.store(Partial + out, tl.sum(grad_bias, axis=0)[None, :], mask=in_row)


@triton.jit(do_not_specialize=["rows_before"])
def wide_backward_kernel(
    GradY, GradSum, X, Weight, Stats, Seed, GradResidual, GradX,
    n_rows, width, grad_y_stride, grad_sum_stride, x_stride, rows_before: tl.int64, last_dropped, keep_scale,
    HAS_GRAD_SUM: tl.constexpr, WRITE_GRAD_RESIDUAL: tl.constexpr, WRITE_GRAD_X: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of x and residual for wide rows: a program goes over one row, block by block, twice.

    First it computes the two means, then the gradient. The second time, x, grad_y and weight come from the cache: one
    row of the three takes at most 192 KB.
    """
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(Stats + row)
    rstd = tl.load(Stats + n_rows + row)
    along_mean = tl.zeros((BLOCK,), tl.float32)
    along_x = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        grad = tl.load(GradY + row * grad_y_stride + columns, mask=mask, other=0.0).to(tl.float32)
        grad *= tl.load(Weight + columns, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        along_mean += grad
        along_x += grad * (x - mean) * rstd
    mean_grad = tl.sum(along_mean, axis=0) / width
    mean_grad_x = tl.sum(along_x, axis=0) / width
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        grad = tl.load(GradY + row * grad_y_stride + columns, mask=mask, other=0.0).to(tl.float32)
        grad *= tl.load(Weight + columns, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        grad = (grad - mean_grad - (x - mean) * rstd * mean_grad_x) * rstd
        if HAS_GRAD_SUM:
            grad += tl.load(GradSum + row * grad_sum_stride + columns, mask=mask, other=0.0).to(tl.float32)
        out = row * width + columns
        if WRITE_GRAD_RESIDUAL:
            tl.store(GradResidual + out, round_to(grad, GradResidual.dtype.element_ty), mask=mask)
        if WRITE_GRAD_X:
            if DROPOUT:
                keep = keep_tile(tl.load(Seed), rows_before + row, start, last_dropped, 1, BLOCK)
                grad = tl.where(tl.reshape(keep, (BLOCK,)), grad * keep_scale, 0.0)
            tl.store(GradX + out, round_to(grad, GradX.dtype.element_ty), mask=mask)


@triton.jit
def affine_grad_kernel(
    GradY, X, Stats, Partial, n_rows, width, grad_y_stride, x_stride,
    WRITE_GRAD_WEIGHT: tl.constexpr, WRITE_GRAD_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dweight and dbias of wide rows, as partial sums. The grid is (parts of the rows, blocks of columns)."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_row = columns < width
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        rows = row[:, None]
        mask = (rows < n_rows) & in_row
        grad_y = tl.load(GradY + rows * grad_y_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if WRITE_GRAD_WEIGHT:
            x = tl.load(X + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(Stats + row, mask=row < n_rows, other=0.0)[:, None]
            rstd = tl.load(Stats + n_rows + row, mask=row < n_rows, other=0.0)[:, None]
            grad_weight += grad_y * tl.where(mask, (x - mean) * rstd, 0.0)
        if WRITE_GRAD_BIAS:
            grad_bias += grad_y
    out = tl.program_id(0).to(tl.int64) * width + columns
    if WRITE_GRAD_WEIGHT:
        tl.store(Partial + out, tl.sum(grad_weight, axis=0)[None, :], mask=in_row)
        out += tl.num_programs(0).to(tl.int64) * width
    if WRITE_GRAD_BIAS:
        tl.store(Partial + out, tl.sum(grad_bias, axis=0)[None, :], mask=in_row)


def _block(width: int) -> int:
    return max(16, next_power_of_2(width))  # a dropout mask is drawn for four columns at a time


@tunable("layer_norm.forward")
def forward_config(width: int, arch: int) -> dict[str, int]:
    """For `forward_kernel`: a program takes 4 rows, more of narrow ones, and reads weight and bias once for them.

    A lane has 32 elements: its loads of 16 bytes are all under way before it needs the first of them.
    """
    block = _block(width)
    rows = max(1, min(4, 4096 // block), min(32, 2048 // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, rows * block // 1024), **_OPTIONS}


@lru_cache
def single_row_config(width: int) -> dict[str, int]:
    """For `forward_kernel` where rows are few, as when text is generated: a row is spread over up to 16 warps."""
    block = _block(width)
    return {"ROWS": 1, "BLOCK": block, "num_warps": min(16, max(1, block // 256)), **_OPTIONS}


def forward_config_of_call(n_rows: int, width: int, arch: int, n_multiprocessors: int) -> dict[str, int]:
    """`forward_config`, but `single_row_config` where some multiprocessors would be without work."""
    config = forward_config(width, arch)
    return single_row_config(width) if cdiv(n_rows, config["ROWS"]) < n_multiprocessors else config


@tunable("layer_norm.backward")
def backward_config(width: int, arch: int) -> dict[str, int]:
    """For `backward_kernel`: 8 elements in a lane, because weight, gradients and two sums take registers, too."""
    block = _block(width)
    rows = min(32, max(1, 1024 // block))
    return {"ROWS": rows, "BLOCK": block, "STAGES": 2, "num_warps": max(1, rows * block // 256), **_OPTIONS}


@tunable("layer_norm.backward", "programs")
def backward_programs(width: int, arch: int) -> int:
    """Programs on each multiprocessor: as many as run at one time, see `_WARPS_PER_MULTIPROCESSOR`."""
    config = backward_config(width, arch) if width <= MAX_FUSED_WIDTH else AFFINE_GRAD_CONFIG
    return _WARPS_PER_MULTIPROCESSOR // config["num_warps"]


def _rows(x: Tensor) -> Tensor:
    """(..., C) -> (N, C) whose columns lie side by side. It is copied only where the strides do not allow a view."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    out_dtype: torch.dtype,
    first_sequence: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, stats): y (..., C) in `out_dtype`; h is empty without `residual`; stats (2, rows) float32: mean, rstd."""
    C = x.shape[-1]
    n_rows = x.numel() // C
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    stats = torch.empty((2, n_rows), dtype=torch.float32, device=x.device)
    if residual is None:
        h = torch.empty(0, dtype=x.dtype, device=x.device)
    else:
        h = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    if n_rows == 0:
        return y, h, stats
    rows = _rows(x)
    residual_rows = rows if residual is None else _rows(residual)
    config = forward_config_of_call(n_rows, C, architecture(x), multiprocessors(x))
    with device_of(x):
        forward_kernel[(cdiv(n_rows, config["ROWS"]),)](
            rows, residual_rows, weight.contiguous(), weight if bias is None else bias.contiguous(),
            y, h, stats, stats if seed is None else seed,
            n_rows, C, rows.stride(0), residual_rows.stride(0), eps,
            first_sequence * (n_rows // x.shape[0]), last_dropped(dropout_p), 1.0 / (1.0 - dropout_p),
            ADD=residual is not None, DROPOUT=dropout_p > 0.0, HAS_BIAS=bias is not None, **config,
        )  # fmt: skip
    return y, h, stats


def backward(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    stats: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    residual_dtype: torch.dtype,
    x_dtype: torch.dtype,
    output_mask: Sequence[bool],
    first_sequence: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_residual, grad_x, grad_affine) of `forward`. `x` is what was normalised: x itself, or the sum h.

    grad_sum is the gradient of h, or None. `output_mask` says which gradients are asked for: those of x, residual,
    weight and bias. Without dropout and in one dtype, x and residual have the same gradient: it is grad_residual, and
    grad_x is empty. grad_affine is (number asked for, C): the gradients of weight and bias.
    """
    C = x.shape[-1]
    n_rows = x.numel() // C
    needs_x, needs_residual, needs_weight, needs_bias = output_mask
    x_is_residual = dropout_p == 0.0 and x_dtype == residual_dtype
    write_x, write_residual = needs_x and not x_is_residual, needs_residual or (needs_x and x_is_residual)
    grad_residual = torch.empty(x.shape if write_residual else (0,), dtype=residual_dtype, device=x.device)
    grad_x = torch.empty(x.shape if write_x else (0,), dtype=x_dtype, device=x.device)
    n_affine = int(needs_weight) + int(needs_bias)
    if n_rows == 0 or not any(output_mask):
        return grad_residual, grad_x, weight.new_zeros((n_affine, C))
    rows, grad_rows = _rows(x), _rows(grad_y)
    grad_sum_rows = grad_rows if grad_sum is None else _rows(grad_sum)
    sources = (grad_rows, grad_sum_rows, rows, weight.contiguous(), stats, stats if seed is None else seed)
    shared = (
        n_rows, C, grad_rows.stride(0), grad_sum_rows.stride(0), rows.stride(0),
        first_sequence * (n_rows // x.shape[0]), last_dropped(dropout_p), 1.0 / (1.0 - dropout_p),
    )  # fmt: skip
    flags = {
        "HAS_GRAD_SUM": grad_sum is not None,
        "WRITE_GRAD_RESIDUAL": write_residual,
        "WRITE_GRAD_X": write_x,
        "DROPOUT": dropout_p > 0.0,
    }
    affine = {"WRITE_GRAD_WEIGHT": needs_weight, "WRITE_GRAD_BIAS": needs_bias}
    n_parts, column_blocks = _affine_grid(n_rows, C, architecture(x), multiprocessors(x))
    partial = torch.empty((n_affine, n_parts, C), dtype=torch.float32, device=x.device)
    with device_of(x):
        if C <= MAX_FUSED_WIDTH:
            config = backward_config(C, architecture(x))
            backward_kernel[(n_parts,)](*sources, grad_residual, grad_x, partial, *shared, **flags, **affine, **config)
        else:
            if write_residual or write_x:
                wide_backward_kernel[(n_rows,)](*sources, grad_residual, grad_x, *shared, **flags, **WIDE_CONFIG)
            if n_affine:
                affine_grad_kernel[(n_parts, column_blocks)](
                    grad_rows, rows, stats, partial, n_rows, C, grad_rows.stride(0), rows.stride(0),
                    **affine, **AFFINE_GRAD_CONFIG,
                )  # fmt: skip
    return grad_residual, grad_x, partial.sum(dim=1).to(weight.dtype)


def _affine_grid(n_rows: int, width: int, arch: int, n_multiprocessors: int) -> tuple[int, int]:
    """(parts of the rows, blocks of columns): the grid of the programs that compute dweight and dbias."""
    n_programs = n_multiprocessors * backward_programs(width, arch)
    if width <= MAX_FUSED_WIDTH:
        return min(n_programs, cdiv(n_rows, backward_config(width, arch)["ROWS"])), 1
    column_blocks = cdiv(width, AFFINE_GRAD_CONFIG["BLOCK"])
    return min(cdiv(n_programs, column_blocks), cdiv(n_rows, AFFINE_GRAD_CONFIG["ROWS"])), column_blocks
