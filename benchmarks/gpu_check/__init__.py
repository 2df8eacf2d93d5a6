"""What only a GPU can show, in four steps of under eight minutes, for a machine that is rented for half an hour.

    make gpu-check OUT=dir                 all four steps; STEP=1 .. 4 takes one
    make gpu-check OUT=dir DRY_RUN=1       rehearses them here, as far as that goes without a GPU

    step 1   the tests of every kernel on the device, compute-sanitizer, and the parity report
    step 2   the sweep of launch configurations, whose tables steps 3 and 4 use
    step 3   the benchmarks: ops against their peers, training steps, a training run, generation
    step 4   five kernels under Nsight Compute

docs/gpu.md explains what is needed and how to read what is written. steps.py says what each step runs, tasks.py runs it
and writes it down, packages.py says what the machine lacks, counters.py reads Nsight Compute, and summary.py writes
summary.md. A task that passed is not run again for the same sources on the same machine.
"""
