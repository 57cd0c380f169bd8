"""What a run shows: a live line on a terminal, a line a minute in a log."""

import io

import pytest

from vmamba.training import progress
from vmamba.training.progress import RunProgress, duration


class Clock:
    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_gets_a_line_a_minute(clock):
    out = io.StringIO()
    run = RunProgress(steps=1000, images=64, memory=lambda: 1.25, out=out)
    run.start(step=100)
    for step in range(101, 351):
        clock.now += 0.5
        run.update(step, epoch=3, loss=2.5, lr=1e-3)
    run.print("epoch 3/10")
    run.stop()
    lines = out.getvalue().splitlines()
    # 125 seconds
    assert len(lines) == 3
    assert lines[0] == "epoch 3 step 220/1000  128 img/s  loss 2.5000  lr 1.00e-03  1.2 GiB  0:06:30 left"
    assert lines[1].startswith("epoch 3 step 340/1000")
    assert lines[2] == "epoch 3/10"


def test_a_terminal_gets_a_live_line(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    out = Terminal()
    run = RunProgress(steps=10, images=2, memory=lambda: None, out=out)
    run.start(step=0)
    clock.now += 1
    run.update(4, epoch=1, loss=0.5, lr=2e-4)
    run.stop()
    assert "epoch 1 step 4/10  8.0 img/s  loss 0.5000  lr 2.00e-04  2 s left" in out.getvalue()
    assert "━" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "0:01:00"), (3909, "1:05:09"), (2 * 86400 + 3 * 3600, "2 d 3:00:00")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
