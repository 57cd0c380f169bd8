"""From an image and its mask to the tensors a model takes: augmentation for training, nothing but scaling otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..constants import IMAGENET_MEAN, IMAGENET_STD
from .masks import IGNORED, MaskedImages, MasksInMemory

# images as Pillow's or as (3, H, W) uint8 tensors
PairTransform = Callable[[Image.Image | Tensor, np.ndarray | Tensor], tuple[Tensor, Tensor]]

CROP_TRIES = 10


@dataclass(frozen=True)
class SegmentationAugmentation:
    """What training does to an image and its mask; the defaults are the published ones for ADE20K.

    Args:
        crop: height and width of what comes out, in pixels; smaller images are padded.
        base_size: (long, short) side that an image is fitted into, keeping its shape, before it is scaled by a random
            factor of ``ratio``; None: the image's own size.
        ratio: the range of that factor.
        class_share: a crop in which one class has this share or more of the labelled pixels is drawn again, ten
            times at most; 1 takes the first crop.
        flip: probability of a horizontal flip.
        photometric: change brightness, contrast, saturation and hue.
        antialias: smooth an image before making it smaller. The published recipes do not.

    Raises:
        ValueError: a value is out of range.
    """

    crop: tuple[int, int] = (512, 512)
    base_size: tuple[int, int] | None = (2048, 512)
    ratio: tuple[float, float] = (0.5, 2.0)
    class_share: float = 0.75
    flip: float = 0.5
    photometric: bool = True
    antialias: bool = False

    def __post_init__(self) -> None:
        if len(self.crop) != 2 or min(self.crop) < 1:
            raise ValueError(f"crop must be two positive numbers (height, width), not {self.crop}")
        if self.base_size is not None and (len(self.base_size) != 2 or min(self.base_size) < 1):
            raise ValueError(f"base_size must be two positive numbers (long, short) or None, not {self.base_size}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be two positive numbers, the smaller first, not {self.ratio}")
        if not 0 < self.class_share <= 1:
            raise ValueError(f"class_share must lie in (0, 1], not {self.class_share}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must lie in [0, 1], not {self.flip}")


def fitted_size(size: tuple[int, int], box: tuple[float, float]) -> tuple[int, int]:
    """Height and width of an image (H, W) scaled, keeping its shape, to just fit (long side, short side)."""
    scale = min(max(box) / max(size), min(box) / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


class RandomRatioResize(v2.Transform):
    """Fit into ``base_size`` times a random factor: images bilinearly, masks by the nearest pixel."""

    def __init__(self, base_size: tuple[int, int] | None, ratio: tuple[float, float], antialias: bool):
        super().__init__()
        self.base_size, self.ratio, self.antialias = base_size, ratio, antialias

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = tuple(F.get_size(flat_inputs[0]))
        factor = torch.empty(()).uniform_(*self.ratio).item()
        base = self.base_size or (max(size), min(size))
        return {"size": fitted_size(size, (int(base[0] * factor), int(base[1] * factor)))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        # torchvision takes the nearest pixel for a mask whatever the interpolation
        return F.resize(inpt, list(params["size"]), v2.InterpolationMode.BILINEAR, antialias=self.antialias)


class ClassBalancedCrop(v2.Transform):
    """A random crop, drawn again while one class has ``class_share`` or more of its labelled pixels."""

    def __init__(self, size: tuple[int, int], class_share: float):
        super().__init__()
        self.size, self.class_share = size, class_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(entry for entry in flat_inputs if isinstance(entry, tv_tensors.Mask))
        height, width = (min(a, b) for a, b in zip(self.size, mask.shape[-2:], strict=True))
        for _ in range(CROP_TRIES + 1):  # the last one is taken as it is
            top, left = (
                int(torch.randint(whole - part + 1, ()))
                for whole, part in zip(mask.shape[-2:], (height, width), strict=True)
            )
            counts = torch.bincount(mask[..., top : top + height, left : left + width].flatten(), minlength=IGNORED + 1)
            counts = counts[:IGNORED]
            if self.class_share == 1 or counts.max() < self.class_share * counts.sum():
                break
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class PhotometricDistortion(v2.Transform):
    """Brightness, contrast, saturation and hue, each changed with a probability of one half, as Caffe's SSD does.

    Brightness is a sum, contrast a factor of all values, saturation a factor in HSV; contrast comes before or after
    saturation and hue, at random. Takes and gives fp32 images (3, H, W) in [0, 1].
    """

    BRIGHTNESS = 32 / 255
    CONTRAST = (0.5, 1.5)
    SATURATION = (0.5, 1.5)
    HUE = 0.1  # of a whole turn

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        wanted = torch.rand(4) < 0.5
        low = torch.tensor([-self.BRIGHTNESS, self.CONTRAST[0], self.SATURATION[0], -self.HUE])
        high = torch.tensor([self.BRIGHTNESS, self.CONTRAST[1], self.SATURATION[1], self.HUE])
        values = low + (high - low) * torch.rand(4)
        neutral = torch.tensor([0.0, 1.0, 1.0, 0.0])
        brightness, contrast, saturation, hue = torch.where(wanted, values, neutral).tolist()
        return {
            "brightness": brightness,
            "contrast": contrast,
            "saturation": saturation,
            "hue": hue,
            "contrast_first": bool(torch.rand(()) < 0.5),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        image = inpt.as_subclass(Tensor)
        image = (image + params["brightness"]).clamp(0, 1)
        if params["contrast_first"]:
            image = (image * params["contrast"]).clamp(0, 1)
        if params["saturation"] != 1:
            image = _saturate(image, params["saturation"])
        if params["hue"] != 0:
            image = F.adjust_hue(image, params["hue"])
        if not params["contrast_first"]:
            image = (image * params["contrast"]).clamp(0, 1)
        return tv_tensors.wrap(image, like=inpt)


def _saturate(image: Tensor, factor: float) -> Tensor:
    """The saturation of HSV times ``factor``, at most 1: value and hue stay, so differences to the value scale."""
    value = image.amax(dim=0, keepdim=True)
    span = value - image.amin(dim=0, keepdim=True)
    limit = value / span.clamp(min=torch.finfo(image.dtype).eps)  # where saturation becomes 1
    return value - (value - image) * limit.clamp(max=factor)


class PadTo(v2.Transform):
    """Pad at the right and the bottom to at least ``size``: images by 0, masks by ``IGNORED``."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        bottom, right = (max(0, a - b) for a, b in zip(self.size, F.get_size(inpt), strict=True))
        fill = IGNORED if isinstance(inpt, tv_tensors.Mask) else 0
        return F.pad(inpt, [0, 0, right, bottom], fill=fill)


