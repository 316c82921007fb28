"""Metrics of a run: `metrics.jsonl`, one JSON object a step, and TensorBoard events."""

import json
import os
from pathlib import Path
from typing import Any, TextIO

from fusejax.store import make_folder, write_atomically, writing_failed


def read(folder: str | Path) -> list[dict[str, Any]]:
    """The steps recorded so far; a line that a kill cut off is left out."""
    path = Path(folder) / "metrics.jsonl"
    steps = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            steps.append(json.loads(line))
        except ValueError:
            break
    return steps


class Metrics:
    """Appends to a run's metrics. On resume at `step`, what was recorded after it is dropped, as it comes again."""

    def __init__(self, folder: str | Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._path = make_folder(folder) / "metrics.jsonl"
        kept = [record for record in read(folder) if record["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        events = Path(folder) / "tensorboard"
        try:
            self._file: TextIO = self._path.open("a", encoding="utf-8")
            self._events = SummaryWriter(os.fspath(make_folder(events)), purge_step=step + 1)
        except OSError as error:
            raise writing_failed(events, error) from None

    def write(self, step: int, values: dict[str, float]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        except OSError as error:
            raise writing_failed(self._path, error) from None

    def close(self) -> None:
        self._file.close()
        self._events.close()
