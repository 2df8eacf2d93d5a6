"""The cast at the end of a float32 computation: to the nearest value, ties to even, on the interpreter too."""

import triton
import triton.language as tl

from .target import INTERPRETING

_INTERPRETING = tl.constexpr(INTERPRETING)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """x.to(DTYPE). The interpreter's own cast to bfloat16 cuts off the low bits, which doubles the error."""
    if _INTERPRETING and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)
