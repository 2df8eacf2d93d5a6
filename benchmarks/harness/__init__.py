"""How the suite measures: clocks, rounds, contenders, accuracy, and what a comparison says."""
