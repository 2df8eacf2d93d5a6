"""Attention in Triton: which kernels a call takes, and their launches.

`forward` and `backward` are what `fastgpt.ops` calls. With q (B, H, Tq, D) and k, v (B, Hkv, Tk, D) they compute

    out = softmax(scale * q k^T + mask) v        (Vaswani et al. 2017, arXiv:1706.03762)

and its gradients, without writing the (Tq, Tk) scores to memory. The kernels are in files of their own, and each file
begins with its formula, what it fuses and the bytes it moves:

    attention_forward.py     out, and the logsumexp of each row of scores, which backward reads
    attention_backward.py    the gradients of q, k and v
    attention_decode.py      few queries against many keys, as when text is generated
    attention_tiles.py       what these share: tiles are loaded, stored, masked and multiplied
    attention_configs.py     their tile sizes, warps and pipeline stages

The first of these kernels that can take a call does:

    forward     decode_kernel, join_splits_kernel   at most 8 queries, no dropout; the second one where keys are split
                one_tile_forward_kernel             16 bits, Tq and Tk at most 64, D at most 64 (or T at most 32, D 128)
                forward_kernel                      everything else; with tensor descriptors in 16 bits on sm_90 where
                                                    sequences are longer than `SHORT`
    backward    one_tile_backward_kernel            16 bits, Tq and Tk at most 64, T D at most 4096 (less with dropout)
                grad_q_kernel, grad_kv_kernel       everything else; with tensor descriptors as forward_kernel
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .attention_backward import grad_kv_kernel, grad_q_kernel, one_tile_backward_kernel
from .attention_configs import (
    JOIN_CONFIG,
    decode_config,
    decode_programs,
    decode_splits,
    fits_decode_tile,
    forward_config,
    forward_programs,
    grad_kv_config,
    grad_q_config,
    one_tile_backward_config,
    one_tile_forward_config,
    one_tile_programs,
    persistent_programs,
)
from .attention_decode import decode_kernel, join_splits_kernel
from .attention_forward import forward_kernel, one_tile_forward_kernel
from .dropout import last_dropped
from .target import (
    TensorDescriptor,
    architecture,
    cdiv,
    device_of,
    float32_precision,
    multiprocessors,
    next_power_of_2,
)

SHORT = 256  # longer sequences are loaded through tensor descriptors, where the chip has them
_L2_SECTION_BYTES = 24 * 2**20  # keys and values in use at one time: half of the L2 cache of an H100

# --- launchers --------------------------------------------------------------------------------------------------------


def _dense_heads(x: Tensor) -> Tensor:
    """x itself where the D elements of a row lie side by side, as in every view of a (B, T, H, D) tensor; else a copy.

    Where rows are 2^24 elements apart or more, it is a copy, too, because offsets within a tile have 32 bits.
    """
    return x if (x.stride(3) == 1 or x.shape[3] == 1) and x.stride(2) < 2**24 else x.contiguous()


def _kernel_inputs(
    of_queries: tuple[Tensor, ...], of_keys: tuple[Tensor, ...], descriptors: bool, config: dict[str, int]
) -> tuple:
    """The tensors as they are, or tensor descriptors whose blocks are a kernel's tiles of one head."""
    if not descriptors:
        return of_queries + of_keys
    return tuple(
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, config[n_rows], config["BLOCK_D"]])
        for tensors, n_rows in ((of_queries, "BLOCK_M"), (of_keys, "BLOCK_N"))
        for x in tensors
    )


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _precision(dtype: torch.dtype) -> str:
    return float32_precision() if dtype == torch.float32 else "ieee"


def _takes_descriptors(longest: int, *tensors: Tensor) -> bool:
    """Whether the kernels load their tiles through tensor descriptors, which need aligned addresses and strides."""
    x = tensors[0]
    return _has_descriptors(longest, x.shape[3], x.element_size(), architecture(x)) and all(
        is_aligned(t.data_ptr(), t.stride(), t.element_size()) for t in tensors
    )


def _has_descriptors(longest: int, head_size: int, element_size: int, arch: int) -> bool:
    """Whether tensor descriptors serve such a call: tiles are loaded by the Tensor Memory Accelerator of sm_90.

    Making a descriptor takes microseconds, which it saves only where sequences are long.
    """
    return longest > SHORT and element_size == 2 and head_size <= 128 and arch // 10 == 9


