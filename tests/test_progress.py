"""Progress without a terminal: plain lines."""

from types import SimpleNamespace

import pytest

from fusejax import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which the test sets."""
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.s)
    monkeypatch.setattr(progress, "console", SimpleNamespace(is_terminal=False))
    return now


def test_time_left_leaves_out_what_came_before_the_first_line(clock, capsys):
    with progress.progress("train", 100) as bar:
        clock.s += 30  # compiling
        bar.advance(1)
        for _ in range(19):
            clock.s += 0.5
            bar.advance(1)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["train: 1/100 [30 s]", "train: 11/100 [35 s, 44 s left]", "train: 20/100 [40 s, 40 s left]"]


def test_work_of_unknown_size_has_no_time_left(clock, capsys):
    with progress.progress("read", 0) as bar:
        for _ in range(3):
            clock.s += 4
            bar.advance(5)
    assert capsys.readouterr().out.splitlines() == ["read: 10 [8.0 s]", "read: 15 [12.0 s]"]
