"""Transforms: one policy for every use, and RandAugment under every Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    Preprocessing,
    evaluation_transform,
    training_transform,
)

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


def test_evaluation_resizes_crops_and_normalises():
    tensor = evaluation_transform(Preprocessing((32, 32), crop_pct=0.8))(Image.new("RGB", (70, 50), (255, 0, 128)))
    assert tensor.shape == (3, 32, 32)
    assert tensor.dtype == torch.float32
    wanted = (torch.tensor([1.0, 0.0, 128 / 255]) - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(tensor.mean(dim=(1, 2)), wanted)


def test_training_and_evaluation_agree_without_augmentation():
    preprocessing = Preprocessing((32, 32), crop_pct=1.0)
    square = PHOTO.crop((0, 0, 50, 50))
    plain = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0), horizontal_flip=0.0, color_jitter=0.0)
    # PIL resizes on both paths; only rounding of the crop could differ
    torch.testing.assert_close(
        training_transform(preprocessing, plain)(square), evaluation_transform(preprocessing)(square)
    )


def test_augmentation_varies():
    transform = training_transform(Preprocessing((32, 32)), Augmentation(random_erase=1.0))
    assert not torch.equal(transform(PHOTO), transform(PHOTO))


def test_posterize_survives_the_greatest_magnitude():
    # magnitude 10 asks timm's posterize for 0 bits, which Pillow 13 refuses
    transform = training_transform(Preprocessing((32, 32)), Augmentation(rand_augment="rand-m10-inc1-n15"))
    for _ in range(20):
        assert transform(PHOTO).isfinite().all()


def test_posterize_keeps_at_least_one_bit():
    from timm.data.auto_augment import NAME_TO_OP

    training_transform(Preprocessing((32, 32)), Augmentation())
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        assert set(np.unique(np.asarray(NAME_TO_OP[name](PHOTO, 0)))) == {0, 128}
        assert np.array_equal(np.asarray(NAME_TO_OP[name](PHOTO, 8)), np.asarray(PHOTO))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": (0, 32)}, "image_size"),
        ({"interpolation": "lanczos9"}, "interpolation"),
        ({"crop_pct": 1.5}, "crop_pct"),
    ],
)
def test_bad_preprocessing(values, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**values)


def test_unknown_policy():
    with pytest.raises(ValueError, match="rand_augment must be a timm policy.*'autumn'"):
        training_transform(Preprocessing(), Augmentation(rand_augment="autumn"))


def test_preprocessing_survives_plain_values():
    preprocessing = Preprocessing((96, 64), crop_pct=0.9)
    assert Preprocessing.from_dict(preprocessing.as_dict()) == preprocessing
