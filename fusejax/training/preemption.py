"""Preemption: a cluster that takes the machine back sends SIGTERM first, and the run saves before it ends.

So it does on Ctrl-C, where it is one process.
"""

import itertools
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from fusejax.errors import Interrupted, Resumable
from fusejax.progress import say

# Of the process, over all its runs: JAX brings every process to the number after the last that any of them gave, so a
# notice between two runs, or before the first step of one that goes on, would be missed by numbers that start anew.
_asked = itertools.count(1)


class Notice:
    """Whether SIGTERM or Ctrl-C came; a context manager. With several processes all say so at the same step.

    Ctrl-C is noted in a job of one process, and a second one ends it at once.
    """

    def __init__(self) -> None:
        self._came: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        # JAX's runtime has its own handler where there are several processes, and brings them to the same step.
        self._own = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Notice":
        if self._own:
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])
            say("Ctrl-C: ends after this step; once more leaves at once, without it")

    def came(self) -> bool:
        """To be asked once a step, in every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(next(_asked))
        return self._came is not None

    def stop(self, where: str, then: str) -> Resumable:
        """What ends the run: a line that says what came, where, and what then holds."""
        if self._came == signal.SIGINT:
            return Interrupted(f"{where}: Ctrl-C {then}")
        return Resumable(f"{where}: SIGTERM {then}")
