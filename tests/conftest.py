"""What tests of every room share."""

from __future__ import annotations

import json
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


@pytest.fixture
def make_coco(tmp_path):
    """A function that writes a small COCO data set: `make_coco(name)` returns image folder, annotation file, contents.

    Two photos of 64 x 48 pixels (images 7 and 30) with dark rectangles and triangles, categories 3 "box" and 90 "tri",
    four objects as polygons and run lengths of both kinds, one crowd; a third photo (image 31) has no object.
    """

    def make(name: str = "coco", masks: bool = True) -> tuple[Path, Path, dict]:
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        shapes = {
            7: [(1, 3, "box", (5, 6, 25, 30)), (2, 90, "tri", (30, 10, 56, 40))],
            30: [(4, 3, "box", (8, 20, 28, 44)), (9, 90, "tri", (34, 4, 58, 28))],
            31: [],
        }
        contents: dict = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 90, "name": "tri"}, {"id": 3, "name": "box"}],
        }
        generator = np.random.default_rng(0)
        for image_id, objects in shapes.items():
            pixels = generator.integers(150, 256, (48, 64, 3), dtype=np.uint8)
            for number, category, shape, (x1, y1, x2, y2) in objects:
                mask = np.zeros((48, 64), dtype=np.uint8)
                mask[y1:y2, x1:x2] = 1
                if shape == "tri":
                    rows, columns = np.mgrid[0:48, 0:64]
                    mask[(columns - x1) * (y2 - y1) > (rows - y1 + 0.5) * (x2 - x1)] = 0
                pixels[mask == 1] = generator.integers(0, 60, (int(mask.sum()), 3), dtype=np.uint8)
                annotation = {
                    "id": number,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(mask.sum()),
                    "iscrowd": 0,
                }
                if masks:
                    polygon = [[x1, y1, x2, y1, x2, y2, x1, y2]]
                    annotation["segmentation"] = polygon if shape == "box" else _run_lengths(mask)
                contents["annotations"].append(annotation)
            Image.fromarray(pixels).save(folder / "images" / f"{image_id}.png")
            contents["images"].append({"id": image_id, "file_name": f"{image_id}.png", "height": 48, "width": 64})
        crowd = np.zeros((48, 64), dtype=np.uint8)
        crowd[40:, 30:] = 1
        crowd_annotation = {
            "id": 12,
            "image_id": 30,
            "category_id": 3,
            "bbox": [30, 40, 34, 8],
            "area": 272,
            "iscrowd": 1,
        }
        contents["annotations"].append(crowd_annotation | ({"segmentation": _run_lengths(crowd)} if masks else {}))
        file = folder / "annotations.json"
        file.write_text(json.dumps(contents))
        return folder / "images", file, contents

    return make


def _run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths: columns first, zeros first."""
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    edges = np.concatenate([[0], changes, [len(flat)]])
    counts = np.diff(edges).tolist()
    return {"size": list(mask.shape), "counts": counts if flat[0] == 0 else [0, *counts]}
