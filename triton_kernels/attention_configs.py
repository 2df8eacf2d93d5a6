"""Attention: the launch configuration of each kernel, that is its tile sizes, warps and pipeline stages.

Chosen by hand, for the calls that a tuned table (tuned.py) has no entry for. tests/kernel_budgets.toml holds every one
of them to its registers and its shared memory; none spills registers, except for a few bytes in float32 and in decoding
with one split. Where the head size allows it, a tile is small enough for two programs on a multiprocessor, so that the
softmax of one runs while the other one multiplies.
"""

from functools import lru_cache

from .target import COMPILE_OPTIONS, cdiv, next_power_of_2
from .tuned import tunable

MAX_DECODED_QUERIES = 8


def _config(block_m: int, block_n: int, num_warps: int, num_stages: int, block_d: int) -> dict[str, int]:
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "num_warps": num_warps,
        "num_stages": num_stages,
        **COMPILE_OPTIONS,
    }


def _float32_config(block_d: int, num_warps: int) -> dict[str, int]:
    """Tensor cores do not multiply float32, so each lane holds whole rows of the operands. Tiles have to be small."""
    return _config(16, 16, num_warps, 1, block_d)


def _block_d(head_size: int) -> int:
    return max(16, next_power_of_2(head_size))  # tensor cores multiply at least 16 columns


@tunable("attention.forward")
def forward_config(
    head_size: int, element_size: int, longest: int, descriptors: bool, dropout: bool, arch: int
) -> dict[str, int]:
    """For `forward_kernel`. `longest` is max(Tq, Tk), `arch` 80, 90, ... With dropout a tile is spread over more warps.

    A dropout mask takes registers, and each warp then has a smaller part of it.
    """
    d = _block_d(head_size)
    if element_size == 4:
        return _float32_config(d, {128: 8, 256: 16}.get(d, 4))
    if descriptors:
        return _config(128, 64, 8 if dropout or d > 64 else 4, 3, d)
    if longest <= 32:  # only heads above 128 come here, because smaller ones take `one_tile_forward_kernel`
        return _config(32, 32, 4, 1, d)
    return _config(64, 32 if dropout or d > 64 else 64, 4 if d <= 128 else 8, 2, d)


@lru_cache
def one_tile_forward_config(
    head_size: int, element_size: int, longest: int, dropout: bool, arch: int
) -> dict[str, int] | None:
    """For `one_tile_forward_kernel`; None where a multiprocessor does not hold two heads of this size.

    It has to hold two, because one head is fetched while the other one is multiplied.
    """
    d = _block_d(head_size)
    block = max(16, next_power_of_2(longest))
    if element_size == 4 or d > 128 or block > 64 or block * d > 64 * 64:
        return None
    if arch >= 100 and block * d == 64 * 64 and not dropout:  # four warps spill there
        return _config(block, block, 8, 2, d)
    return _config(block, block, 4 if block >= 32 else 2, 2, d)


@tunable("attention.forward", "persistent")
def forward_programs(
    head_size: int, element_size: int, longest: int, descriptors: bool, dropout: bool, arch: int
) -> int:
    """How many persistent programs of `forward_kernel` a multiprocessor runs at one time; 0 to have no persistent ones.

    8 warps with 255 registers a thread fill a multiprocessor.
    """
    return 8 // forward_config(head_size, element_size, longest, descriptors, dropout, arch)["num_warps"]


@tunable("attention.grad_q")
def grad_q_config(
    head_size: int, element_size: int, longest: int, descriptors: bool, dropout: bool, arch: int
) -> dict[str, int]:
    """For `grad_q_kernel`; the arguments are those of `forward_config`."""
    d = _block_d(head_size)
    if element_size == 4:
        return _float32_config(d, 4 if d <= 64 else 8)
    if descriptors:
        return _config(128, 32 if dropout and d > 64 else 64, 8, 3, d)
    if d <= 128:
        return _config(64, 32, 4 if d <= 64 else 8, 2, d)
    return _config(16, 32, 4, 1, d)


