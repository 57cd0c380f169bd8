"""Batches whose order and augmentation are a pure function of seed and epoch, whatever the number of workers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

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
    """Seed the generators of Python, NumPy and torch, of the CPU and of the devices that are here.

    Every training step does. `torch.manual_seed` leaves word, with a stack trace of 1 ms, for every kind of device that
    is not.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 timm's mixup and augmentations draw from this global generator
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    if torch.xpu.is_available():
        torch.xpu.manual_seed_all(seed)


class EpochOrder(Sampler[tuple[int, int]]):
    """Yields (epoch, index) pairs: a fresh permutation every epoch, given by ``seed`` and the epoch alone.

    Process ``rank`` of ``world`` takes every ``world``-th place of it, beginning with place ``rank``, so that a step
    sees the same images however many processes share it. Of ``length`` images the first ``used`` (None: all) are given
    out; ``skip`` leaves out so many of this process's share of the present epoch, those trained on before a resume.
    """

    def __init__(self, length: int, seed: int, *, rank: int = 0, world: int = 1, used: int | None = None) -> None:
        self.length = length
        self.seed = seed
        self.rank, self.world = rank, world
        self.used = length if used is None else used
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.skip = 0
        self.epoch = epoch

    def __len__(self) -> int:
        # of the whole epoch: what is skipped was part of it
        return len(range(self.rank, self.used, self.world))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, ORDER_STREAM, self.epoch]).permutation(self.length)
        share = order[: self.used][self.rank :: self.world]
        return ((self.epoch, int(index)) for index in share[self.skip :])


class EndlessOrder(EpochOrder):
    """Permutations one after another, without end, cut into epochs of ``used`` images, whatever ``length`` is.

    Yields (number of the permutation, index).
    """

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self.epoch * self.used
        number, order = -1, np.empty(0, dtype=np.int64)
        for place in range(first + self.rank + self.skip * self.world, first + self.used, self.world):
            if place // self.length != number:
                number = place // self.length
                order = np.random.default_rng([self.seed, ORDER_STREAM, number]).permutation(self.length)
            yield number, int(order[place % self.length])


def epoch_order(
    images: int,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    steps: int | None = None,
) -> EpochOrder:
    """The order of so many images for batches of ``batch_size`` in process ``rank`` of ``world``.

    A step is ``accumulate`` batches of every process. Images that do not fill a step are left out of the epoch, unless
    they are all there are. With ``steps`` an epoch is so many steps, and the images go round without end.
    """
    step = batch_size * world * accumulate
    if steps is not None:
        return EndlessOrder(images, seed, rank=rank, world=world, used=steps * step)
    return EpochOrder(images, seed, rank=rank, world=world, used=images // step * step or images)


class SeededSamples(Dataset):
    """The items of ``dataset``, taken by (epoch, index), whose randomness follows from the seed and these two.

    Making an item may draw from the global generators of Python, NumPy and torch. They are seeded for it alone and put
    back afterwards, so an item looks the same in any process, in any order, and after a resume.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
        with torch.random.fork_rng(devices=[]):
            seed = derive_seed(self.seed, SAMPLE_STREAM, epoch, index)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.default_generator.manual_seed(seed)
            try:
                return self.dataset[index]
            finally:
                random.setstate(python_state)
                np.random.set_state(numpy_state)  # noqa: NPY002


class TransformedImages(Dataset):
    """Labelled samples with a transform applied to the image."""

    def __init__(self, samples: Samples, transform: Transform) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.samples[index]
        return self.transform(image), label


class ResumableLoader(DataLoader):
    """A loader that says how far into its epoch it is, and goes on from there (its sampler is an EpochOrder)."""

    _given = 0

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        # a generator: nothing is fetched before the first batch is asked for, when the epoch is set
        self._given = self.sampler.skip // self.batch_size
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.sampler.epoch, "batches": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.set_epoch(state["epoch"])
        self.sampler.skip = state["batches"] * self.batch_size


def training_loader(samples: Samples, transform: Transform, **options: Any) -> ResumableLoader:
    """Shuffled, augmented batches of labelled images; ``options`` as of :func:`resumable_loader`."""
    return resumable_loader(TransformedImages(samples, transform), **options)


def evaluation_loader(samples: Samples, transform: Transform, **options: Any) -> DataLoader:
    """Batches of labelled images in their own order; ``options`` as of :func:`ordered_loader`."""
    return ordered_loader(TransformedImages(samples, transform), **options)


def resumable_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    workers: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    steps: int | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
) -> ResumableLoader:
    """Shuffled batches of ``batch_size`` items for process ``rank`` of ``world``; see :func:`epoch_order`."""
    share = {"rank": rank, "world": world, "accumulate": accumulate, "steps": steps}
    return ResumableLoader(
        SeededSamples(dataset, seed),
        batch_size=batch_size,
        sampler=epoch_order(len(dataset), batch_size=batch_size, seed=seed, **share),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
        collate_fn=collate,
    )


def ordered_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
    collate: Callable[[list[Any]], Any] | None = None,
) -> DataLoader:
    """Batches in the data set's own order, all of it; of several processes each has every ``world``-th item."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(rank, len(dataset), world),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
        collate_fn=collate,
    )


def _one_thread(_: int) -> None:
    # the workers together fill the machine; threads inside them would only fight with the model's
    torch.set_num_threads(1)
