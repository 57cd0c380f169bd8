"""Drawn detections: where the ink is."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from vmamba.pictures import draw_detections


def _found(masks: bool = True) -> dict[str, torch.Tensor]:
    mask = torch.zeros(2, 1, 600, 900, dtype=torch.bool)
    mask[0, 0, 220:280, 120:180] = True
    mask[1, 0, 400:500, 500:800] = True
    found = {
        "boxes": torch.tensor([[100.0, 200, 200, 300], [480.0, 380, 820, 520]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.4]),
    }
    return found | ({"masks": mask} if masks else {})


def test_masks_boxes_and_names_are_drawn_where_they_are() -> None:
    image = Image.new("RGB", (900, 600), (128, 128, 128))
    drawn = np.asarray(draw_detections(image, _found(), ["cat", "dog"]))
    assert drawn.shape == (600, 900, 3)
    changed = (drawn != 128).any(axis=2)
    assert changed[230:270, 130:170].all()  # the mask
    assert changed[200, 100:200].all()  # the box
    assert not changed[205:215, 105:195].any()  # inside the box, outside the mask
    assert changed[189:199, 105:140].all()  # the ground of the name, above the box
    assert not changed[550:].any()
    assert tuple(drawn[250, 150]) != tuple(drawn[450, 650])  # two classes, two colours
    assert (np.asarray(image) == 128).all()  # the picture itself is left alone


def test_annotations_have_names_but_no_scores() -> None:
    image = Image.new("RGB", (900, 600), (128, 128, 128))
    found = _found(masks=False)
    scored = np.asarray(draw_detections(image, found, ["cat", "dog"]))
    del found["scores"]
    drawn = np.asarray(draw_detections(image, found, ["cat", "dog"]))
    where = np.argwhere((drawn != scored).any(axis=2))
    assert (drawn[189:199, 105:115] != 128).any()  # the name's ground
    # shorter texts: what differs lies in the lines above the boxes
    assert all(180 <= y < 202 or 360 <= y < 382 for y, _ in where)


def test_boxes_alone_and_nothing_at_all() -> None:
    image = Image.new("RGB", (900, 600), (128, 128, 128))
    drawn = np.asarray(draw_detections(image, _found(masks=False), ["cat", "dog"]))
    assert (drawn[230:270, 130:170] == 128).all()
    assert (drawn[200, 100:200] != 128).any(axis=1).all()
    nothing = {name: tensor[:0] for name, tensor in _found().items()}
    assert (np.asarray(draw_detections(image, nothing, ["cat", "dog"])) == 128).all()


def test_small_pictures_are_enlarged_and_objects_of_one_class_told_apart() -> None:
    image = Image.new("RGB", (90, 60), (128, 128, 128))
    found = {
        "boxes": torch.tensor([[10.0, 20, 20, 30], [48.0, 38, 82, 52]]),
        "labels": torch.tensor([1, 1]),
        "scores": torch.tensor([0.9, 0.4]),
    }
    drawn = draw_detections(image, found, ["cell"])
    assert drawn.size == (810, 540)
    pixels = np.asarray(drawn)
    assert tuple(pixels[270, 150]) != tuple(pixels[468, 600])
