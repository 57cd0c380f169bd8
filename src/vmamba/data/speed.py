"""How fast batches come, and whether a GPU that trains at a given speed would wait for them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

# the largest share of a GPU's time that making its own batches may take before it is worth a remark
SMALL_SHARE = 0.05


@dataclass(frozen=True)
class LoadingSpeed:
    """Images a second from ``workers`` processes, or, where that is None, made on ``device`` from memory."""

    workers: int | None
    device: str
    images_per_second: float

    def keeps_busy(self, needed: float) -> bool:
        """Whether a GPU that trains ``needed`` images a second gets them in time."""
        if self.makes_its_own:
            return self.share_of_time(needed) <= SMALL_SHARE
        return self.images_per_second >= needed

    @property
    def makes_its_own(self) -> bool:
        """Whether the GPU that trains makes the batches, so that the two take turns."""
        return self.workers is None and self.device != "cpu"

    def share_of_time(self, needed: float) -> float:
        """The part of its time in which a GPU that trains ``needed`` images a second would not train, 0 to 1."""
        if self.makes_its_own:
            return needed / (needed + self.images_per_second)
        return max(0.0, 1 - self.images_per_second / needed)


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
    taken, start, passed = 0, time.perf_counter(), 0.0
    while passed < seconds:
        images, _ = next(endless)
        taken += len(images)
        _finish(images)  # kernels are queued faster than they run, and the queue is not what is asked for
        passed = time.perf_counter() - start
    endless.close()
    return taken / passed


def _endless(batches: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        batches.sampler.set_epoch(epoch)
        yield from batches
        epoch += 1


def _finish(images: torch.Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
