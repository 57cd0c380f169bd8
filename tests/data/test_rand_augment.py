"""RandAugment in batches: timm's operations on Pillow images, timm's arguments, timm's notation."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from vmamba.data import pixel_operations, rand_augment
from vmamba.data.rand_augment import DRAWS, NOTHING, OPERATIONS, Policy

FILL = (124, 116, 104)
ARGUMENTS = {
    "Rotate": (27, -13.3),
    "ShearX": (0.27, -0.2),
    "ShearY": (0.27, -0.2),
    "TranslateX": (7.3, -11),
    "TranslateY": (5.5, -4),
    "Color": (0.1, 0.55, 1.9),
    "Sharpness": (0.1, 0.77, 1.9),
    "AutoContrast": (0,),
    "Equalize": (0,),
    "Contrast": (0.1, 0.73, 1.9),
    "Invert": (0,),
    "Posterize": (1, 3, 4, 8),
    "Solarize": (0, 100, 256),
    "SolarizeAdd": (0, 99, 128),
    "Brightness": (0.1, 0.73, 1.9),
}


@pytest.fixture(scope="module")
def photos():
    """Noise, soft gradients, low contrast, a single colour, two colours: (8, 40, 52, 3) uint8."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (8, 40, 52, 3)).astype(float)
    y, x = np.mgrid[:40, :52]
    images[1] = np.stack([x * 4, y * 6, (x + y) * 2], axis=2)
    images[2] = 60 + images[2] / 5
    images[3] = 77
    images[4] = np.where((x + y)[..., None] % 7 < 3, 30, 200)
    images[5] = images[1] / 2 + images[2]
    return images.clip(0, 255).astype(np.uint8)


def batch(photos):
    return torch.from_numpy(photos).permute(0, 3, 1, 2).contiguous()


def apply(photos, operation, argument):
    fill = torch.tensor(FILL, dtype=torch.float32)
    count = len(photos)
    out = rand_augment.apply(
        batch(photos), np.full(count, operation), np.full(count, float(argument)), fill, torch.from_numpy
    )
    return out.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_pillows(photos, name):
    moves = name in rand_augment.GEOMETRIC
    for argument in ARGUMENTS[name]:
        ours = apply(photos, OPERATIONS.index(name), argument)
        options = {"fillcolor": FILL, "resample": Image.Resampling.BILINEAR}
        arguments = () if name in ("AutoContrast", "Equalize", "Invert") else (argument,)
        function = auto_augment.NAME_TO_OP[name]
        theirs = np.stack([np.asarray(function(Image.fromarray(photo), *arguments, **options)) for photo in photos])
        difference = np.abs(ours.astype(int) - theirs)
        # where pixels move both interpolate and cut off, so rounding decides where a value is almost whole
        assert difference.max() <= (1 if moves else 0), argument
        assert (difference > 0).mean() < 0.05


def test_each_image_gets_its_own_operation(photos):
    operation = np.array([NOTHING, 3, 5, 6, 7, 10, 14, NOTHING])
    argument = np.array([0, 8.0, 1.5, 0.3, 0, 0, 1.4, 0])
    fill = torch.tensor(FILL, dtype=torch.float32)
    mixed = rand_augment.apply(batch(photos), operation, argument, fill, torch.from_numpy)
    for i, (kind, value) in enumerate(zip(operation, argument, strict=True)):
        alone = photos[i : i + 1] if kind == NOTHING else apply(photos[i : i + 1], kind, value)
        assert np.array_equal(mixed[i].permute(1, 2, 0).numpy(), alone[0]), OPERATIONS[kind]


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("magnitude", [0, 3, 9, 10])
def test_arguments_are_timms(increasing, magnitude, monkeypatch):
    size = (40, 40)
    suffixes = {"TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel"}
    varied = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
    policy = Policy(magnitude=magnitude, probability=1.0, increasing=increasing)
    for sign, chance in ((1, 0.2), (-1, 0.8)):
        monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
        numbers = np.full((len(OPERATIONS), DRAWS), 0.5)
        numbers[:, 0] = (np.arange(len(OPERATIONS)) + 0.5) / len(OPERATIONS)
        numbers[:, 4] = chance
        operation, argument = rand_augment.draw(policy, numbers, size)
        assert operation.tolist() == list(range(len(OPERATIONS)))
        for name, ours in zip(OPERATIONS, argument, strict=True):
            theirs = auto_augment.LEVEL_TO_ARG[
                suffixes.get(name, name + ("Increasing" if increasing and name in varied else ""))
            ]
            wanted = theirs(magnitude, {})[0] if theirs else 0.0
            if name == "Posterize":
                wanted = max(1, wanted)
            if name in suffixes:
                wanted *= 40
            assert ours == pytest.approx(wanted), name


def test_probability_and_magnitude():
    numbers = np.random.default_rng(0).random((20000, DRAWS))
    operation, argument = rand_augment.draw(Policy.parse("rand-m5-p0.3-mstd1-inc1"), numbers, (10, 10))
    assert abs((operation != NOTHING).mean() - 0.3) < 0.01
    rotated = np.abs(argument[operation == OPERATIONS.index("Rotate")])
    assert abs(rotated.mean() - 15) < 0.5
    assert abs(rotated.std() - 3) < 0.5
    counts = np.bincount(operation[operation != NOTHING], minlength=len(OPERATIONS))
    assert abs(counts - 400).max() < 100
    _, argument = rand_augment.draw(Policy.parse("rand-m5-p1-mstd101"), numbers, (10, 10))
    assert abs(argument).max() <= 256


@pytest.mark.parametrize(
    "text",
    ["rand-m9-mstd0.5-inc1", "rand", "rand-n3-m7", "rand-m9-p1.0", "rand-mstd101-m9", "rand-m12-mmax15-n1-inc0"],
)
def test_notation_is_timms(text):
    policy = Policy.parse(text)
    theirs = auto_augment.rand_augment_transform(text, {"img_mean": FILL})
    operation = theirs.ops[0]
    assert (policy.magnitude, policy.layers, policy.probability) == (
        operation.magnitude,
        theirs.num_layers,
        operation.prob,
    )
    assert policy.deviation == operation.magnitude_std
    assert policy.limit == (operation.magnitude_max or 10)
    assert policy.increasing == any(o.name == "ColorIncreasing" for o in theirs.ops)


@pytest.mark.parametrize("text", ["rand-m9-tweights", "augmix-m3", "autumn", "rand-q9", "rand-m"])
def test_other_policies_are_refused(text):
    with pytest.raises(ValueError, match=r"cannot be done in batches.*data\.in_memory=false"):
        Policy.parse(text)


def test_uniform_magnitudes():
    assert math.isinf(Policy.parse("rand-m9-mstd101").deviation)


def test_equalize_of_tiny_images_changes_nothing():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    tables = pixel_operations.equalize_tables(images, torch.zeros(2))
    assert torch.equal(pixel_operations.look_up(images, tables), images)
