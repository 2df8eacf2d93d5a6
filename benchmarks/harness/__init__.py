"""How the suite measures: clocks, rounds, the contenders, and what a comparison says."""
