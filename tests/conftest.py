"""What tests of every room share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SHARED = Path(__file__).parents[2] / "shared"  # large optional data, beside the repository


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of optional data; the test is skipped, saying so, where there is none."""
    if not SHARED.is_dir():
        pytest.skip("optional data: there is no folder `shared` beside the repository")
    return SHARED


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for torch: on a busy machine small models are many times slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The tensors of the official code that the tests carry themselves."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def make_photos(tmp_path):
    """A function that writes small random PNGs: ``make_photos("root", {"train/cat": 4, ...})`` returns the root."""

    def make(root: str, counts: dict[str, int], size: tuple[int, int] = (40, 36)) -> Path:
        generator = np.random.default_rng(0)
        for folder, count in counts.items():
            (tmp_path / root / folder).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / root / folder / f"{i}.png")
        return tmp_path / root

    return make
