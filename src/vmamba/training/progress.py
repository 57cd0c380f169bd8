"""How a run is doing, while it runs: a live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

# a log file gets a line this often, in seconds, beside those at the ends of epochs
LOG_EVERY = 60.0
# and a terminal a new line this often: making one takes half a millisecond, as long as some of a step's work
SHOW_EVERY = 0.1


class RunProgress:
    """Steps of a run of ``steps``, each of ``images`` images; ``out`` None is the standard output.

    ``memory`` says how much was taken so far, in GiB, or None.

    Speed and time left are those since :meth:`start`, validation included.
    """

    def __init__(self, steps: int, images: int, memory: Callable[[], float | None], out: TextIO | None = None) -> None:
        self.steps = steps
        self.images = images
        self._memory = memory
        self._console = Console(file=out, highlight=False, soft_wrap=True)
        self._live: Progress | None = None
        self._first_step = 0
        self._started = self._logged = self._shown = self._seen_at = 0.0
        self._seen_step = 0
        self._speed = 0.0

    def start(self, step: int) -> None:
        """Begin at optimiser step ``step``."""
        self._first_step = self._seen_step = step
        self._started = self._logged = self._seen_at = time.perf_counter()
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=20), console=self._console, transient=True
            )
            self._task = self._live.add_task("", total=self.steps, completed=step)
            self._live.start()

    def update(self, step: int, epoch: int, loss: float, lr: float) -> None:
        """Step ``step`` is done, in epoch ``epoch`` (from 1)."""
        now = time.perf_counter()
        # a GPU takes steps in bursts: only a second of them is a speed
        if now - self._seen_at >= 1 or not self._speed:
            self._speed = self.images * (step - self._seen_step) / max(now - self._seen_at, 1e-9)
            self._seen_at, self._seen_step = now, step
        if self._live is not None and now - self._shown >= SHOW_EVERY:
            self._shown = now
            self._live.update(self._task, completed=step, description=self._describe(step, epoch, loss, lr, now))
        elif self._live is None and now - self._logged >= LOG_EVERY:
            self._logged = now
            self.print(self._describe(step, epoch, loss, lr, now))

    def print(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False)

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _describe(self, step: int, epoch: int, loss: float, lr: float, now: float) -> str:
        memory = self._memory()
        left = (now - self._started) / max(1, step - self._first_step) * (self.steps - step)
        parts = [
            f"epoch {epoch} step {step}/{self.steps}",
            f"{self._speed:.0f} img/s" if self._speed >= 10 else f"{self._speed:.1f} img/s",
            f"loss {loss:.4f}",
            f"lr {lr:.2e}",
            *([f"{memory:.1f} GiB"] if memory is not None else []),
            f"{duration(left)} left",
        ]
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """A length of time as people say it: "42 s", "1:05:09", "2 d 3:00:00"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    days, rest = divmod(whole, 86400)
    text = f"{rest // 3600}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days} d {text}" if days else text
