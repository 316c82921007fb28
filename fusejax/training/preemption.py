"""Preemption: a cluster that takes the machine back sends SIGTERM first, and the run saves before it ends."""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Notice:
    """Whether SIGTERM came; a context manager. With several processes all say so at the same step."""

    def __init__(self) -> None:
        self._came = False
        self._asked = 0
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
        self._asked += 1
        if jax.process_count() > 1:
            # Counted from the start of the process, not of the run: a notice before the first step is for count 1.
            return multihost_utils.reached_preemption_sync_point(self._asked)
        return self._came
