"""Metrics of a run: `metrics.jsonl`, one JSON object a step, and TensorBoard events."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from fusejax import paths
from fusejax.errors import UserError
from fusejax.outputs import fingerprint, make_folder, write_atomically, writing_failed

TRAINING = ("step", "clm_loss", "tokens")  # what every step of training records


def read(folder: str | Path, needed: Sequence[str] = ("step",)) -> list[dict[str, Any]]:
    """The steps recorded so far; a last line that a kill cut off is left out. UserError for any other line that is no
    JSON object of numbers with the keys `needed`."""
    path = paths.at(folder) / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if _is_record(record, needed):
            steps.append(record)
        elif number < len(lines) or line.endswith(b"\n"):
            raise UserError(f"{path}: line {number} is damaged, it should hold the numbers of a step; remove that line")
    return steps


def _is_record(value: Any, needed: Sequence[str]) -> bool:
    numbers = isinstance(value, dict) and all(isinstance(each, int | float) for each in value.values())
    return numbers and set(needed) <= value.keys()


class Metrics:
    """Appends to a run's metrics. On resume at `step`, what was recorded after it is dropped, as it comes again."""

    def __init__(self, folder: str | Path, step: int, wandb: str | None = None) -> None:
        """wandb: the project of Weights & Biases to log to as well; UserError where the package is missing."""
        from tensorboardX import SummaryWriter

        self._home, self._here = make_folder(folder), Path(folder)
        if paths.is_remote(self._home):  # nothing is appended to there: `keep` sends what grows here
            self._copy = tempfile.TemporaryDirectory(prefix="fusejax-")
            self._here = Path(self._copy.name)
        self._path = self._here / "metrics.jsonl"
        kept = [record for record in read(folder) if record["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        events = self._here / "tensorboard"
        try:
            self._file: TextIO = self._path.open("a", encoding="utf-8")
            self._events = SummaryWriter(os.fspath(make_folder(events)), purge_step=step + 1)
        except OSError as error:
            raise writing_failed(events, error) from None
        self._online = _wandb_run(wandb, self._home, self._here) if wandb else None

    def write(self, step: int, values: dict[str, float]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
            if self._online is not None:
                self._online.log(values, step=step)
        except OSError as error:
            raise writing_failed(self._path, error) from None

    def keep(self) -> None:
        """See to it that what was written so far outlives this process, where the run's folder is in a bucket."""
        if self._here == self._home:
            return
        self._events.flush()
        try:
            for file in (self._path, *(self._here / "tensorboard").iterdir()):
                paths.send(file, self._home / file.relative_to(self._here))
        except OSError as error:
            raise writing_failed(self._home, error) from None

    def close(self) -> None:
        self._file.close()
        self._events.close()
        self.keep()
        if self._online is not None:
            self._online.finish()


def require_wandb() -> Any:
    """The module, or UserError."""
    try:
        import wandb
    except ImportError:
        raise UserError("wandb: the package is not installed; pip install wandb, or remove the key") from None
    return wandb


def _wandb_run(project: str, folder: Path, files: Path) -> Any:
    """The run of this output folder: the same one after every interruption. files: where it may keep its own."""
    name = f"{folder.parent.name}/{folder.name}" if folder.name == "clm" else folder.name
    identity = str(folder) if paths.is_remote(folder) else str(folder.resolve())
    return require_wandb().init(project=project, id=fingerprint(identity), name=name, dir=str(files), resume="allow")
