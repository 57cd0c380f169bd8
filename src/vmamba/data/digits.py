"""scikit-learn's handwritten digits: 1,797 real 8x8 images in 10 classes, on the disk wherever scikit-learn is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .._extras import require

DIGIT_CLASSES = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class Arrays:
    """Grey images (n, H, W) uint8 with labels; item ``i`` is (RGB image, label)."""

    classes: tuple[str, ...]
    images: np.ndarray
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), self.labels[index]

    def subset(self, indices: list[int]) -> Arrays:
        """The images at ``indices``, in that order."""
        return Arrays(self.classes, self.images[indices], tuple(self.labels[i] for i in indices))


def load_digits() -> Arrays:
    """All 1,797 digits, grey values 0..255.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    digits = require("sklearn.datasets", "train").load_digits()
    # 17 grey levels, 0..16
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return Arrays(DIGIT_CLASSES, images, tuple(int(label) for label in digits.target))
