"""How fast batches come, and whether a GPU that trains at a given speed would wait for them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# a GPU counts as busy when it trains for at least this share of its time
BUSY = 0.85


@dataclass(frozen=True)
class LoadingSpeed:
    """Images a second from ``workers`` processes, or, where that is None, made on ``device`` from memory."""

    workers: int | None
    device: str
    images_per_second: float

    @property
    def takes_turns(self) -> bool:
        """Whether the GPU that trains makes the batches, too, so that it does either the one or the other."""
        return self.workers is None and self.device != "cpu"

    def lost(self, needed: float) -> float:
        """The part of its time in which a GPU that trains ``needed`` images a second would not train, 0 to 1.

        Where the GPU makes the batches this is the most it can be: a part of what is measured is the CPU's work of
        starting kernels, which goes on while the GPU trains.
        """
        if self.takes_turns:
            return needed / (needed + self.images_per_second)
        return max(0.0, 1 - self.images_per_second / needed)

    def keeps_busy(self, needed: float) -> bool:
        """Whether a GPU that trains ``needed`` images a second would do so for 85 % of its time or more."""
        return self.lost(needed) <= 1 - BUSY


def workers_needed(speeds: Iterable[LoadingSpeed], needed: float) -> int | None:
    """How many processes would do, if each were as fast as those measured; None where none were measured."""
    each = [speed.images_per_second / speed.workers for speed in speeds if speed.workers]
    return math.ceil(needed / max(each)) if each else None


def measure_loading(batches: Any, *, seconds: float, warm_up: int) -> float:
    """Images a second that ``batches`` (a loader, or batches from memory) gives to somebody who takes them at once.

    The first ``warm_up`` batches, while processes start and fill their queue, do not count; epochs follow one another
    without end.
    """
    endless = _endless(batches)
    for _ in range(max(1, warm_up)):
        images, _ = next(endless)
    _finish(images)
    taken, start = 0, time.perf_counter()
    while not taken or time.perf_counter() - start < seconds:
        images, _ = next(endless)
        taken += len(images)
    _finish(images)  # kernels are queued faster than they run
    passed = time.perf_counter() - start
    endless.close()
    return taken / passed


def _endless(batches: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        batches.sampler.set_epoch(epoch)
        yield from batches
        epoch += 1


def _finish(images: Sequence[torch.Tensor]) -> None:
    if images[0].is_cuda:
        torch.cuda.synchronize(images[0].device)
