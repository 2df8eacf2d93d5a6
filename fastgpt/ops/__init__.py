"""The ops FastGPT is made of. Each has one file, one formula in `reference.py`, and one or more backends."""

from . import linear as _linear  # noqa: F401  -- registered, so that exported programs find it
from . import native as _native  # noqa: F401  -- how that backend is tried
from .attention import attention
from .backend import explain
from .cross_entropy import cross_entropy, linear_cross_entropy
from .embedding import embedding
from .layer_norm import add_layer_norm, layer_norm

__all__ = ["add_layer_norm", "attention", "cross_entropy", "embedding", "explain", "layer_norm", "linear_cross_entropy"]
