"""What Triton's interpreter gets wrong, and the kernels therefore do themselves when it runs them.

Compiled for a GPU, both functions are the plain operation.
"""

import triton
import triton.language as tl

from .target import INTERPRETING

_INTERPRETING = tl.constexpr(INTERPRETING)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x (float32) in `dtype`, rounded to nearest even; the interpreter would cut the end of a bfloat16 off."""
    if _INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b in float32. The interpreter's products of bfloat16 are wrong, those of the same numbers in float32 right."""
    if _INTERPRETING:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_add(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b, see `dot`."""
    if _INTERPRETING:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)
