"""Masks as bits: the same masks as those of COCO's own decoder, and after the transforms of training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vmamba.data import MULTI_SCALE_CROPS, CocoDataset, DetectionAugmentation, detection_training_transform
from vmamba.data.packed_masks import pack_masks, pack_run_lengths, unpack_masks

library = pytest.importorskip("faster_coco_eval.core.mask", reason="COCO masks need pip install 'vmamba[det]'")


def _masks(count: int, size: tuple[int, int]) -> torch.Tensor:
    """Noise and larger patches, the first mask empty and the second one full."""
    generator = torch.Generator().manual_seed(count)
    masks = torch.rand(count, *size, generator=generator) < torch.rand(count, 1, 1, generator=generator)
    masks[2::3] &= torch.rand(len(masks[2::3]), 1, size[1], generator=generator) < 0.5
    masks[:1], masks[1:2] = False, True
    return masks


@pytest.mark.parametrize("count", [0, 1, 8, 19])
@pytest.mark.parametrize("size", [(5, 7), (1, 3), (6, 1), (1, 1), (64, 48)])
def test_masks_survive_packing(count, size) -> None:
    masks = _masks(count, size)
    planes = pack_masks(masks)
    assert planes.shape == (-(-count // 8), *size)
    assert planes.dtype == torch.uint8
    assert torch.equal(unpack_masks(planes, count), masks)


@pytest.mark.parametrize("count", [0, 1, 8, 19])
@pytest.mark.parametrize("size", [(5, 7), (1, 3), (6, 1), (1, 1), (64, 48), (300, 400)])
def test_run_lengths_become_the_same_planes(count, size) -> None:
    masks = _masks(count, size)
    runs = [library.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks]
    assert torch.equal(pack_run_lengths(runs, size), pack_masks(masks))


def test_runs_of_no_pixel_change_nothing() -> None:
    counts = ([0, 3, 0, 3], [2, 0, 1, 3, 0], [6], [0, 6, 0])
    runs = [library.frPyObjects({"size": [2, 3], "counts": list(one)}, 2, 3) for one in counts]
    wanted = [[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0] * 6, [1] * 6]
    columns = torch.tensor(wanted, dtype=torch.bool).unflatten(1, (3, 2))
    assert torch.equal(unpack_masks(pack_run_lengths(runs, (2, 3)), 4), columns.mT)


def test_run_lengths_of_another_image_are_refused() -> None:
    runs = library.encode(np.asfortranarray(np.eye(4, dtype=np.uint8)))
    with pytest.raises(ValueError, match="run lengths of 16 pixels in an image of 20"):
        pack_run_lengths([runs], (4, 5))


@pytest.mark.parametrize(
    ("augmentation", "loses"),
    [
        (DetectionAugmentation(), False),
        (MULTI_SCALE_CROPS, False),
        (DetectionAugmentation(crop=1.0, crop_resize=(40, 96, 300), crop_sides=(20, 60)), True),
    ],
    ids=["flips", "recipe", "small windows"],
)
def test_packed_masks_move_as_masks_do(make_coco, augmentation, loses) -> None:
    images, file, _ = make_coco()
    dataset = CocoDataset(images, file, transform=detection_training_transform(augmentation))
    counts = set()
    for seed in range(40):
        items = []
        for part in (dataset, dataset.with_packed_masks()):
            torch.manual_seed(seed)
            items.append(part[seed % len(dataset)])
        (image, target), (image_again, packed) = items
        assert torch.equal(image, image_again)
        assert "masks" not in packed
        assert type(packed["packed_masks"]) is torch.Tensor
        masks = unpack_masks(packed.pop("packed_masks"), len(target["labels"]))
        counts.add(len(masks))
        assert torch.equal(masks, target.pop("masks"))
        assert all(torch.equal(packed[name], value) for name, value in target.items())
        assert set(packed) == set(target)
    assert (len(counts) > 1) == loses
