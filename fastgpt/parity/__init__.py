"""Proof that the ops are right: cases, yardsticks, the measurement, the report."""
