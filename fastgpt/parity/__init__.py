"""Proof that the ops are right: every op, backend and dtype, forward and each gradient, against the float64 oracle.

The oracle is `ops/reference.py` in float64 on the same inputs, rounded to the dtype under test first: what is measured
is the arithmetic of the op, not the rounding of its inputs. PyTorch's own op in the same dtype is the yardstick
(the rule of flash-attention's tests): a value passes when

    max |ours - oracle|  <=  2 * max |torch - oracle| + atol

with atol = ATOL[dtype] * max(1, largest |oracle|), a few units in the last place, for the cases where PyTorch's error
is zero by luck. Another backend is measured by the same cases: ``run(backends=("native",))``, or one by one:

>>> for case in cases("layer_norm"):
...     for row in measure_case(case, "triton", torch.float16): assert row.passed, row
"""

from .cases import CASES, DTYPES, Case, Draw, cases
from .measure import ATOL, Row, evaluate, exact_copy, max_error, measure_case
from .report import main, run
from .yardsticks import PEERS

__all__ = [
    "ATOL", "CASES", "DTYPES", "PEERS", "Case", "Draw", "Row", "cases", "evaluate", "exact_copy", "main", "max_error",
    "measure_case", "run",
]  # fmt: skip
