"""From a PIL image to the tensor a model takes: one resize, crop and normalisation policy for every use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import timm.data.auto_augment
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms

from .constants import IMAGENET_MEAN, IMAGENET_STD

Transform = Callable[[Image.Image], Tensor]

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
EVALUATION_CROPS = ("center", "squash", "border")
TRAINING_CROPS = ("resized", "padded")


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its input; travels with its checkpoint.

    ``image_size`` (height, width) in pixels; ``crop_pct`` is the share of the resized image's short side that the
    centre crop keeps in evaluation (0.875: resize to 256, crop 224). ``crop_mode`` is timm's: "center" keeps the aspect
    ratio and loses the ends of the long side, "squash" resizes both sides to one length, "border" keeps all of the
    image and fills with the mean colour.

    Raises:
        ValueError: a value is out of range.
    """

    image_size: tuple[int, int] = (224, 224)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size must be two positive numbers (height, width), not {self.image_size}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {INTERPOLATIONS}, not {self.interpolation!r}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must lie in (0, 1], not {self.crop_pct}")
        if self.crop_mode not in EVALUATION_CROPS:
            raise ValueError(f"crop_mode must be one of {EVALUATION_CROPS}, not {self.crop_mode!r}")

    def at(self, image_size: int | tuple[int, int] | None = None, crop_pct: float | None = None) -> Preprocessing:
        """The same at another resolution and crop, for tests at sizes other than the training's; None: unchanged."""
        if isinstance(image_size, int):
            image_size = (image_size, image_size)
        return dataclasses.replace(
            self,
            image_size=self.image_size if image_size is None else image_size,
            crop_pct=self.crop_pct if crop_pct is None else crop_pct,
        )

    def as_dict(self) -> dict[str, object]:
        """Plain lists and numbers, for YAML and checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> Preprocessing:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class Augmentation:
    """What training does to an image before normalising it; the names and ranges are timm's.

    ``crop`` "resized" is the random resized crop with ``scale`` (of the area) and ``ratio`` (width over height);
    "padded" resizes to the image size, pads every side with ``crop_padding`` black pixels and crops at random, as is
    usual for CIFAR. ``rand_augment`` is a timm policy such as ``"rand-m9-mstd0.5-inc1"`` (replaces ``color_jitter``),
    ``random_erase`` a probability.

    Raises:
        ValueError: a value is out of range.
    """

    crop: Literal["resized", "padded"] = "resized"
    crop_padding: int = 4
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.5
    color_jitter: float = 0.4
    rand_augment: str | None = None
    random_erase: float = 0.0

    def __post_init__(self) -> None:
        if self.crop not in TRAINING_CROPS:
            raise ValueError(f"augment.crop must be one of {TRAINING_CROPS}, not {self.crop!r}")
        for name in ("crop_padding", "color_jitter"):
            if getattr(self, name) < 0:
                raise ValueError(f"augment.{name} must not be negative: {getattr(self, name)}")
        for name in ("horizontal_flip", "random_erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is a probability and must lie in [0, 1], not {getattr(self, name)}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"augment.scale must be two numbers in (0, 1], the lower one first, not {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"augment.ratio must be two positive numbers, the lower one first, not {self.ratio}")


def evaluation_transform(preprocessing: Preprocessing, normalize: bool = True) -> Transform:
    """Resize, crop, normalise: (C, H, W) fp32. Used by validation, test and prediction alike.

    Without ``normalize`` the pixels stay what they are, uint8.
    """
    return create_transform(
        preprocessing.image_size,
        is_training=False,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        normalize=normalize,
    )


def training_transform(preprocessing: Preprocessing, augmentation: Augmentation) -> Transform:
    """Random crop, flip, colour changes, normalise, random erasing: (C, H, W) fp32.

    Raises:
        ValueError: ``rand_augment`` is no policy timm knows.
    """
    _keep_posterize_in_pillows_range()
    if augmentation.rand_augment and not augmentation.rand_augment.startswith(("rand-", "augmix-")):
        raise ValueError(
            f"rand_augment must be a timm policy such as 'rand-m9-mstd0.5-inc1' or empty, "
            f"not {augmentation.rand_augment!r}"
        )
    crop_and_flip, change_colours, normalise = create_transform(
        preprocessing.image_size,
        is_training=True,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=augmentation.horizontal_flip,
        color_jitter=augmentation.color_jitter or None,
        auto_augment=augmentation.rand_augment or None,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        re_prob=augmentation.random_erase,
        re_mode="pixel",
        separate=True,
    )
    if augmentation.crop == "padded":
        crop_and_flip = transforms.Compose(
            [
                transforms.Resize(preprocessing.image_size, str_to_interp_mode(preprocessing.interpolation)),
                transforms.RandomCrop(preprocessing.image_size, padding=augmentation.crop_padding),
                transforms.RandomHorizontalFlip(augmentation.horizontal_flip),
            ]
        )
    return transforms.Compose([crop_and_flip, change_colours, normalise])


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    return timm.data.auto_augment.posterize(image, max(1, bits_to_keep))


def _keep_posterize_in_pillows_range() -> None:
    """Make timm's posterize keep at least one bit.

    Its "increasing" policies ask for 0 bits at the greatest magnitude. Pillow < 13 painted such an image black,
    Pillow 13 refuses, and training dies at a random image (32 of 20,000 with rand-m9-mstd0.5-inc1).
    """
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        timm.data.auto_augment.NAME_TO_OP[name] = _posterize
