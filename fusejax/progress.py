"""Progress on anything that takes more than a moment: bars on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

console = Console(stderr=False, highlight=False, soft_wrap=True, emoji=False)

_PLAIN_INTERVAL_S = 5.0
_FOLDED = 12  # characters of a line of words that a terminal has no room for


def show_table(table: Table, names: int = 1) -> None:
    """Print a table of numbers whose first `names` columns are words: words may fold, numbers are never cut.

    Where no terminal says how wide a line may be, nothing is folded.
    """
    for column in table.columns[:names]:
        column.overflow = "fold"
    for column in table.columns[names:]:
        column.justify, column.no_wrap = "right", True
    folded = _FOLDED if console.is_terminal else None
    for column in table.columns[:names]:
        column.max_width = folded
    needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    for column in table.columns[:names]:
        column.max_width = None
    width = console.width
    console.width = max(width, needed)
    console.print(table)
    console.width = width


class Bar:
    """What `progress` yields: call `advance(n, note)` as work gets done."""

    def __init__(self, title: str, total: int, bar: Progress | None):
        self._title, self._total, self._bar = title, total, bar
        self._done, self._note = 0, ""
        self._start = self._last_line = time.monotonic()
        self._steady: tuple[float, int] | None = None  # when the first line came, and what was done: compiled by then
        self._task = bar.add_task(title, total=total or None, note="") if bar else None

    def advance(self, n: int = 1, note: str = "") -> None:
        self._done, self._note = self._done + n, note or self._note
        if self._bar is not None:
            self._bar.update(self._task, advance=n, note=self._note)  # type: ignore[arg-type]
        elif time.monotonic() - self._last_line >= _PLAIN_INTERVAL_S and not self._finished:
            self._last_line = time.monotonic()
            self._line()

    @property
    def _finished(self) -> bool:
        return bool(self._total) and self._done >= self._total

    def _line(self) -> None:
        now = time.monotonic()
        when = f"{now - self._start:.1f} s" if self._finished or not self._total else f"{now - self._start:.0f} s"
        if self._steady is None:
            self._steady = now, self._done
        elif not self._finished and self._total and self._done > self._steady[1]:
            since, before = self._steady
            when += f", {(now - since) / (self._done - before) * (self._total - self._done):.0f} s left"
        of = f"/{self._total}" if self._total else ""
        print(f"{self._title}: {self._done}{of} [{when}] {self._note}".rstrip(), flush=True)


@contextmanager
def progress(title: str, total: int) -> Iterator[Bar]:
    """A bar titled `title` over `total` units of work (0: unknown); a line every few seconds without a terminal."""
    if not console.is_terminal:
        bar = Bar(title, total, None)
        yield bar
        bar._line()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as rich_bar:
        yield Bar(title, total, rich_bar)


def say(message: str) -> None:
    """One line for the user on standard output, at once."""
    if console.is_terminal:
        console.print(message, markup=False)
    else:
        print(message, flush=True)


def warn(message: str) -> None:
    """One line for the user on standard error."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
