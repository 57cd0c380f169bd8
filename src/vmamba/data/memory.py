"""Data sets that fit into memory: every image decoded once, batches augmented on the device that trains."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .batch_augmentation import BatchAugmentation
from .loading import EpochOrder, epoch_order
from .reading import Samples, image_size
from .transforms import Augmentation, Preprocessing, evaluation_transform

# shares of the free memory that decoded images may take: of the computer's, and of the GPU's, which training needs
HOST_SHARE, DEVICE_SHARE = 0.8, 0.4
# A GPU gets some 450 small operations to make a batch, however large it is, and launching them takes the CPU as long as
# half a training step of 128 small images. So several batches are made at once: of so many values (0.3 GB), or 16.
TOGETHER_VALUES, TOGETHER_BATCHES = 80_000_000, 16
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class ImagesInMemory:
    """Decoded images: ``pixels`` (n, 3, H, W) uint8, each image in the upper left corner of its H x W.

    ``heights`` and ``widths`` (n,) are the images' own; ``labels`` (n,) int64 are indices into ``classes``.
    """

    classes: tuple[str, ...]
    pixels: Tensor
    heights: np.ndarray
    widths: np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def decode(samples: Samples, longest: int | None = None) -> ImagesInMemory:
    """All ``samples`` decoded, for training. Images longer than ``longest`` pixels are reduced to that (bicubic).

    Raises:
        ValueError: they need more than 80 % of the memory that is free (nothing was decoded then), or an image is
            damaged; names it.
    """
    heights, widths = _sizes(samples, longest)

    def reduce(image: Image.Image) -> np.ndarray:
        height, width = _reduced((image.height, image.width), longest)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1)

    return _filled(samples, heights, widths, (int(heights.max()), int(widths.max())), reduce)


def decode_for_evaluation(samples: Samples, preprocessing: Preprocessing) -> ImagesInMemory:
    """All ``samples`` through :func:`~.transforms.evaluation_transform` up to its normalisation.

    Raises: as :func:`decode`.
    """
    transform = evaluation_transform(preprocessing, normalize=False)
    box = preprocessing.image_size
    sizes = (np.full(len(samples), side, dtype=np.int64) for side in box)
    return _filled(samples, *sizes, box, lambda image: transform(image).numpy())


def check_room(
    parts: Sequence[Samples], preprocessing: Preprocessing, longest: int | None = None, processes: int = 1
) -> None:
    """Whether ``parts``, the first for training and the others for evaluation, fit into memory together.

    Each of the ``processes`` on this machine keeps all training images, and its share of the others.

    Raises:
        ValueError: they need more than 80 % of the memory that is free, or an image is unreadable; names it.
    """
    train, *others = parts
    heights, widths = _sizes(train, longest)
    needed = processes * len(train) * 3 * int(heights.max()) * int(widths.max())
    needed += sum(len(part) for part in others) * 3 * math.prod(preprocessing.image_size)
    _refuse_too_much(needed, sum(map(len, parts)), int(heights.max()), int(widths.max()))


class MemoryTrainingBatches:
    """Shuffled, augmented batches of images in memory, in the place of a data loader.

    Iterating gives (images (B, 3, h, w) float32 in channels-last layout, labels (B,) int64) on the device of
    ``augmentation``. A batch follows from seed, epoch and position alone. The state is the position, as that of
    :class:`~.loading.ResumableLoader`.

    Args:
        images: decoded images; they stay on the GPU where they take at most 40 % of its free memory.
        augmentation: what happens to them; its device is where batches are made.
        sampler: says which images, in what order.
    """

    def __init__(
        self, images: ImagesInMemory, augmentation: BatchAugmentation, *, batch_size: int, sampler: EpochOrder
    ) -> None:
        self.images = images
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.sampler = sampler
        self.device = augmentation.device
        self._pixels, self._labels = (_settled(part, self.device) for part in (images.pixels, images.labels))
        self._given = 0
        self._together = made_together(self.device, batch_size * 3 * math.prod(augmentation.preprocessing.image_size))

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """The epoch begun last and how many of its batches were given out."""
        return {"epoch": self.sampler.epoch, "batches": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.set_epoch(state["epoch"])
        self.sampler.skip = state["batches"] * self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # a generator: the sampler is asked at the first batch, when the epoch is set
        skip = self.sampler.skip
        self._given = first = skip // self.batch_size
        # the same batches are made together after a resume, so that their values are the same to the last bit
        number = first - first % self._together
        self.sampler.skip = number * self.batch_size
        order = iter(self.sampler)
        self.sampler.skip = skip
        while pairs := list(itertools.islice(order, self.batch_size * self._together)):
            made = self._make(pairs[0][0], np.array([index for _, index in pairs], dtype=np.int64))
            for batch in zip(*(part.split(self.batch_size) for part in made), strict=True):
                number += 1
                if number > first:
                    self._given = number
                    yield batch

    def _make(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        draws = self.augmentation.draw(epoch, indices, self.images.heights[indices], self.images.widths[indices])
        images, labels = (_taken(part, indices, self.device) for part in (self._pixels, self._labels))
        return self.augmentation.apply(images, draws), labels


class MemoryEvaluationBatches:
    """Normalised batches of images in memory, in their own order, all of them, in the place of a data loader."""

    def __init__(
        self, images: ImagesInMemory, preprocessing: Preprocessing, *, batch_size: int, device: str | torch.device
    ) -> None:
        self.device = torch.device(device)
        self.batch_size = batch_size
        self._pixels, self._labels = (_settled(part, self.device) for part in (images.pixels, images.labels))
        mean, std = (torch.tensor(v, device=self.device) for v in (preprocessing.mean, preprocessing.std))
        self._mean, self._std = (values[:, None, None] for values in (mean, std))

    def __len__(self) -> int:
        return -(-len(self._labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self._labels), self.batch_size):
            indices = np.arange(start, min(start + self.batch_size, len(self._labels)))
            images, labels = (_taken(part, indices, self.device) for part in (self._pixels, self._labels))
            images = images.to(torch.float32, memory_format=torch.channels_last)
            yield images.div_(255).sub_(self._mean).div_(self._std), labels


def training_batches_in_memory(
    samples: Samples,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    device: str | torch.device,
    longest: int | None = None,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    steps: int | None = None,
) -> MemoryTrainingBatches:
    """What :func:`~.loading.training_loader` gives, from memory.

    Raises:
        ValueError: see :func:`decode` and :class:`~.batch_augmentation.BatchAugmentation`.
    """
    augment = BatchAugmentation(preprocessing, augmentation, seed=seed, device=torch.device(device))
    share = {"rank": rank, "world": world, "accumulate": accumulate, "steps": steps}
    sampler = epoch_order(len(samples), batch_size=batch_size, seed=seed, **share)
    return MemoryTrainingBatches(decode(samples, longest), augment, batch_size=batch_size, sampler=sampler)


def evaluation_batches_in_memory(
    samples: Samples,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    device: str | torch.device,
    rank: int = 0,
    world: int = 1,
) -> MemoryEvaluationBatches:
    """What :func:`~.loading.evaluation_loader` gives, from memory.

    Raises:
        ValueError: see :func:`decode`.
    """
    images = decode_for_evaluation(samples.subset(range(rank, len(samples), world)), preprocessing)
    return MemoryEvaluationBatches(images, preprocessing, batch_size=batch_size, device=device)


def made_together(device: torch.device, values: int) -> int:
    """How many training batches of so many values are made at once on a device."""
    return min(max(1, TOGETHER_VALUES // values), TOGETHER_BATCHES) if device.type == "cuda" else 1


def free_memory() -> int:
    """Bytes of memory that programs may still take here: the system's, within the limit of a container."""
    if _MEMINFO.is_file():
        rows = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        free = 1024 * int(rows["MemAvailable"].split()[0])
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (allowed := limit.read_text().strip()) != "max":
        free = min(free, int(allowed) - int(used.read_text()))
    return free


