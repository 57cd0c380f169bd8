"""Data sets of small images that are arrays: handwritten digits, and mosaics of tiles such as CIFAR's."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from .._extras import require
from .reading import IMAGE_SUFFIXES, decode_image

DIGIT_CLASSES = tuple(str(digit) for digit in range(10))
# a mosaic is so many square tiles wide
TILES_A_ROW = 25
MOSAIC = re.compile(r"(train|val|test)/(\d+)_([^/]+)\.\w+")


@dataclass(frozen=True, eq=False)
class Arrays:
    """Grey images (n, H, W) or RGB ones (n, H, W, 3), uint8, with labels; item ``i`` is (RGB image, label)."""

    classes: tuple[str, ...]
    images: np.ndarray
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), self.labels[index]

    def subset(self, indices: Sequence[int]) -> Arrays:
        """The images at ``indices``, in that order."""
        return Arrays(self.classes, self.images[list(indices)], tuple(self.labels[i] for i in indices))

    def name(self, index: int) -> str:
        return f"image {index} ({self.classes[self.labels[index]]})"


def load_digits() -> Arrays:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels, grey values 0..255; on the disk wherever scikit-learn is.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    digits = require("sklearn.datasets", "train").load_digits()
    # 17 grey levels, 0..16
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return Arrays(DIGIT_CLASSES, images, tuple(int(label) for label in digits.target))


def is_mosaic(members: Sequence[str]) -> bool:
    """Whether the members of a zip file are mosaics: ``SPLIT/LABEL_CLASS.EXT`` and no images besides."""
    images = [name for name in members if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    return bool(images) and all(MOSAIC.fullmatch(name) for name in images)


def load_mosaic(path: Path) -> dict[str, Arrays]:
    """The splits of a zip file of mosaics: of each split and class one picture, square tiles, 25 a row, no gaps.

    The last row of a mosaic must be full. Labels are the numbers the file names begin with.

    Raises:
        ValueError: a mosaic is damaged or no whole number of tiles, or labels and names do not fit; names it.
    """
    tiles: dict[str, dict[int, np.ndarray]] = {}
    names: dict[int, str] = {}
    with zipfile.ZipFile(path) as archive:
        for member in sorted(archive.namelist()):
            found = MOSAIC.fullmatch(member)
            if not found:
                continue
            split, label, name = found[1], int(found[2]), found[3]
            if names.setdefault(label, name) != name:
                raise ValueError(f"{path}: label {label} is {names[label]!r} and, in {member}, {name!r}")
            tiles.setdefault(split, {})[label] = _cut(decode_image(archive.read(member), f"{path}/{member}"), member)
    labels = sorted(names)
    if labels != list(range(len(labels))):
        raise ValueError(f"{path}: the labels of the classes must be 0, 1, 2 ..., not {labels}")
    classes = tuple(names[label] for label in labels)
    splits = {}
    for split, by_label in tiles.items():
        missing = [classes[label] for label in labels if label not in by_label]
        if missing:
            raise ValueError(f"{path}: {split} has no images of {', '.join(missing)}")
        counts = [len(by_label[label]) for label in labels]
        images = np.concatenate([by_label[label] for label in labels])
        splits[split] = Arrays(classes, images, tuple(np.repeat(labels, counts).tolist()))
    return splits


def _cut(mosaic: Image.Image, name: str) -> np.ndarray:
    """The tiles (n, S, S, 3), row by row."""
    side, rest = divmod(mosaic.width, TILES_A_ROW)
    if not side or rest or mosaic.height % side:
        raise ValueError(
            f"{name}: {mosaic.width} x {mosaic.height} px is no mosaic of square tiles, {TILES_A_ROW} a row"
        )
    pixels = np.asarray(mosaic).reshape(mosaic.height // side, side, TILES_A_ROW, side, 3)
    return np.ascontiguousarray(pixels.swapaxes(1, 2)).reshape(-1, side, side, 3)
