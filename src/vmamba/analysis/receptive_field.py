"""The effective receptive field: how much every pixel of the picture moves the centre of a layer's output.

Sources: Luo et al., *Understanding the Effective Receptive Field in Deep Convolutional Neural Networks*, 2016; the
areas are those of Ding et al., *Scaling Up Your Kernels to 31x31* (RepLKNet), 2022. The figure of receptive fields in
VMamba (arXiv 2401.10166) follows both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .inspecting import evaluating, feature_layer, output_of

__all__ = ["LAYOUTS", "SHARES", "Area", "ReceptiveField", "effective_receptive_field"]

LAYOUTS = ("NCHW", "NHWC", "NLC")
LEAST_MOTION = 1e-4  # of the features' sum beside that of single features: fp32 rounding errors reach 1e-6
SHARES = (0.2, 0.3, 0.5, 0.99)  # of the contribution: the ones that RepLKNet's table has


class Area(NamedTuple):
    """Where a share of the contribution comes from.

    share: of the whole contribution, 0 to 1.
    side: pixels; of the smallest square around the field's centre that holds it.
    square: share of the picture that this square covers; what sticks out of the picture is not counted.
    pixels: share of the picture that the fewest pixels holding it make up, wherever they lie.
    """

    share: float
    side: float
    square: float
    pixels: float


@dataclass(frozen=True)
class ReceptiveField:
    """An effective receptive field.

    Attributes:
        layer: name of the layer.
        contribution: (H, W) float64, of the picture's pixels; not normalised.
        grid: (h, w) of the layer's output. pixel: (row, column) there, its centre (h // 2, w // 2).
        centre: (row, column) of the middle of that cell, in pixels of the picture; .5 lies between two pixels.
        images: how many were averaged.
        rectified: whether negative features and gradients were left out.
    """

    layer: str
    contribution: np.ndarray
    grid: tuple[int, int]
    pixel: tuple[int, int]
    centre: tuple[float, float]
    images: int
    rectified: bool

    def areas(self, shares: Sequence[float] = SHARES) -> tuple[Area, ...]:
        """The area that holds each of these shares of the contribution.

        Raises:
            ValueError: a share does not lie in (0, 1].
        """
        if wrong := [share for share in shares if not 0 < share <= 1]:
            raise ValueError(f"shares of the contribution lie in (0, 1], not {wrong[0]}")
        height, width = self.contribution.shape
        rows, columns = np.abs(np.arange(height) - self.centre[0]), np.abs(np.arange(width) - self.centre[1])
        # rings of pixels around the centre; rounding joins distances that differ by the last bit alone
        distance = np.maximum(rows[:, None], columns[None, :]).round(6)
        rings, ring_of_pixel = np.unique(distance, return_inverse=True)
        within = np.cumsum(np.bincount(ring_of_pixel.ravel(), self.contribution.ravel()))
        pixels_within = np.cumsum(np.bincount(ring_of_pixel.ravel()))
        largest_first = np.cumsum(np.sort(self.contribution.ravel())[::-1])
        areas = []
        for share in shares:
            ring = _first_holding(within, share)
            fewest = _first_holding(largest_first, share) + 1
            size = self.contribution.size
            areas.append(Area(share, float(2 * rings[ring] + 1), float(pixels_within[ring] / size), fewest / size))
        return tuple(areas)


def _first_holding(cumulated: np.ndarray, share: float) -> int:
    # a relative 1e-12 for the order of summation: all of it is held by the last pixel that contributes
    return int(np.searchsorted(cumulated, share * cumulated[-1] * (1 - 1e-12)))


def effective_receptive_field(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    layer: str | int = -1,
    *,
    layout: str | None = None,
    rectified: bool = False,
    batch_size: int = 8,
) -> ReceptiveField:
    """The gradient of the features at the centre of a layer, summed over channels, with respect to the picture.

    The contribution of a pixel is the gradient's absolute value, summed over the picture's channels and averaged over
    the pictures. The model is in evaluation mode meanwhile, and as it was afterwards; no `.grad` is touched.

    Args:
        model: any network that takes (B, C, H, W).
        images: (B, C, H, W), preprocessed as the model expects; or batches of such, all of one height and width.
        layer: a name in `model.named_modules()`, or the number of a feature of a timm model: -1 is the last stage.
        layout: of the layer's output: "NCHW", "NHWC", or "NLC" for tokens. None: told from the shapes.
        rectified: leave out negative features and negative gradients, as RepLKNet's and VMamba's own figures do.
        batch_size: pictures a backward pass, where `images` is one tensor.

    Raises:
        ValueError: no picture; pictures of different sizes; an unknown layer (lists near names) or layout; a layer
            whose centre does not depend on the picture, such as the sum over channels of what a LayerNorm gives.
        FloatingPointError: the gradient is not finite.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    name = feature_layer(model, layer) if isinstance(layer, int) else layer
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total, count, grid = None, 0, (0, 0)
    with evaluating(model), torch.enable_grad():
        for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
            if batch.ndim != 4:
                raise ValueError(f"images must be (B, C, H, W), got {tuple(batch.shape)}")
            if total is not None and batch.shape[2:] != total.shape:
                raise ValueError(
                    f"all images must have one size, got {tuple(batch.shape[2:])} after {tuple(total.shape)} px"
                )
            if not len(batch):
                continue
            batch = batch.detach().to(device).requires_grad_()
            features, grid = _centre(output_of(model, name, batch), batch.shape[2:], layout, model, name)
            if rectified:
                features = features.relu()
            if not features.requires_grad:
                raise ValueError(f"the layer {name!r} does not depend on the picture: take another one")
            if total is None:
                _check_sum_moves(features, batch, name)
            (gradient,) = torch.autograd.grad(features.sum(), batch)
            gradient = gradient.relu() if rectified else gradient.abs()
            summed = gradient.sum((0, 1), dtype=None if device.type == "mps" else torch.float64).cpu().double()
            total = summed if total is None else total + summed
            count += len(batch)
    if total is None:
        raise ValueError("no images: an effective receptive field is an average over at least one")
    if not total.isfinite().all():
        raise FloatingPointError(
            f"the gradient of {name!r} is not finite: the model's weights or the images are broken"
        )
    if float(total.max()) == 0:
        raise ValueError(
            f"no feature at the centre of {name!r} grows with any pixel: leave out rectified (--rectified)"
        )
    height, width = total.shape
    pixel = (grid[0] // 2, grid[1] // 2)
    centre = ((pixel[0] + 0.5) * height / grid[0] - 0.5, (pixel[1] + 0.5) * width / grid[1] - 0.5)
    return ReceptiveField(name, (total / count).numpy(), grid, pixel, centre, count, rectified)


def _check_sum_moves(features: Tensor, batch: Tensor, name: str) -> None:
    """Refuse features that depend on the picture while their sum does not, and would give rounding errors alone."""
    mixture = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features)
    sizes = []
    for mixed in (features.sum(), (features * mixture).sum()):
        (gradient,) = torch.autograd.grad(mixed, batch, retain_graph=True, allow_unused=True)
        sizes.append(0.0 if gradient is None else float(gradient.abs().max()))
    if sizes[1] == 0:
        raise ValueError(f"the layer {name!r} does not depend on the picture: take another one")
    if sizes[0] < LEAST_MOTION * sizes[1]:
        raise ValueError(
            f"the features of {name!r}, summed over channels, do not move with the picture, as behind a LayerNorm "
            "whose weights are all the same: take the layer before it, or positive features alone, with "
            "rectified=True (--rectified)"
        )