def _reduced(size: tuple[int, int], longest: int | None) -> tuple[int, int]:
    if longest is None or max(size) <= longest:
        return size
    height, width = (max(1, round(side * longest / max(size))) for side in size)
    return height, width


def _sizes(samples: Samples, longest: int | None) -> np.ndarray:
    """Heights and widths of the reduced images, (2, n) int64, from their headers."""
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(lambda i: _reduced(image_size(samples, i), longest), range(len(samples))))
    return np.array(sizes, dtype=np.int64).T


def _refuse_too_much(needed: int, images: int, height: int, width: int) -> None:
    free = free_memory()
    if needed > HOST_SHARE * free:
        raise ValueError(
            f"{images} decoded images of up to {height} x {width} px need {_readable(needed)}, and of the "
            f"{_readable(free)} of free memory at most {HOST_SHARE:.0%} may be used: set data.memory_size to a "
            f"smaller size, or data.in_memory=false"
        )


def _readable(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _filled(
    samples: Samples,
    heights: np.ndarray,
    widths: np.ndarray,
    box: tuple[int, int],
    pixels_of: Callable[[Image.Image], np.ndarray],
) -> ImagesInMemory:
    _refuse_too_much(len(samples) * 3 * math.prod(box), len(samples), *box)
    pixels = np.zeros((len(samples), 3, *box), dtype=np.uint8)

    def fill(index: int) -> None:
        image, _ = samples[index]
        pixels[index, :, : heights[index], : widths[index]] = pixels_of(image)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(fill, range(len(samples))):
            pass
    labels = torch.tensor(samples.labels, dtype=torch.int64)
    return ImagesInMemory(samples.classes, torch.from_numpy(pixels), heights, widths, labels)


def _settled(part: Tensor, device: torch.device) -> Tensor:
    """``part`` on the device where there is room for it, or where it is."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if part.nbytes <= DEVICE_SHARE * free:
            return part.to(device)
    return part


def _taken(part: Tensor, indices: np.ndarray, device: torch.device) -> Tensor:
    """The rows ``indices`` of ``part``, on the device."""
    rows = torch.from_numpy(indices)
    if device.type != "cuda":
        return part[rows]
    if part.is_cuda:
        return part[rows.pin_memory().to(device, non_blocking=True)]
    chosen = torch.empty(len(rows), *part.shape[1:], dtype=part.dtype, pin_memory=True)
    return torch.index_select(part, 0, rows, out=chosen).to(device, non_blocking=True)
