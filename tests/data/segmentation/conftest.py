from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def make_masked(tmp_path):
    """A function that writes random images with masks: ``make_masked({"images/train/a.png": "masks/train/a.png"})``.

    Masks hold the labels 0..2 and 255; returns the root.
    """

    def make(pairs: dict[str, str | None], labels=(0, 1, 2, 255), size=(24, 18)) -> Path:
        generator = np.random.default_rng(0)
        for image, mask in pairs.items():
            pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            numbers = generator.choice(np.array(labels, dtype=np.uint8), (size[1], size[0]))
            for name, content in ((image, pixels), (mask, numbers)):
                if name is not None:
                    path = tmp_path / "data" / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(content).save(path)
        return tmp_path / "data"

    return make


@pytest.fixture
def folder(make_masked) -> Path:
    """Three classes, four images to train on and two to validate on."""
    root = make_masked(
        {
            f"images/{part}/{i}.png": f"masks/{part}/{i}.png"
            for part, count in (("train", 4), ("val", 2))
            for i in range(count)
        }
    )
    (root / "classes.txt").write_text("sky\nroad\n\ncar\n")
    return root
