"""Training: one step (for every caller), the loop, a run's folder, and how a run is started or resumed."""
