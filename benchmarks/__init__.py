"""The benchmark suite: FastGPT against the things one would use instead, on this machine.

    pytest benchmarks [--quick] [--device cpu|cuda] [--nanogpt DIR] [--lecture FILE] [--rows FILE]    (make bench)

One file per op, named like it, and one each for a training step, generation, the time to a loss and the import. No
time is kept for a result that is wrong, and no peer is left out in silence: `suite.py` says how a comparison runs,
`measure.py` how times are taken, `peers.py` who is compared, `rows.py` what is written.

The modules are imported as fastgpt.benchmarks, from a source tree and from an installed wheel alike.
"""