def is_aligned(address: int, strides: tuple[int, ...], element_size: int) -> bool:
    """Whether the address and the strides of (B, H, T, D) are the multiples of 16 bytes that the accelerator needs."""
    return address % 16 == 0 and all(s > 0 and s * element_size % 16 == 0 for s in strides[:3])


def _section(n_keys: int, head_size: int, element_size: int) -> int:
    """How many heads are worked on at one time, so that their keys and values stay in the L2 cache."""
    return max(1, _L2_SECTION_BYTES // max(1, 2 * n_keys * head_size * element_size))


def empty_heads(like: Tensor, n_heads: int, length: int) -> Tensor:
    """(B, n_heads, length, D), laid out as (B, length, n_heads, D): a model reshapes it to (B, T, C) without a copy."""
    B, _, _, D = like.shape
    return like.new_empty((B, length, n_heads, D)).transpose(1, 2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    first_sequence: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out, lse): out (B, H, Tq, D), laid out as (B, Tq, H, D); lse (B, H, Tq) float32, in base 2, +inf for no key."""
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    out = empty_heads(q, H, Tq)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if Tk == 0:
        return out.zero_(), lse.fill_(math.inf)
    q, k, v = _dense_heads(q), _dense_heads(k), _dense_heads(v)
    group = H // Hkv
    score_scale = scale * math.log2(math.e)
    constants = {"HEAD_SIZE": D, "CAUSAL": is_causal, "PRECISION": _precision(q.dtype)}
    if dropout_p == 0.0 and fits_decode_tile(D, q.element_size(), Tq, group):
        config, n_splits, split_size = _decode_plan(
            B * Hkv, group * Tq, Tk, D, q.element_size(), architecture(q), multiprocessors(q)
        )
        _decode(q, k, v, out, lse, n_splits, split_size, score_scale, constants | config)
        return out, lse
    key = lse if seed is None else seed  # a kernel without dropout does not read it, but it has to be a tensor
    factors = (score_scale, first_sequence * H * Tq, last_dropped(dropout_p), 1.0 / (1.0 - dropout_p))
    constants["DROPOUT"] = dropout_p > 0.0
    config = one_tile_forward_config(D, q.element_size(), max(Tq, Tk), dropout_p > 0.0, architecture(q))
    if config is not None:
        with device_of(q):
            one_tile_forward_kernel[(one_tile_programs(B * H, config["num_warps"], multiprocessors(q)),)](
                q, k, v, out, lse, key, *_strides(q, k, v), B, H, group, Tq, Tk, *factors, **constants, **config
            )
        return out, lse
    descriptors = _takes_descriptors(max(Tq, Tk), q, k, v)
    call = (D, q.element_size(), max(Tq, Tk), descriptors, dropout_p > 0.0, architecture(q))
    config, n_programs = _tiled_plan(B * H, Tq, call, multiprocessors(q))
    with device_of(q):
        forward_kernel[(n_programs or B * H * cdiv(Tq, config["BLOCK_M"]),)](
            *_kernel_inputs((q,), (k, v), descriptors, config), out, lse, key, *_strides(q, k, v),
            B, H, group, Tq, Tk, _section(Tk, D, q.element_size()), *factors,
            DESCRIPTORS=descriptors, PERSISTENT=n_programs is not None, **constants, **config,
        )  # fmt: skip
    return out, lse


def _decode_plan(
    n_key_heads: int, n_rows: int, n_keys: int, head_size: int, element_size: int, arch: int, n_multiprocessors: int
) -> tuple[dict[str, int], int, int]:
    """(configuration, number of splits, keys in each) of `decode_kernel`."""
    call = (head_size, element_size, n_rows, arch)
    config = decode_config(*call)
    return config, *decode_splits(n_key_heads, n_keys, config["BLOCK_N"], decode_programs(*call) * n_multiprocessors)


def _tiled_plan(n_heads: int, n_queries: int, call: tuple, n_multiprocessors: int) -> tuple[dict[str, int], int | None]:
    """(configuration, persistent programs or None) of `forward_kernel`; `call` is what `forward_config` takes."""
    config, descriptors = forward_config(*call), call[3]
    if not descriptors:
        return config, None
    n_tiles = cdiv(n_queries, config["BLOCK_M"])
    return config, persistent_programs(n_heads, n_tiles, forward_programs(*call), n_multiprocessors)


def _decode(q, k, v, out, lse, n_splits, split_size, score_scale, config):
    """Writes `out` and `lse` by one kernel, or, where the keys are split, by a second one that joins the splits."""
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    partial_out, partial_lse = out, lse
    if n_splits > 1:
        partial_out = torch.empty((n_splits, B, H, Tq, D), dtype=torch.float32, device=q.device)
        partial_lse = torch.empty((n_splits, B, H, Tq), dtype=torch.float32, device=q.device)
    with device_of(q):
        decode_kernel[(n_splits, B * Hkv)](
            q, k, v, partial_out, partial_lse, *_strides(q, k, v),
            B, H, H // Hkv, Tq, Tk, split_size, score_scale, SPLIT=n_splits > 1, **config,
        )  # fmt: skip
        if n_splits == 1:
            return
        join_splits_kernel[(B * H * Tq,)](
            partial_out, partial_lse, out, lse, B * H * Tq, H, Tq, n_splits,
            HEAD_SIZE=D, BLOCK_D=config["BLOCK_D"], SPLITS=next_power_of_2(n_splits), **JOIN_CONFIG,
        )  # fmt: skip


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    output_mask: Sequence[bool],
    first_sequence: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, laid out as (B, T, H, D) like `out`; empty where they are not asked for."""
    needs_q, needs_k, needs_v = output_mask
    grads = (
        empty_heads(q, q.shape[1], q.shape[2]) if needs_q else q.new_empty(0),
        empty_heads(k, k.shape[1], k.shape[2]) if needs_k else k.new_empty(0),
        empty_heads(v, v.shape[1], v.shape[2]) if needs_v else v.new_empty(0),
    )
    options = (is_causal, scale, dropout_p, seed, first_sequence)
    _write_gradients(grads, grad_out, q, k, v, out, lse, *options, output_mask, False)
    return grads


def packed_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    first_sequence: int = 0,
) -> Tensor:
    """The gradient of qkv (B, T, 3, H, D), which holds q, k and v: written by the kernels, joined by no copy.

    grad_out and out are (B, H, T, D).
    """
    grad_qkv = qkv.new_empty(qkv.shape)
    q, k, v = unpack(qkv)
    options = (is_causal, scale, dropout_p, seed, first_sequence)
    _write_gradients(unpack(grad_qkv), grad_out, q, k, v, out, lse, *options, (True, True, True), True)
    return grad_qkv


