"""Augmentation of whole batches: timm's distributions, Pillow's pixels, nothing but seed, epoch and index."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import functional as pil

from vmamba.data import Augmentation, Preprocessing, evaluation_transform
from vmamba.data import batch_augmentation as batched
from vmamba.data.batch_augmentation import ATTEMPTS, BatchAugmentation

PLAIN = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0), horizontal_flip=0.0, color_jitter=0.0)
RECIPE = Augmentation(rand_augment="rand-m9-mstd0.5-inc1", random_erase=0.25)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test here."""


@pytest.fixture(scope="module")
def photos():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 3, 48, 48), dtype=np.uint8))


def make(options, size=(32, 32), seed=0, **preprocessing):
    return BatchAugmentation(Preprocessing(size, **preprocessing), options, seed=seed, device=torch.device("cpu"))


def run(augment, photos, epoch=0, indices=None):
    indices = np.arange(len(photos)) if indices is None else np.asarray(indices)
    height, width = (np.full(len(indices), side) for side in photos.shape[2:])
    return augment.apply(photos[indices], augment.draw(epoch, indices, height, width))


def test_shape_layout_and_type(photos):
    out = run(make(RECIPE, size=(24, 40)), photos)
    assert out.shape == (12, 3, 24, 40)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.isfinite().all()


def test_a_sample_follows_from_seed_epoch_and_index_alone(photos):
    augment = make(RECIPE)
    whole = run(augment, photos, epoch=3)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    for indices in ([5], [11, 5, 0]):
        torch.testing.assert_close(run(make(RECIPE), photos, 3, indices), whole[indices], rtol=0, atol=1e-5)
    assert torch.equal(run(make(RECIPE), photos, 3), whole)
    assert not torch.equal(run(augment, photos, epoch=4), whole)
    assert not torch.equal(run(make(RECIPE, seed=1), photos, epoch=3), whole)


def test_without_augmentation_it_is_the_evaluation(photos):
    out = run(make(PLAIN), photos)
    evaluate = evaluation_transform(Preprocessing((32, 32), crop_pct=1.0))
    wanted = torch.stack([evaluate(Image.fromarray(photo.permute(1, 2, 0).numpy())) for photo in photos])
    # one grey value of 255, over the smallest standard deviation; both are rounded to grey values where PIL is
    assert (out - wanted).abs().max() < 1.51 / (255 * 0.224)


def test_crops_flips_and_padding_show_what_was_drawn(photos):
    for options in (Augmentation(color_jitter=0.0), Augmentation(color_jitter=0.0, crop="padded", crop_padding=6)):
        augment = make(options, size=(40, 40), mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
        sizes = np.full(12, 48)
        draws = augment.draw(0, np.arange(12), sizes, sizes)
        out = augment.apply(photos, draws)
        flips = draws.columns.flip
        assert 0 < flips.sum() < 12
        for i, ours in enumerate(out):
            image = Image.fromarray(photos[i].permute(1, 2, 0).numpy())
            if options.crop == "resized":
                box = [
                    int(v[i]) for v in (draws.rows.start, draws.columns.start, draws.rows.extent, draws.columns.extent)
                ]
                image = pil.crop(image, *box)
                theirs = image.resize((40, image.height), Image.Resampling.BICUBIC)
                theirs = theirs.resize((40, 40), Image.Resampling.BICUBIC)
            else:
                image = image.resize((40, 48), Image.Resampling.BICUBIC).resize((40, 40), Image.Resampling.BICUBIC)
                y, x = (round(v[i] * 40 / 48) for v in (draws.rows.start, draws.columns.start))
                theirs = pil.crop(image, y, x, 40, 40)
            if flips[i]:
                theirs = pil.hflip(theirs)
            difference = ours.permute(1, 2, 0).numpy() - np.asarray(theirs, dtype=float)
            assert np.abs(difference).max() < 1.51


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((60, 80), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((20, 90), (0.6, 1.0), (3 / 4, 4 / 3)),
        ((90, 20), (0.9, 1.0), (0.9, 1.1)),
    ],
)
def test_crops_are_timms_given_timms_numbers(size, scale, ratio, monkeypatch):
    numbers = np.random.default_rng(0).random((200, 2 * ATTEMPTS + 2))
    heights, widths = (np.full(200, side) for side in size)
    ours = batched.resized_crops(numbers, heights, widths, scale, ratio).T
    image = Image.new("RGB", size[::-1])
    for row, box in zip(numbers, ours, strict=True):
        sizes, places = iter(row[: 2 * ATTEMPTS]), iter(row[2 * ATTEMPTS :])
        monkeypatch.setattr(random, "uniform", lambda low, high, sizes=sizes: low + next(sizes) * (high - low))
        monkeypatch.setattr(
            random, "randint", lambda low, high, places=places: int(next(places) * (high - low + 1)) + low
        )
        assert tuple(box) == RandomResizedCropAndInterpolation.get_params(image, scale, ratio)


