"""Proof that the ops are right: every op, backend and dtype, forward and each gradient, against the float64 oracle.

The oracle is `ops/reference.py` in float64. Its inputs are first rounded to the dtype under test, so that only the
arithmetic of the op is measured, not the rounding of its inputs. PyTorch's own op in the same dtype is the
yardstick (the rule of flash-attention's tests): a value passes when

    max |ours - oracle|  <=  2 * max |torch - oracle| + atol

with atol = ATOL[dtype] * max(1, largest |oracle|), a few units in the last place, because PyTorch's error may be zero
by chance. The cases serve every backend: ``run_parity(backends=("native",))``, or one by one:

>>> for case in parity_cases("layer_norm"):
...     for row in measure_case(case, "triton", torch.float16): assert row.passed, row
"""

from ..ops.accuracy import ATOL, max_error, tolerance
from ..ops.yardsticks import YARDSTICKS
from .cases import Draw, ParityCase, parity_cases
from .measure import DTYPES, exact_copy, measure_case, outputs_and_gradients
from .report import run_parity

__all__ = [
    "ATOL", "DTYPES", "YARDSTICKS", "Draw", "ParityCase", "exact_copy", "max_error", "measure_case",
    "outputs_and_gradients", "parity_cases", "run_parity", "tolerance",
]  # fmt: skip