def unpack(qkv: Tensor) -> tuple[Tensor, ...]:
    """(B, T, 3, H, D) -> three views (B, H, T, D)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind()


def _write_gradients(
    grads, grad_out, q, k, v, out, lse, is_causal, scale, dropout_p, seed, first_sequence, output_mask, packed
):
    """Fills `grads`, of q, k and v: (B, H, T, D) each, views of (B, T, H, D) or, `packed`, of one (B, T, 3, H, D).

    In two passes, the gradient of q needs the first and that of v the second. The gradient of k needs both, because the
    first one makes delta.
    """
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    needs_q, needs_k, needs_v = output_mask
    grad_q, grad_k, grad_v = grads
    if q.numel() == 0 or k.numel() == 0 or not any(output_mask):
        for grad in grads:
            grad.zero_()
        return
    q, k, v, grad_out = _dense_heads(q), _dense_heads(k), _dense_heads(v), _dense_heads(grad_out)
    out, lse = out.transpose(1, 2).contiguous(), lse.contiguous()  # no copy where they come from `forward`
    key = lse if seed is None else seed
    strides = _strides(grad_out, q, k, v)
    group = H // Hkv
    section = _section(Tk, D, q.element_size())
    rows_before = first_sequence * H * Tq
    factors = (scale * math.log2(math.e), scale, rows_before, last_dropped(dropout_p), 1.0 / (1.0 - dropout_p))
    constants = {"HEAD_SIZE": D, "CAUSAL": is_causal, "DROPOUT": dropout_p > 0.0, "PRECISION": _precision(q.dtype)}
    size, longest = q.element_size(), max(Tq, Tk)
    with device_of(q):
        config = one_tile_backward_config(D, size, longest, dropout_p > 0.0, architecture(q))
        if config is not None:
            one_tile_backward_kernel[(B * Hkv,)](
                grad_out, q, k, v, out, lse, grad_q, grad_k, grad_v, key, *strides, H, group, Tq, Tk, *factors,
                GRAD_Q=needs_q, GRAD_K=needs_k, GRAD_V=needs_v, PACKED=packed, **constants, **config,
            )  # fmt: skip
            return
        descriptors = _takes_descriptors(longest, q, k, v, grad_out)
        constants["DESCRIPTORS"] = descriptors
        delta = torch.empty_like(lse) if needs_q or needs_k else lse.new_empty(0)
        if needs_q or needs_k:
            config = grad_q_config(D, size, longest, descriptors, dropout_p > 0.0, architecture(q))
            grad_q_kernel[(B * H * cdiv(Tq, config["BLOCK_M"]),)](
                *_kernel_inputs((grad_out, q), (k, v), descriptors, config), out, lse, delta, grad_q, key, *strides,
                grad_q.stride(2) if needs_q else 0, B, H, group, Tq, Tk, section, *factors,
                GRAD_Q=needs_q, **constants, **config,
            )  # fmt: skip
        if needs_k or needs_v:
            config = grad_kv_config(D, size, longest, descriptors, dropout_p > 0.0, group, architecture(q))
            grad_kv_kernel[(B * Hkv * cdiv(Tk, config["BLOCK_N"]),)](
                *_kernel_inputs((grad_out, q), (k, v), descriptors, config), lse, delta, grad_k, grad_v, key, *strides,
                B, H, group, Tq, Tk, section, *factors,
                GRAD_K=needs_k, GRAD_V=needs_v, PACKED=packed, **constants, **config,
            )  # fmt: skip


# --- which kernels a call takes ---------------------------------------------------------------------------------------


def kernels_of_call(
    B: int,
    H: int,
    Hkv: int,
    Tq: int,
    Tk: int,
    D: int,
    element_size: int,
    dropout: bool,
    aligned: bool,
    arch: int,
    n_multiprocessors: int,
) -> tuple[str, str]:
    """In words, the kernels and configurations of `forward` and of `backward`; `aligned`: see `is_aligned`."""
    group, longest = H // Hkv, max(Tq, Tk)
    descriptors = aligned and _has_descriptors(longest, D, element_size, arch)
    one_tile = one_tile_backward_config(D, element_size, longest, dropout, arch)
    if one_tile is not None:
        backward = _in_words("one tile", one_tile)
    else:
        of_q = grad_q_config(D, element_size, longest, descriptors, dropout, arch)
        of_kv = grad_kv_config(D, element_size, longest, descriptors, dropout, group, arch)
        backward = f"{_in_words('dQ', of_q, descriptors)}; {_in_words('dK and dV', of_kv, descriptors)}"
    if not dropout and fits_decode_tile(D, element_size, Tq, group):
        config, n_splits, _ = _decode_plan(B * Hkv, group * Tq, Tk, D, element_size, arch, n_multiprocessors)
        return f"{_in_words('decode', config)}, splits up to {next_power_of_2(n_splits)}", backward
    config = one_tile_forward_config(D, element_size, longest, dropout, arch)
    if config is not None:
        return _in_words("one tile", config), backward
    call = (D, element_size, longest, descriptors, dropout, arch)
    config, n_programs = _tiled_plan(B * H, Tq, call, n_multiprocessors)
    return _in_words("tiles" if n_programs is None else "persistent tiles", config, descriptors), backward


def _in_words(kernel: str, config: dict[str, int], descriptors: bool = False) -> str:
    tile = "x".join(str(config[name]) for name in ("ROWS", "BLOCK_M", "BLOCK_N") if name in config)
    by = " by descriptors" if descriptors else ""
    return f"{kernel} {tile}{by}, {config['num_warps']} warps, {config['num_stages']} stages"
