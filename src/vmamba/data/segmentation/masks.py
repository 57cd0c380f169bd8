"""Images with a mask each: what the numbers in a mask file mean, and the files as a data set."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..decoded import DecodedImages
from ..reading import DAMAGE, read_image

IGNORED = 255  # the label of pixels that nothing is learnt from and that no metric counts
MAX_CLASSES = IGNORED


@dataclass(frozen=True)
class LabelMap:
    """What the numbers in mask files mean: ``values[i]`` is class ``i``; those in ``ignored`` become ``IGNORED``.

    Raises:
        ValueError: more than 255 classes, or a number with two meanings.
    """

    values: tuple[int, ...]
    ignored: tuple[int, ...] = (IGNORED,)

    def __post_init__(self) -> None:
        if not 0 < len(self.values) <= MAX_CLASSES:
            raise ValueError(f"a data set must have 1 to {MAX_CLASSES} classes, not {len(self.values)}")
        both = set(self.values) & set(self.ignored)
        if both or len(set(self.values)) < len(self.values):
            raise ValueError(f"a label must have one meaning: values {self.values}, ignored {self.ignored}")

    def unknown(self, raw: np.ndarray) -> list[int]:
        """The numbers in ``raw`` that mean nothing, in ascending order."""
        # counting takes a quarter of the time of sorting, which a 32-bit mask may need
        few = raw.min() >= 0 and raw.max() < 1 << 16
        present = np.flatnonzero(np.bincount(raw.ravel())) if few else np.unique(raw)
        return sorted(set(present.tolist()) - set(self.values) - set(self.ignored))

    def apply(self, raw: np.ndarray) -> np.ndarray:
        """Classes (H, W) uint8 of a mask's numbers (H, W); unknown numbers become ``IGNORED`` too."""
        known = np.array(self.values)
        order = known.argsort()
        # a number above every class has no place among them: any place will do, the comparison tells
        place = order[np.searchsorted(known[order], raw).clip(max=len(known) - 1)]
        return np.where(known[place] == raw, place, IGNORED).astype(np.uint8)


def read_index_mask(path: str | Path) -> np.ndarray:
    """The numbers of a mask file, (H, W): grey values or palette indices of 8 or 16 bits.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image, is damaged, or is a colour picture; names it.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("1", "L", "P", "I", "I;16"):
                raise ValueError(f"it is a colour picture ({image.mode}); an index mask has one number a pixel")
            return np.array(image).astype(np.int32)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such mask: {path}") from None
    except DAMAGE as error:
        raise ValueError(f"cannot read the mask {path}: {error}") from error


@dataclass(frozen=True)
class MaskedImages:
    """Image files with a mask file each; item ``i`` is (RGB image, classes (H, W) uint8, ``IGNORED`` for none)."""

    classes: tuple[str, ...]
    labels: LabelMap
    images: tuple[Path, ...]
    masks: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The image and its mask.

        Raises:
            ValueError: a file is damaged, the mask holds an unknown label or has another size; names the file.
        """
        image = read_image(self.images[index])
        raw = read_index_mask(self.masks[index])
        problem = mask_problem(raw, self.labels, image.size, self.images[index])
        if problem:
            raise ValueError(f"{self.masks[index]} {problem[1]}")
        return image, self.labels.apply(raw)

    def subset(self, indices: Sequence[int]) -> MaskedImages:
        """The images at ``indices``, in that order."""
        images, masks = (tuple(files[i] for i in indices) for files in (self.images, self.masks))
        return MaskedImages(self.classes, self.labels, images, masks)


class MasksInMemory:
    """Masked images, decoded once; item ``i`` is (image (3, H, W) uint8, classes (H, W) uint8), both tensors.

    Raises:
        ValueError: a file is damaged, or a mask does not fit its image, naming the file; or there is too little memory.
    """

    def __init__(self, samples: MaskedImages) -> None:
        # a mask is a fourth channel, so that a pair is decoded in one go
        self._pairs = DecodedImages([(4, *_size_of(path)) for path in samples.images], lambda i: _stacked(samples[i]))

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self._pairs[index]
        return pair[:3], pair[3]


def class_shares(samples: MaskedImages) -> np.ndarray:
    """The share that each class has of all labelled pixels, (classes,) fp64.

    Raises:
        ValueError: a mask is damaged, naming the file, or no pixel is labelled.
    """
    with ThreadPoolExecutor() as pool:
        counts = sum(pool.map(partial(_class_counts, samples.labels, len(samples.classes)), samples.masks))
    if not counts.sum():
        raise ValueError(f"none of the {len(samples)} masks has a labelled pixel")
    return counts / counts.sum()


def _class_counts(labels: LabelMap, classes: int, path: Path) -> np.ndarray:
    found = labels.apply(read_index_mask(path))
    return np.bincount(found[found != IGNORED], minlength=classes)


def _size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image file, from its header."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except DAMAGE as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def _stacked(pair: tuple[Image.Image, np.ndarray]) -> np.ndarray:
    image, mask = pair
    return np.concatenate([np.asarray(image).transpose(2, 0, 1), mask[None]])


def mask_problem(raw: np.ndarray, labels: LabelMap, image_size: tuple[int, int], image: Path) -> tuple[str, str] | None:
    """What is wrong, in short and in full, with a mask's numbers (H, W) beside an image of (width, height)."""
    height, width = raw.shape
    if (width, height) != image_size:
        return "other size", f"is {width}x{height} pixels, its image {image} is {image_size[0]}x{image_size[1]}"
    unknown = labels.unknown(raw)
    if unknown:
        shown = ", ".join(map(str, unknown[:10])) + (" ..." if len(unknown) > 10 else "")
        ignored = ", ".join(map(str, labels.ignored)) or "none"
        return "unknown label", (
            f"holds the unknown label(s) {shown}: the {len(labels.values)} classes are "
            f"{min(labels.values)} to {max(labels.values)}, ignored is {ignored}"
        )
    return None
