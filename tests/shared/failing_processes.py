"""A program for torchrun: `fastgpt`, whose second process fails at step 5 and, when started again, is killed at 9."""

from __future__ import annotations

import os
import signal
import sys

from fastgpt.cli import main
from fastgpt.training import TrainingError
from fastgpt.training.loop import Trainer

_step = Trainer._step


def step_or_fail(trainer: Trainer, micro_batches):
    attempt, step = os.environ["TORCHELASTIC_RESTART_COUNT"], trainer.state["step"]
    if trainer.processes.rank == 1 and (attempt, step) == ("0", 5):
        raise TrainingError("the second process fails")
    if trainer.processes.rank == 1 and (attempt, step) == ("1", 9):
        os.kill(os.getpid(), signal.SIGKILL)
    return _step(trainer, micro_batches)


if __name__ == "__main__":
    Trainer._step = step_or_fail  # type: ignore[method-assign]
    sys.exit(main())
