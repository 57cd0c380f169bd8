"""Augmentation of images together with their masks."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from vmamba.data.segmentation import (
    IGNORED,
    SegmentationAugmentation,
    TransformedMasks,
    fitted_size,
    open_segmentation,
    segmentation_evaluation_transform,
    segmentation_training_transform,
)
from vmamba.data.segmentation.transforms import ClassBalancedCrop, PhotometricDistortion, RandomRatioResize

UNCHANGED = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def _coded(height: int, width: int, block: int = 1) -> tuple[Image.Image, np.ndarray]:
    """A mask of random classes in blocks, and an image whose red and green show the class in every pixel."""
    classes = np.random.default_rng(0).integers(0, 8, (-(-height // block), -(-width // block)))
    mask = np.kron(classes, np.ones((block, block)))[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([mask * 30, 255 - mask * 30, mask * 0 + 9], axis=-1)), mask


@pytest.mark.parametrize(
    ("size", "box", "expected"),
    [
        ((512, 683), (2048, 512), (512, 683)),
        ((300, 400), (2048, 512), (512, 683)),
        ((400, 300), (2048, 512), (683, 512)),
        ((100, 1000), (2048, 512), (205, 2048)),
        ((2000, 3000), (1024, 256), (256, 384)),
    ],
)
def test_images_are_fitted_keeping_their_shape(size, box, expected) -> None:
    assert fitted_size(size, box) == expected


def test_the_mask_goes_where_the_image_goes() -> None:
    """Crops and flips at the image's own size leave every pixel's class in its red value."""
    augmentation = SegmentationAugmentation(crop=(20, 30), base_size=None, ratio=(1.0, 1.0), photometric=False)
    transform = segmentation_training_transform(augmentation, **UNCHANGED)
    image, mask = _coded(40, 50)
    crops = set()
    for seed in range(8):
        torch.manual_seed(seed)
        pixels, labels = transform(image, mask)
        assert (pixels.shape, pixels.dtype) == ((3, 20, 30), torch.float32)
        assert (labels.shape, labels.dtype) == ((20, 30), torch.int64)
        assert type(pixels) is type(labels) is torch.Tensor
        torch.testing.assert_close(pixels[0] * 255, labels.float() * 30)
        crops.add(tuple(labels.flatten().tolist()))
    assert len(crops) == 8


def test_masks_are_resized_to_labels_that_were_there() -> None:
    augmentation = SegmentationAugmentation(crop=(64, 64), base_size=(80, 60), photometric=False)
    transform = segmentation_training_transform(augmentation, **UNCHANGED)
    image, mask = _coded(45, 60, block=15)
    for seed in range(8):
        torch.manual_seed(seed)
        pixels, labels = transform(image, mask)
        assert pixels.shape[1:] == labels.shape == (64, 64)
        assert set(labels.unique().tolist()) <= {*np.unique(mask).tolist(), IGNORED}
        inside = labels != IGNORED
        near = (pixels[0] * 255 - labels * 30).abs()[inside] < 20  # apart from the blurred borders of the blocks
        assert near.float().mean() > 0.8


def test_scales_cover_their_range() -> None:
    resize = RandomRatioResize((2048, 512), (0.5, 2.0), antialias=False)
    image = tv_tensors.Image(torch.zeros(3, 51, 51, dtype=torch.uint8))
    torch.manual_seed(0)
    sides = [resize.make_params([image])["size"][0] for _ in range(300)]
    assert 256 <= min(sides) < 275
    assert 1000 < max(sides) <= 1024


def test_small_images_are_padded_with_the_mean_and_ignored() -> None:
    augmentation = SegmentationAugmentation(crop=(32, 48), base_size=None, ratio=(1.0, 1.0), flip=0.0)
    pixels, labels = segmentation_training_transform(augmentation)(*_coded(20, 40))
    assert (pixels.shape, labels.shape) == ((3, 32, 48), (32, 48))
    assert (pixels[:, 20:] == 0).all()
    assert (pixels[:, :, 40:] == 0).all()
    assert (labels[20:] == IGNORED).all()
    assert (labels[:, 40:] == IGNORED).all()
    assert (labels[:20, :40] != IGNORED).all()


def test_crops_filled_by_one_class_are_drawn_again() -> None:
    """The left nine tenths are one class: of plain crops most hold nothing else, of drawn again ones few do."""
    mask = torch.zeros(1, 40, 200, dtype=torch.uint8)
    mask[..., 180:] = 1
    mask[..., :10] = IGNORED

    def filled(share: float) -> int:
        torch.manual_seed(0)
        crop = ClassBalancedCrop((20, 20), share)
        boxes = (crop.make_params([tv_tensors.Mask(mask)]) for _ in range(100))
        parts = (mask[0, b["top"] : b["top"] + 20, b["left"] : b["left"] + 20] for b in boxes)
        counts = [torch.bincount(part.flatten(), minlength=256)[:IGNORED] for part in parts]
        return sum(int(c.max() >= 0.75 * c.sum()) for c in counts)

    assert filled(1.0) > 85
    assert filled(0.75) < 60


def _distort(image: torch.Tensor, **changes) -> torch.Tensor:
    neutral = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "contrast_first": True}
    return PhotometricDistortion().transform(tv_tensors.Image(image), neutral | changes).as_subclass(torch.Tensor)


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.5])
@pytest.mark.parametrize("turn", [0.0, -0.1, 0.07])
def test_saturation_and_hue_are_those_of_hsv(factor, turn) -> None:
    image = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0))
    image[:, 0, 0], image[:, 0, 1], image[:, 0, 2] = 0.0, 0.6, torch.tensor([1.0, 0.0, 0.0])  # black, grey, pure
    expected = torch.empty_like(image)
    for y in range(6):
        for x in range(5):
            h, s, v = colorsys.rgb_to_hsv(*image[:, y, x].tolist())
            expected[:, y, x] = torch.tensor(colorsys.hsv_to_rgb((h + turn) % 1, min(1, s * factor), v))
    torch.testing.assert_close(_distort(image, saturation=factor, hue=turn), expected, atol=1e-5, rtol=0)


def test_brightness_is_a_sum_and_contrast_a_factor_before_or_after() -> None:
    image = torch.tensor([0.2, 0.5, 0.9]).reshape(3, 1, 1)
    torch.testing.assert_close(_distort(image, brightness=0.2).flatten(), torch.tensor([0.4, 0.7, 1.0]))
    torch.testing.assert_close(_distort(image, contrast=1.5).flatten(), torch.tensor([0.3, 0.75, 1.0]))
    first = _distort(image, contrast=1.5, saturation=0.5, contrast_first=True)
    last = _distort(image, contrast=1.5, saturation=0.5, contrast_first=False)
    torch.testing.assert_close(first.flatten(), torch.tensor([0.65, 0.875, 1.0]))
    torch.testing.assert_close(last.flatten(), torch.tensor([0.825, 1.0, 1.0]))


def test_distortions_are_drawn_half_of_the_time_from_their_range() -> None:
    torch.manual_seed(0)
    drawn = [PhotometricDistortion().make_params([]) for _ in range(400)]
    for name, neutral, low, high in (
        ("brightness", 0, -32 / 255, 32 / 255),
        ("contrast", 1, 0.5, 1.5),
        ("saturation", 1, 0.5, 1.5),
        ("hue", 0, -0.1, 0.1),
    ):
        values = [params[name] for params in drawn if params[name] != neutral]
        assert 150 < len(values) < 250
        assert low <= min(values) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < max(values) <= high
    assert 150 < sum(params["contrast_first"] for params in drawn) < 250


def test_the_same_seed_gives_the_same_sample() -> None:
    transform = segmentation_training_transform(SegmentationAugmentation(crop=(32, 32), base_size=(80, 60)))
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(transform(*_coded(45, 60)))
    assert torch.equal(samples[0][0], samples[1][0])
    assert torch.equal(samples[0][1], samples[1][1])
    assert not torch.equal(samples[0][0], samples[2][0])


def test_evaluation_only_normalises() -> None:
    image, mask = _coded(21, 35)
    pixels, labels = segmentation_evaluation_transform(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))(image, mask)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 * 2 - 1
    torch.testing.assert_close(pixels, expected)
    assert np.array_equal(labels.numpy(), mask)


def test_batches_for_training(folder) -> None:
    transform = segmentation_training_transform(SegmentationAugmentation(crop=(16, 16), base_size=(40, 30)))
    images, masks = next(iter(DataLoader(TransformedMasks(open_segmentation(folder).train, transform), batch_size=3)))
    assert (images.shape, masks.shape) == ((3, 3, 16, 16), (3, 16, 16))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop": (0, 4)}, "crop"),
        ({"base_size": (4,)}, "base_size"),
        ({"ratio": (2.0, 0.5)}, "ratio"),
        ({"class_share": 0.0}, "class_share"),
        ({"flip": 2.0}, "flip"),
    ],
)
def test_values_out_of_range(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationAugmentation(**values)
