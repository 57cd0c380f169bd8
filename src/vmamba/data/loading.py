"""Batches whose order and augmentation are a pure function of seed and epoch, whatever the number of workers."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .reading import Samples
from .transforms import Transform

# separate streams of one seed, so that no two uses draw the same numbers
ORDER_STREAM, SAMPLE_STREAM, STEP_STREAM, BATCH_STREAM, NOISE_STREAM = range(5)


def derive_seed(seed: int, *stream: int) -> int:
    """A 63-bit seed for the use that ``stream`` names: same arguments, same number, on every machine."""
    word = np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0]
    return int(word >> np.uint64(1))


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 timm's mixup and augmentations draw from this global generator
    torch.manual_seed(seed)


class EpochOrder(Sampler[tuple[int, int]]):
    """Yields (epoch, index) pairs: a fresh permutation every epoch, given by ``seed`` and the epoch alone."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, ORDER_STREAM, self.epoch]).permutation(self.length)
        return ((self.epoch, int(index)) for index in order)


class TrainingImages(Dataset):
    """Augmented samples, taken by (epoch, index).

    The transform draws from the global generators of Python, NumPy and torch. They are seeded for this sample alone
    and put back afterwards, so a sample looks the same in any process, in any order, and after a resume.
    """

    def __init__(self, samples: Samples, transform: Transform, seed: int) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        image, label = self.samples[index]
        python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
        with torch.random.fork_rng(devices=[]):
            seed = derive_seed(self.seed, SAMPLE_STREAM, epoch, index)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.default_generator.manual_seed(seed)
            try:
                return self.transform(image), label
            finally:
                random.setstate(python_state)
                np.random.set_state(numpy_state)  # noqa: NPY002


class EvaluationImages(Dataset):
    """Samples through the evaluation transform."""

    def __init__(self, samples: Samples, transform: Transform) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.samples[index]
        return self.transform(image), label


def training_loader(samples: Samples, transform: Transform, *, batch_size: int, workers: int, seed: int) -> DataLoader:
    """Shuffled batches. The ragged last batch is left out, unless it is the only one."""
    return DataLoader(
        TrainingImages(samples, transform, seed),
        batch_size=batch_size,
        sampler=EpochOrder(len(samples), seed),
        drop_last=len(samples) >= batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
    )


def evaluation_loader(samples: Samples, transform: Transform, *, batch_size: int, workers: int) -> DataLoader:
    """Batches in the samples' own order, all of them."""
    return DataLoader(
        EvaluationImages(samples, transform),
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
    )


def _one_thread(_: int) -> None:
    # the workers together fill the machine; threads inside them would only fight with the model's
    torch.set_num_threads(1)
