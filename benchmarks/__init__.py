"""The benchmark suite: FastGPT against what one would use instead, on this machine.

    pytest benchmarks [--quick] [--device cpu|cuda] [--nanogpt DIR] [--lecture FILE] [--rows FILE | --publish]

There is one file for each op, named like it, and one each for a training step, generation, the time to a loss, a whole
training run and the import. No time is kept for a wrong result, and every peer that is not measured is listed with the
reason. harness/ measures: measure.py has the clocks, suite.py the comparison, op_work.py and models.py what is
compared, accuracy.py the check. publish/ has the rows (rows.py), the report, the comparison of two runs and the quotes.

The modules are imported as fastgpt.benchmarks, from a source tree and from an installed wheel alike.
"""
