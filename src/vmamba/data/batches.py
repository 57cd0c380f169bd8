"""Batches of a data set for training and evaluation: from worker processes, or from memory."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from .loading import ResumableLoader, evaluation_loader, training_loader
from .memory import (
    MemoryEvaluationBatches,
    MemoryTrainingBatches,
    check_room,
    evaluation_batches_in_memory,
    training_batches_in_memory,
)
from .rand_augment import Policy
from .reading import Samples
from .transforms import Augmentation, Preprocessing, evaluation_transform, training_transform


def check_batches(
    parts: list[Samples],
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    *,
    in_memory: bool = False,
    longest: int | None = None,
    processes: int = 1,
) -> None:
    """Find out before anything starts what would make the functions below fail.

    ``parts[0]`` is trained on, the others are evaluated on; ``processes`` do so on this machine.

    Raises:
        ValueError: the augmentation is none, or cannot be done in batches, or there is too little memory.
    """
    training_transform(preprocessing, augmentation)
    if in_memory:
        if augmentation.rand_augment:
            Policy.parse(augmentation.rand_augment)
        check_room(parts, preprocessing, longest, processes)


def training_batches(
    samples: Samples,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    in_memory: bool = False,
    longest: int | None = None,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    steps: int | None = None,
) -> ResumableLoader | MemoryTrainingBatches:
    """Shuffled, augmented batches: images (B, 3, h, w) float32, labels (B,) int64.

    From ``workers`` processes, on the CPU; or, with ``in_memory``, decoded once (reduced to ``longest`` pixels) and
    augmented on ``device``. ``rank``, ``world``, ``accumulate`` and ``steps``: see :func:`~.loading.epoch_order`.
    """
    share = {"batch_size": batch_size, "seed": seed, "rank": rank, "world": world, "accumulate": accumulate}
    share["steps"] = steps
    if in_memory:
        return training_batches_in_memory(
            samples, preprocessing, augmentation, device=_augmenting(device), longest=longest, **share
        )
    return training_loader(samples, training_transform(preprocessing, augmentation), workers=workers, **share)


def evaluation_batches(
    samples: Samples,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int = 0,
    in_memory: bool = False,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world: int = 1,
) -> DataLoader | MemoryEvaluationBatches:
    """All samples in their order, through the evaluation transform; the same pixels from processes and from memory.

    Of several processes (``world``) each has every ``world``-th sample.
    """
    share = {"batch_size": batch_size, "rank": rank, "world": world}
    if in_memory:
        return evaluation_batches_in_memory(samples, preprocessing, device=_augmenting(device), **share)
    return evaluation_loader(samples, evaluation_transform(preprocessing), workers=workers, **share)


def _augmenting(device: str | torch.device) -> torch.device:
    """Where to augment for a model on ``device``: MPS lacks the double precision that equals Pillow's arithmetic."""
    device = torch.device(device)
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")
