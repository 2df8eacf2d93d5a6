"""The ops FastGPT is made of. Each has one file, one formula in `reference.py`, and one or more backends."""

from . import attention_cached as _attention_cached  # noqa: F401  -- its self-test is registered
from . import linear as _linear  # noqa: F401  -- its op is registered, so that exported programs find it
from . import native as _native  # noqa: F401  -- the test whether the extension runs here is registered
from .activation import activation as activation
from .attention import attention as attention
from .backend import OPS
from .backend import explain as explain
from .cross_entropy import cross_entropy as cross_entropy
from .embedding import embedding as embedding
from .layer_norm import add_layer_norm as add_layer_norm
from .layer_norm import layer_norm as layer_norm
from .linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from .linear_log_probs import linear_log_probs as linear_log_probs

__all__ = [*(op for op in OPS if op in globals()), "explain"]
