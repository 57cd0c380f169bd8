"""Transforms of images with boxes and masks: they move together, in the ranges of the recipes."""

from __future__ import annotations

import pytest
import torch

from vmamba.data import (
    MULTI_SCALE_CROPS,
    MULTI_SCALE_SIZES,
    CocoDataset,
    DetectionAugmentation,
    collate_detection,
    detection_evaluation_transform,
    detection_training_transform,
)

pytest.importorskip("faster_coco_eval", reason="COCO masks need faster-coco-eval: pip install 'vmamba[det]'")


def _extent(mask: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.where(mask)
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def test_evaluation_leaves_the_size(make_coco) -> None:
    images, file, _ = make_coco()
    image, target = CocoDataset(images, file, transform=detection_evaluation_transform())[0]
    assert type(image) is type(target["boxes"]) is torch.Tensor
    assert image.dtype == torch.float32
    assert image.shape == (3, 48, 64)
    assert 0 <= image.min() < image.max() <= 1


def test_flips_move_boxes_and_masks(make_coco) -> None:
    images, file, _ = make_coco()
    plain = CocoDataset(images, file)[0][1]
    flip = detection_training_transform(DetectionAugmentation(horizontal_flip=1.0))
    _, target = CocoDataset(images, file, transform=flip)[0]
    assert torch.equal(target["masks"], plain["masks"].flip(2))
    assert target["boxes"][0].tolist() == [64 - 25, 6, 64 - 5, 30]
    for mask, box in zip(target["masks"], target["boxes"], strict=True):
        torch.testing.assert_close(_extent(mask), box, atol=1.0, rtol=0)


def test_crops_keep_everything_together(make_coco) -> None:
    images, file, _ = make_coco()
    augmentation = DetectionAugmentation(crop=1.0, crop_resize=(96, 192), crop_sides=(60, 100))
    dataset = CocoDataset(images, file, transform=detection_training_transform(augmentation))
    torch.manual_seed(0)
    sizes, counts = set(), set()
    for _ in range(30):
        image, target = dataset[0]
        height, width = image.shape[1:]
        sizes.add((height, width))
        counts.add(len(target["labels"]))
        assert 60 <= height <= 100
        assert 60 <= width <= 100
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        assert target["masks"].shape[1:] == (height, width)
        for mask, box, label in zip(target["masks"], target["boxes"], target["labels"], strict=True):
            assert ((box[2:] - box[:2]) >= 1).all()
            if label == 1:  # a rectangle stays one, so what is left of it fills its box
                torch.testing.assert_close(_extent(mask), box, atol=2.0, rtol=0)
    assert len(sizes) > 20
    assert counts >= {1, 2}  # some windows lose an object


def test_a_window_without_objects_is_an_empty_target(make_coco) -> None:
    images, file, _ = make_coco()
    augmentation = DetectionAugmentation(crop=1.0, crop_resize=(960,), crop_sides=(20, 20))
    dataset = CocoDataset(images, file, transform=detection_training_transform(augmentation))
    torch.manual_seed(0)
    targets = [dataset[0][1] for _ in range(30)]
    empty = [target for target in targets if not len(target["labels"])]
    assert empty
    assert all(target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 20, 20) for target in empty)


def test_the_same_seed_draws_the_same(make_coco) -> None:
    images, file, _ = make_coco()
    dataset = CocoDataset(images, file, transform=detection_training_transform(MULTI_SCALE_CROPS))
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append([dataset[i] for i in (0, 1)])
    for (image, target), (again, target_again) in zip(*drawn, strict=True):
        assert torch.equal(image, again)
        assert torch.equal(target["boxes"], target_again["boxes"])


def test_batches_are_lists(make_coco) -> None:
    images, file, _ = make_coco()
    dataset = CocoDataset(images, file, transform=detection_evaluation_transform())
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=collate_detection)))
    assert [image.shape for image in batch[0]] == [(3, 48, 64)] * 2
    assert [int(target["image_id"]) for target in batch[1]] == [7, 30]


def test_the_recipes_sizes() -> None:
    assert MULTI_SCALE_SIZES == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (MULTI_SCALE_CROPS.crop, MULTI_SCALE_CROPS.crop_sides) == (0.5, (384, 600))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizontal_flip": 1.5}, "horizontal_flip is a probability, got 1.5"),
        ({"crop": -0.1}, "crop is a probability"),
        ({"crop_resize": ()}, "crop_resize must be positive sizes"),
        ({"crop_sides": (600, 384)}, "crop_sides must be the least and the greatest"),
    ],
)
def test_what_cannot_be_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionAugmentation(**options)
