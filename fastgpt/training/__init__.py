"""Training: one step (for every caller), the loop, a run's folder, and how a run is started or resumed."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, and what the last good checkpoint is."""
