"""A segmentation model on images of any size: whole or by sliding windows, at several scales, flipped or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.segmentation import fitted_size

__all__ = ["ADE20K_MULTI_SCALE", "ADE20K_SINGLE_SCALE", "SegmentationInference", "class_scores", "segment"]

MIN_SIDE = 32  # pixels; the coarsest features of a smaller image would be empty
CLASSES_AT_ONCE = 16  # resized together where only the best one is wanted


@dataclass(frozen=True)
class SegmentationInference:
    """How a model is applied to images.

    Args:
        size: (long, short) side that an image is fitted into, keeping its shape; None: its own size.
        window: height and width of sliding windows; None: the whole image at once.
        stride: steps of the windows, downwards and to the right; None: two thirds of the window.
        ratios: scales of the image, on top of `size`, whose class probabilities are averaged.
        flip: average with those of the mirrored image, too.
        multiple: pad height and width to multiples of this, for models that need it (Unet: 32). Padding, at the
            right and the bottom, is the mean colour, and is cut off the scores again.
        antialias: smooth an image before making it smaller.

    Raises:
        ValueError: a value is out of range.
    """

    size: tuple[int, int] | None = None
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False
    multiple: int = 1
    antialias: bool = True

    def __post_init__(self) -> None:
        for name in ("size", "window", "stride"):
            value = getattr(self, name)
            if value is not None and (len(value) != 2 or min(value) < 1):
                raise ValueError(f"{name} must be two positive numbers or None, not {value!r}")
        if self.stride is not None and self.window is None:
            raise ValueError(f"stride {self.stride} is of sliding windows: name a window too")
        if self.stride is not None and any(s > w for s, w in zip(self.stride, self.window, strict=True)):
            raise ValueError(f"stride {self.stride} would leave gaps between windows of {self.window}")
        if not self.ratios or min(self.ratios) <= 0:
            raise ValueError(f"ratios must be one or more positive numbers, not {self.ratios}")
        if self.multiple < 1:
            raise ValueError(f"multiple must be at least 1, not {self.multiple}")

    @property
    def views(self) -> int:
        """How often an image is looked at."""
        return len(self.ratios) * (1 + self.flip)


# The published tests on ADE20K: mmsegmentation's resizing does not smooth, and its scales are of the image's own size
ADE20K_SINGLE_SCALE = SegmentationInference(size=(2048, 512), antialias=False)
ADE20K_MULTI_SCALE = SegmentationInference(ratios=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flip=True, antialias=False)


def class_scores(
    model: nn.Module,
    images: Tensor,
    inference: SegmentationInference | None = None,
    out_size: tuple[int, int] | None = None,
) -> Tensor:
    """Class scores of every pixel, whose softmax over dimension 1 are probabilities.

    Args:
        model: images (B, 3, h, w) -> scores (B, classes, h, w) in evaluation mode.
        images: (B, 3, H, W), normalised.
        inference: the images whole, at their size, by default.
        out_size: height and width of the result; (H, W) by default.

    Returns:
        (B, classes, *out_size) fp32: the model's scores resized, or the logarithm of mean probabilities where there
        are several views.

    Raises:
        TypeError: the model gives something else than scores, such as a `UPerNet` in training mode.
    """
    inference = inference or SegmentationInference()
    out_size = tuple(out_size or images.shape[2:])
    if inference.views == 1:
        return _resize(next(_views(model, images, inference)), out_size)
    total = sum(_resize(scores, out_size).softmax(dim=1) for scores in _views(model, images, inference))
    # a probability of 0 in fp32 is not impossible
    return (total / inference.views).clamp(min=torch.finfo(total.dtype).tiny).log()


def segment(
    model: nn.Module,
    images: Tensor,
    inference: SegmentationInference | None = None,
    out_size: tuple[int, int] | None = None,
) -> Tensor:
    """The most probable class of every pixel, (B, *out_size) int64; arguments as of `class_scores`.

    Equals `class_scores(...).argmax(1)`. Of a single view never all scores are held at `out_size`, which for 150
    classes and a photo of 12 megapixels would be 7 GB.
    """
    inference = inference or SegmentationInference()
    if inference.views > 1:
        return class_scores(model, images, inference, out_size).argmax(dim=1)
    scores = next(_views(model, images, inference))
    best = value = None
    for start in range(0, scores.shape[1], CLASSES_AT_ONCE):
        here = _resize(scores[:, start : start + CLASSES_AT_ONCE], tuple(out_size or images.shape[2:]))
        here_value, here_best = here.max(dim=1)
        if best is None:
            best, value = here_best, here_value
        else:
            better = here_value > value
            best, value = torch.where(better, here_best + start, best), torch.where(better, here_value, value)
    return best


def _views(model: nn.Module, images: Tensor, inference: SegmentationInference) -> Iterator[Tensor]:
    """The model's scores for every scale and its mirror image, each at its own scale, unmirrored, fp32."""
    height, width = images.shape[2:]
    base = inference.size or (max(height, width), min(height, width))
    for ratio in inference.ratios:
        scaled = fitted_size((height, width), (base[0] * ratio, base[1] * ratio))
        view = _resize(images, scaled, inference.antialias)
        yield _apply(model, view, inference)
        if inference.flip:
            yield _apply(model, view.flip(3), inference).flip(3)


def _apply(model: nn.Module, images: Tensor, inference: SegmentationInference) -> Tensor:
    """Scores (B, classes, H, W) fp32 of images (B, 3, H, W), whole or by windows."""
    if inference.window is None:
        return _padded(model, images, inference.multiple)
    height, width = images.shape[2:]
    window_height, window_width = min(height, inference.window[0]), min(width, inference.window[1])
    stride = inference.stride or tuple(-(-2 * side // 3) for side in inference.window)
    total = count = None
    for top in _starts(height, window_height, stride[0]):
        for left in _starts(width, window_width, stride[1]):
            here = (..., slice(top, top + window_height), slice(left, left + window_width))
            scores = _padded(model, images[here], inference.multiple)
            if total is None:
                total = scores.new_zeros(*scores.shape[:2], height, width)
                count = scores.new_zeros(height, width)
            total[here] += scores
            count[here] += 1
    return total / count


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start so that they cover `length`; the last one ends with it."""
    return [*range(0, length - window, stride), length - window]


def _padded(model: nn.Module, images: Tensor, multiple: int) -> Tensor:
    height, width = images.shape[2:]
    bottom, right = (max(-(-side // multiple) * multiple, MIN_SIDE) - side for side in (height, width))
    if bottom or right:
        images = F.pad(images, (0, right, 0, bottom))
    scores = model(images)
    if not isinstance(scores, Tensor):
        raise TypeError(f"the model gives a {type(scores).__name__}, not scores alone: call model.eval() first")
    return scores.float()[..., :height, :width]


def _resize(x: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False, antialias=antialias)