def segmentation_training_transform(
    augmentation: SegmentationAugmentation | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> PairTransform:
    """Resize, crop, flip, distort colours, normalise, pad: (image, mask) -> (3, h, w) fp32 and (h, w) int64.

    Draws from torch's global random generator.
    """
    chosen = augmentation or SegmentationAugmentation()
    return _OnPairs(
        RandomRatioResize(chosen.base_size, chosen.ratio, chosen.antialias),
        ClassBalancedCrop(chosen.crop, chosen.class_share),
        v2.RandomHorizontalFlip(chosen.flip),
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
        PhotometricDistortion() if chosen.photometric else v2.Identity(),
        v2.Normalize(list(mean), list(std)),
        PadTo(chosen.crop),  # after normalising, so that padding is the mean colour
    )


def segmentation_evaluation_transform(
    mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> PairTransform:
    """Normalise alone: (image, mask) of any size -> (3, H, W) fp32 and (H, W) int64. Resizing is inference's."""
    return _OnPairs(
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
        v2.Normalize(list(mean), list(std)),
    )


class _OnPairs:
    """Transforms of torchvision on an image and its mask; an object, so that it can be sent to worker processes."""

    def __init__(self, *transforms: v2.Transform) -> None:
        self.together = v2.Compose(transforms)

    def __call__(self, image: Image.Image | Tensor, mask: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        image, mask = self.together(tv_tensors.Image(image), tv_tensors.Mask(torch.as_tensor(mask)))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor).long()


class TransformedMasks(Dataset):
    """Masked images through a transform, for a ``DataLoader``: (image, mask) tensors."""

    def __init__(self, samples: MaskedImages | MasksInMemory, transform: PairTransform):
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(*self.samples[index])
