"""Where the rows of metrics.jsonl go as well: TensorBoard, and Weights & Biases.

    with opened("tensorboard,wandb", folder, settings, step=0) as loggers:
        loggers.row({"step": 10, "split": "train", "loss": 3.2, "lr": 1e-3})

Each number of a row has a name like train/loss or val/elapsed_s, at the row's step. metrics.jsonl stays the record of
the run: a logger that fails is left out from then on. Importing this needs no PyTorch.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from ..settings import UsageError, loggers_of
from . import TrainingError

if TYPE_CHECKING:
    from .run_folder import RunFolder

Row = dict[str, Any]


class Logger(Protocol):
    """What takes the rows. It is made as Logger(folder, settings, step), when a run begins or goes on at `step`.

    `is_new` says that it holds no row of this run, and `about` where its curves are to be seen, in a phrase.
    """

    is_new: bool
    about: str

    def row(self, row: Row) -> None:
        """Take a row; a row's step is never smaller than that of the row before it."""

    def close(self, failed: bool) -> None:
        """Write what is left. `failed` says that the run has not come to its end."""


def numbers_of(row: Row) -> dict[str, float]:
    """What of a row is drawn, by its name: train/loss, val/elapsed_s."""
    return {f"{row['split']}/{name}": value for name, value in row.items() if name not in ("step", "split")}


class TensorBoard:
    """Event files in the run's folder `tensorboard`. Numbers are float32: TensorBoard's usual reader shows no other."""

    def __init__(self, folder: RunFolder, settings: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        path = folder.path / "tensorboard"
        self.is_new = not any(path.glob("events.out.tfevents.*"))
        self.about = f"tensorboard --logdir {path} shows its curves"
        # What a killed run had logged beyond its last checkpoint is logged again, and is to be seen once.
        again_from = step + 1 if step > 0 else 0
        self._writer = SummaryWriter(str(path), purge_step=None if self.is_new else again_from)
        file: Any = self._writer.file_writer  # which is typed as None
        for summary in hparams(dict(settings), {"val/loss": None, "train/loss": None}):
            file.add_summary(summary)

    def row(self, row: Row) -> None:
        for name, value in numbers_of(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()  # so that a run can be watched, and its end is there if it is killed

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose files and id are in the run's folder `wandb`.

    Nobody is asked to log in: without a login the run is offline, unless WANDB_MODE is given. W&B takes no step twice:
    what a killed run had logged beyond its last checkpoint stays, and is left out when it comes again.
    """

    def __init__(self, folder: RunFolder, settings: Mapping[str, Any], step: int) -> None:
        import wandb

        folder_of_ids = folder.path / "wandb"
        folder_of_ids.mkdir(exist_ok=True)
        id_file = folder_of_ids / "run-id.txt"
        begins = step == 0 and folder.logged_until is None
        self.is_new = begins or not id_file.exists()
        self._logged_until = -1 if self.is_new or folder.logged_until is None else folder.logged_until
        if self.is_new:
            new = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
            id_file.write_text(f"{new}\n", encoding="utf-8")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastgpt"),
            name=os.environ.get("WANDB_NAME", folder.path.name),
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder.path),
            config=dict(settings),
            mode=_mode(),
        )
        self.about = self._where(folder_of_ids)

    def _where(self, folder: Any) -> str:
        run = self._run
        if run.offline:
            return f"wandb is offline; wandb sync {folder}/offline-run-* uploads the run"
        return f"wandb has its curves at {run.url}" if run.url else "wandb is disabled"

    def row(self, row: Row) -> None:
        if row["step"] > self._logged_until:
            self._run.log(numbers_of(row), step=row["step"])

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _mode() -> Any:
    """The mode for wandb.init: that of WANDB_MODE or of wandb's settings file, and offline without a login."""
    import wandb

    # Without its own lines, which would run through the bar; nor does it need what this program prints.
    wandb.setup(settings=wandb.Settings(silent=True, console="off"))
    mode = wandb.setup().settings.mode
    if mode not in ("online", "shared") or wandb.login(prompt=False, verify=False):
        return mode
    if os.environ.get("WANDB_MODE"):
        raise UsageError(f"--log wandb: WANDB_MODE={mode} needs a login: run wandb login, or set WANDB_API_KEY")
    return "offline"


Opens = Callable[["RunFolder", Mapping[str, Any], int], Logger]
KINDS: dict[str, Opens] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}  # config.LOGGERS names them


class Loggers:
    """The loggers of a run as one. Those that fail are left out from then on, which is said once."""

    def __init__(self, loggers: Mapping[str, Logger] | None = None) -> None:
        self._loggers = dict(loggers or {})

    def row(self, row: Row) -> list[str]:
        """Pass a row on. Returns a line for each logger that has failed."""
        return [line for name in list(self._loggers) if (line := self._tried(name, "row", row))]

    def _tried(self, name: str, method: str, *arguments: Any) -> str | None:
        try:
            getattr(self._loggers[name], method)(*arguments)
        except Exception as error:  # a package's own, of a network or of a disk
            del self._loggers[name]
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return f"--log {name}: has failed and is left out: {why}; metrics.jsonl has every row"
        return None

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, place: TracebackType | None) -> None:
        for name in list(self._loggers):
            if line := self._tried(name, "close", kind is not None):
                print(line, flush=True)


def opened(log: str, folder: RunFolder, settings: Mapping[str, Any], step: int) -> Loggers:
    """The loggers that `log` names, for the run in `folder` that begins, or goes on, at `step`.

    `settings` are recorded as hyperparameters. A logger that is new to a run gets the rows there are.
    Raises UsageError as `loggers_of` does, and TrainingError where a logger cannot be started.
    """
    from .run_folder import read_metrics

    loggers: dict[str, Logger] = {}
    given = {name: value for name, value in settings.items() if value is not None}
    for name in loggers_of(log):
        try:
            logger = KINDS[name](folder, given, step)
            for row in read_metrics(folder.metrics_path) if logger.is_new else []:
                logger.row(row)
        except UsageError:
            raise
        except Exception as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise TrainingError(f"--log {name}: cannot be started: {why}; --log none trains without it") from error
        loggers[name] = logger
        print(f"log: {logger.about}", flush=True)
    return Loggers(loggers)
