"""Preemption: a cluster that takes the machine back sends SIGTERM first, and the run saves before it ends."""

import itertools
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

# Of the process, over all its runs: JAX brings every process to the number after the last that any of them gave, so a
# notice between two runs, or before the first step of one that goes on, would be missed by numbers that start anew.
_asked = itertools.count(1)


class Notice:
    """Whether SIGTERM came; a context manager. With several processes all say so at the same step."""

    def __init__(self) -> None:
        self._came = False
        self._before: Any = None
        # JAX's runtime has its own handler where there are several processes, and brings them to the same step.
        self._own = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Notice":
        if self._own:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._own:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True

    def came(self) -> bool:
        """To be asked once a step, in every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(next(_asked))
        return self._came
