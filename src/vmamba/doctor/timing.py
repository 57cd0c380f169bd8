"""Time: of each module forward and backward, and whether the step waits for its data."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from typing import Any

import torch
from torch.autograd.graph import Node

from .patient import Patient
from .verdict import Level, Verdict
from .watching import LOSS, Watch, named
from .wording import milliseconds

__all__ = ["examine_time"]

REPEATS = 3
# shorter waiting is not worth a worker
SHORT_WAIT = 0.02


class _Clock:
    """Adds up time by the name that is current; on a GPU it waits for the work that was sent."""

    def __init__(self, device: torch.device) -> None:
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        self._device = device
        self._stack = [LOSS]
        self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _book(self, times: Counter[str], name: str) -> None:
        now = self._now()
        times[name] += now - self._last
        self._last = now

    def before(self, name: str, *_: Any) -> None:
        self._book(self.forward, self._stack[-1])
        self._stack.append(name)

    def after(self, name: str, *_: Any) -> None:
        self._book(self.forward, self._stack.pop())

    def start(self) -> None:
        self._last = self._now()

    def node(self, node: Node, owner: str, *_: Any) -> None:
        """After a node: the time since the last one is its."""
        self._book(self.backward, owner)


def examine_time(patient: Patient) -> list[Verdict]:
    """Some steps under hooks for the shares of the modules, some plain ones for the whole."""
    clocks, seconds = [], []
    for repeat in range(REPEATS):
        if repeat and not patient.has_time():
            break
        patient.restore()
        clock = _Clock(patient.subject.device)
        with Watch(patient.subject, patient.position, before=clock.before, after=clock.after) as watch:
            clock.start()
            loss = watch.forward()
            clock.start()
            watch.backward(loss, after=clock.node)
        clocks.append(clock)
        patient.restore()
        began = clock._now()
        patient.step()
        seconds.append(clock._now() - began)
    step = min(seconds)
    # the fastest is the least disturbed one
    forward, backward = (
        min((getattr(clock, name) for clock in clocks), key=lambda times: sum(times.values()))
        for name in ("forward", "backward")
    )
    whole = forward + backward
    total = sum(whole.values())
    most = [f"{named(name)} {100 * whole[name] / total:.0f} %" for name, _ in whole.most_common(3)]
    message = (
        f"A step takes {milliseconds(step)}; module by module {milliseconds(sum(forward.values()))} forward and "
        f"{milliseconds(sum(backward.values()))} backward, most in {', '.join(most)}."
    )
    figures = {
        "step_seconds": step,
        "forward_seconds": dict(forward.most_common()),
        "backward_seconds": dict(backward.most_common()),
    }
    return [Verdict(Level.OK, "time", message, figures=figures), *_waiting(patient, step)]


def _waiting(patient: Patient, step: float) -> list[Verdict]:
    waits = patient.facts.get("waits")
    if not waits:
        return []
    wait = statistics.median(waits)
    if wait <= max(step, SHORT_WAIT):
        return []
    workers = getattr(patient.subject.loader, "num_workers", None)
    now = "" if workers is None else f" (num_workers is {workers})"
    return [
        Verdict(
            Level.WARNING,
            "waiting for data",
            f"A batch takes {milliseconds(wait)} to load, a step {milliseconds(step)}: the model waits for its data.",
            f"Load in more worker processes{now}, keep them (persistent_workers=True), or hold the images in memory "
            "(data.in_memory). `vmamba data bench` says what is needed.",
            {"wait_seconds": wait, "step_seconds": step, "workers": workers},
        )
    ]
