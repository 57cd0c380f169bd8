"""From images with boxes and masks to batches for a detector, on torchvision's v2 transforms.

The detector itself resizes, normalises and pads (`vmamba.models.detection`): here is what comes before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .packed_masks import PackedMasks, pack_masks, unpack_masks

__all__ = [
    "MULTI_SCALE_CROPS",
    "MULTI_SCALE_SIZES",
    "DetectionAugmentation",
    "collate_detection",
    "detection_evaluation_transform",
    "detection_training_transform",
]

Target = dict[str, Tensor]

MULTI_SCALE_SIZES = tuple(range(480, 801, 32))  # of the short side: 480, 512, ..., 800, for the detector's `min_size`


@dataclass(frozen=True)
class DetectionAugmentation:
    """What training does to an image before the detector resizes it. The defaults are those of the 1x recipe.

    Attributes:
        horizontal_flip: probability.
        crop: probability of first resizing to a short side among `crop_resize` (long side at most `crop_max`), and then
            cutting out a window with sides drawn from `crop_sides`, both ends included, or the whole of a shorter side.
    """

    horizontal_flip: float = 0.5
    crop: float = 0.0
    crop_resize: tuple[int, ...] = (400, 500, 600)
    crop_max: int = 1333
    crop_sides: tuple[int, int] = (384, 600)

    def __post_init__(self) -> None:
        for name in ("horizontal_flip", "crop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, got {getattr(self, name)}")
        if not self.crop_resize or min(self.crop_resize) < 1:
            raise ValueError(f"crop_resize must be positive sizes, got {self.crop_resize}")
        if len(self.crop_sides) != 2 or not 1 <= self.crop_sides[0] <= self.crop_sides[1]:
            raise ValueError(f"crop_sides must be the least and the greatest side, got {self.crop_sides}")


# the 3x recipe: half of the images cropped, and all of them resized to one of MULTI_SCALE_SIZES by the detector
MULTI_SCALE_CROPS = DetectionAugmentation(crop=0.5)


class RandomWindow(v2.Transform):
    """Cuts out a window of random size and place; boxes are clipped to it, and what has no box left stays behind."""

    def __init__(self, least: int, greatest: int):
        super().__init__()
        self.least, self.greatest = least, greatest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sides = v2.functional.get_size(flat_inputs[0])
        window = [self._between(min(side, self.least), min(side, self.greatest)) for side in sides]
        start = [self._between(0, side - cut) for side, cut in zip(sides, window, strict=True)]
        return {"top": start[0], "left": start[1], "height": window[0], "width": window[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)

    @staticmethod
    def _between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, ()))


class LostObjects(v2.SanitizeBoundingBoxes):
    """Leaves out objects whose boxes have no area, with their labels and masks, packed or not."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, PackedMasks):
            return super().transform(inpt, params)
        masks = unpack_masks(inpt.as_subclass(Tensor), len(params["valid"]))
        return tv_tensors.wrap(pack_masks(masks[params["valid"]]), like=inpt)


def detection_training_transform(augmentation: DetectionAugmentation = DetectionAugmentation()) -> v2.Transform:
    """(image, target) as a `CocoDataset` gives them -> image (3, H, W) fp32 in [0, 1], target, both plain tensors.

    Draws from torch's global generator.
    """
    steps: list[v2.Transform] = [v2.ToImage(), v2.RandomHorizontalFlip(augmentation.horizontal_flip)]
    if augmentation.crop:
        resize = v2.RandomShortestSize(list(augmentation.crop_resize), augmentation.crop_max, antialias=False)
        steps.append(v2.RandomApply([resize, RandomWindow(*augmentation.crop_sides)], augmentation.crop))
        steps.append(LostObjects())
    return v2.Compose([*steps, *_to_tensors()])


def detection_evaluation_transform() -> v2.Transform:
    """(image, target) -> image (3, H, W) fp32 in [0, 1], target, at the image's own size."""
    return v2.Compose([v2.ToImage(), *_to_tensors()])


def collate_detection(batch: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """(image, target) pairs -> (images, targets) for a detector: images differ in size, so nothing is stacked."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def _to_tensors() -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