def test_erased_rectangles_are_timms_given_timms_numbers(monkeypatch):
    numbers = np.random.default_rng(0).random((100, 2 * ATTEMPTS + 5))
    boxes, _ = batched._erased(numbers, 0.6, (40, 56))
    theirs = RandomErasing(probability=0.6, mode="const", device="cpu")
    for row, (top, left, height, width) in zip(numbers, boxes, strict=True):
        values, places = iter(row[1 : 1 + 2 * ATTEMPTS]), iter(row[1 + 2 * ATTEMPTS :])
        monkeypatch.setattr(random, "random", lambda value=row[0]: value)
        monkeypatch.setattr(random, "uniform", lambda low, high, values=values: low + next(values) * (high - low))
        monkeypatch.setattr(
            random, "randint", lambda low, high, places=places: int(next(places) * (high - low + 1)) + low
        )
        erased = theirs(torch.ones(3, 40, 56))[0]
        wanted = torch.ones(40, 56)
        wanted[top : top + height, left : left + width] = 0
        assert torch.equal(erased, wanted)


def test_erasing_puts_noise_into_the_rectangle_and_nowhere_else(photos):
    clean, erased = (
        run(make(Augmentation(**{**vars(PLAIN), "random_erase": p})), photos.repeat(6, 1, 1, 1)) for p in (0, 1)
    )
    augment = make(Augmentation(**{**vars(PLAIN), "random_erase": 1.0}))
    sizes = np.full(72, 48)
    draws = augment.draw(0, np.arange(72), sizes, sizes)
    noise = []
    for i, (top, left, height, width) in enumerate(draws.erase):
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert torch.equal(erased[i][:, ~inside], clean[i][:, ~inside])
        noise.append(erased[i][:, inside].flatten())
        assert not torch.equal(erased[i][:, inside], clean[i][:, inside])
    noise = torch.cat(noise)
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_colour_jitter_equals_torchvision_in_our_order(photos):
    options = Augmentation(**{**vars(PLAIN), "color_jitter": 0.4})
    augment = make(options, size=(48, 48), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    sizes = np.full(12, 48)
    draws = augment.draw(0, np.arange(12), sizes, sizes)
    assert draws.jitter.min() > 0.6
    assert draws.jitter.max() < 1.4
    for ours, photo, (brightness, contrast, saturation) in zip(
        augment.apply(photos, draws), photos, draws.jitter, strict=True
    ):
        theirs = pil.adjust_brightness(photo.float() / 255, brightness)
        theirs = pil.adjust_saturation(pil.adjust_contrast(theirs, contrast), saturation)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # torchvision's grey has rounded weights


def test_shares_of_flips_and_erasures():
    augment = make(RECIPE)
    sizes = np.full(4000, 48)
    draws = augment.draw(0, np.arange(4000), sizes, sizes)
    assert abs(draws.columns.flip.mean() - 0.5) < 0.03
    assert not draws.rows.flip.any()
    assert abs((draws.erase[:, 2] > 0).mean() - 0.25) < 0.03
    area = draws.rows.extent * draws.columns.extent / 48**2
    assert 0.07 < area.min() < 0.1 < 0.95 < area.max() <= 1
    assert math.isclose(area.mean(), 0.5, abs_tol=0.05)


def test_what_only_the_cpu_can_do_is_refused():
    with pytest.raises(ValueError, match="cannot be done in batches"):
        make(Augmentation(rand_augment="augmix-m3"))