@tunable("attention.grad_kv")
def grad_kv_config(
    head_size: int, element_size: int, longest: int, descriptors: bool, dropout: bool, group: int, arch: int
) -> dict[str, int]:
    """For `grad_kv_kernel`. `group` is the number of query heads that share a key head."""
    d = _block_d(head_size)
    if element_size == 4:
        return _float32_config(d, 4 if d <= 64 else 8)
    if descriptors:
        return _config(64 if d <= 64 or (group == 1 and not dropout) else 32, 128, 8, 2 if dropout and d > 64 else 3, d)
    if d <= 64:  # from sm_90 on, the operands of a product may stay in shared memory, which saves registers
        return _config(32, 64 if arch >= 90 or not dropout else 32, 4, 2, d)
    return _config(32, 32, 8, 2 if d == 128 else 1, d)


@lru_cache
def one_tile_backward_config(
    head_size: int, element_size: int, longest: int, dropout: bool, arch: int
) -> dict[str, int] | None:
    """For `one_tile_backward_kernel`; None where queries, keys and the three sums do not fit the registers."""
    d = _block_d(head_size)
    block = max(16, next_power_of_2(longest))
    largest = 64 * 32 if dropout or arch < 90 else 64 * 64
    if element_size == 4 or block > 64 or block * d > largest:
        return None
    return _config(block, block, 8 if block == 64 else 4, 1, d)


@tunable("attention.decode")
def decode_config(head_size: int, element_size: int, n_rows: int, arch: int) -> dict[str, int]:
    """For `decode_kernel`. `n_rows`: queries times query heads of a key head, as many as `fits_decode_tile` allows."""
    d = _block_d(head_size)
    if element_size == 4:
        config = _config(0, 16, 8 if d <= 128 else 4, 1, d)
    else:
        config = _config(0, 32 if d > 128 else 64, 4, 2, d)
    del config["BLOCK_M"]
    return config | {"ROWS": max(16, next_power_of_2(n_rows))}


@tunable("attention.decode", "programs")
def decode_programs(head_size: int, element_size: int, n_rows: int, arch: int) -> int:
    """How many programs the keys are split into, for each multiprocessor."""
    return 2


def fits_decode_tile(head_size: int, element_size: int, n_queries: int, group: int) -> bool:
    """Whether the queries of a key head are so few that they fit the registers as rows of one tile."""
    n_rows, d = group * n_queries, _block_d(head_size)
    fits = n_rows <= 32 and n_rows * d <= 32 * 128 if element_size == 4 else n_rows * d <= 64 * 128
    return n_queries <= MAX_DECODED_QUERIES and fits


def persistent_programs(n_heads: int, n_tiles: int, programs: int, n_multiprocessors: int) -> int | None:
    """The programs of the forward over long sequences, where each goes over several pairs of tiles; None elsewhere.

    There are as many as run at one time, `programs` on each multiprocessor (see `forward_programs`). None where the
    pairs cannot be shared evenly enough, and programs would be without work for more than 1/20 of the time. One program
    for each tile is then better, because the chip starts the next one whenever another one ends.
    """
    n_pairs, n_programs = n_heads * n_tiles // 2, programs * n_multiprocessors
    if programs == 0 or n_tiles % 2 or n_pairs <= n_programs:
        return None
    most_pairs = cdiv(n_pairs, n_programs)  # of one program
    return n_programs if 20 * n_pairs >= 19 * most_pairs * n_programs else None


def one_tile_programs(n_heads: int, num_warps: int, n_multiprocessors: int) -> int:
    """The programs of `one_tile_forward_kernel`, each of which loops over heads.

    There are as many as run at one time: 12 warps with 170 registers a thread fill a multiprocessor.
    """
    return min(n_heads, 12 // num_warps * n_multiprocessors)


JOIN_CONFIG = {"num_warps": 4, **COMPILE_OPTIONS}


def decode_splits(n_key_heads: int, n_keys: int, block_n: int, n_programs: int) -> tuple[int, int]:
    """(number of splits, keys in each): `n_programs` in all, but at least 128 keys for each of them."""
    wanted = min(128, cdiv(n_programs, n_key_heads), cdiv(n_keys, 128))
    split_size = cdiv(cdiv(n_keys, wanted), block_n) * block_n
    return cdiv(n_keys, split_size), split_size