def _centre(
    features: Tensor, size: tuple[int, int], layout: str | None, model: nn.Module, name: str
) -> tuple[Tensor, tuple[int, int]]:
    """The features (B, C) at the centre of the grid, and the grid (h, w)."""
    layout = layout or _layout(tuple(features.shape), size, name)
    if layout == "NLC":
        prefix = getattr(model, "num_prefix_tokens", 0)
        # some networks add the tokens that are not of the picture in their last layers only
        for tokens in (features[:, prefix:], features) if features.ndim == 3 else ():
            if (grid := _token_grid(tokens.shape[1], size)) is not None:
                break
        else:
            raise ValueError(f"the output {tuple(features.shape)} of {name!r} is no grid of tokens: take another layer")
        return tokens[:, grid[0] // 2 * grid[1] + grid[1] // 2], grid
    if features.ndim != 4:
        raise ValueError(f"the output {tuple(features.shape)} of {name!r} is not {layout}")
    if layout == "NCHW":
        features = features.permute(0, 2, 3, 1)
    height, width = features.shape[1:3]
    return features[:, height // 2, width // 2], (height, width)


def _layout(shape: tuple[int, ...], size: tuple[int, int], name: str) -> str:
    """Channels first or last? Told by which two sides are those of the picture, made smaller."""
    if len(shape) == 3:
        return "NLC"
    if len(shape) == 4:
        skew = {
            layout: abs(sides[0] / sides[1] - size[0] / size[1])
            for layout, sides in (("NCHW", shape[2:]), ("NHWC", shape[1:3]))
        }
        if skew["NCHW"] != skew["NHWC"]:
            return min(skew, key=skew.__getitem__)
        raise ValueError(
            f"the output {shape} of {name!r} may be NCHW or NHWC: say which, with layout= (--layout), or take images "
            "of another height than width"
        )
    raise ValueError(f"the output {shape} of {name!r} is no map of features: take a layer before the pooling")


def _token_grid(count: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """The grid (h, w) of that many tokens with the picture's aspect, or None."""
    height = round((count * size[0] / size[1]) ** 0.5)
    return (height, count // height) if height and count % height == 0 else None
