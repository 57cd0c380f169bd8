"""Crops of a whole batch, each resized to one size by two matrix products, with the weights of Pillow's ``resize``.

Resampling is linear and works on rows and columns apart, so a crop, its resize with a filter that grows with the
reduction (antialiasing), and a mirror image of it are one matrix for the rows and one for the columns. The weights
follow what Pillow documents and does: a filter centred on each output pixel, cut off at the border of the crop, and
normalised. Results differ from Pillow's by one grey value of 256 at most: it rounds between the axes, too. (Where a
cubic filter overshoots white or black, the order of the axes matters as well; here columns are always resized first.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# reach of each filter in pixels, at a scale of one
REACH = {"bicubic": 2.0, "bilinear": 1.0, "nearest": 0.5}


@dataclass(frozen=True)
class Window:
    """What of an axis each image of a batch shows, in pixels; arrays (B,) of float64.

    ``extent`` pixels from ``start`` on become the output's pixels; only those from ``low`` to ``high`` exist, and
    output pixels whose centres lie outside are 0. ``flip`` (bool) reverses the output.
    """

    start: np.ndarray
    extent: np.ndarray
    low: np.ndarray
    high: np.ndarray
    flip: np.ndarray


def taps_needed(interpolation: str, largest_reduction: float) -> int:
    """How many input pixels an output pixel depends on at most; ``largest_reduction`` is input over output size."""
    return 1 if interpolation == "nearest" else math.ceil(2 * REACH[interpolation] * max(1.0, largest_reduction)) + 1


def weights(window: Tensor, inputs: int, outputs: int, taps: int, interpolation: str, dtype: torch.dtype) -> Tensor:
    """Matrices (B, outputs, inputs) that make the output of one axis from its ``inputs`` pixels.

    ``window`` (5, B) float32 holds the rows of a :class:`Window`, ``flip`` as 0 or 1.
    """
    start, extent, low, high, flip = (row[:, None] for row in window)
    step = extent / outputs
    place = torch.arange(outputs, device=window.device, dtype=torch.float32)
    place = torch.where(flip > 0, outputs - 1 - place, place)
    centre = start + (place + 0.5) * step
    spread = step.clamp(min=1)
    if interpolation == "nearest":
        first = centre.floor()
    else:
        first = (centre - REACH[interpolation] * spread + 0.5).floor()
    pixel = first[..., None] + torch.arange(taps, device=window.device, dtype=torch.float32)
    distance = (pixel + 0.5 - centre[..., None]) / spread[..., None]
    exists = (pixel >= low[..., None]) & (pixel < high[..., None])
    weight = torch.where(exists, _filter(distance, interpolation), 0.0)
    inside = (centre >= low) & (centre < high)
    total = weight.sum(dim=2)
    weight = weight * torch.where(inside, 1 / torch.where(total == 0, 1.0, total), 0.0)[..., None]
    # neighbouring pixels stay apart when they are counted modulo the width, so that no weight meets the zero of a
    # pixel that does not exist
    width = max(inputs, taps)
    matrix = torch.zeros(*centre.shape, width, device=window.device, dtype=dtype)
    matrix.scatter_(2, torch.remainder(pixel, width).long(), weight.to(dtype))
    return matrix[:, :, :inputs]


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images (B, C, H, W) uint8 through the matrices (B, h, H) and (B, w, W), whose dtype it computes in.

    Returns:
        (B, C, h, w) of that dtype, neither rounded nor clamped.
    """
    B, C, H, W = images.shape
    wide = torch.bmm(images.to(rows.dtype).reshape(B, C * H, W), columns.transpose(1, 2))
    wide.clamp_(0, 255)  # as Pillow: what a cubic filter overshoots here is not passed on
    return torch.matmul(rows[:, None], wide.reshape(B, C, H, -1))


def to_bytes(images: Tensor) -> Tensor:
    """Floating-point grey values rounded and clamped to uint8. Writes into ``images``."""
    return images.add_(0.5).clamp_(0, 255).to(torch.uint8)


def _filter(distance: Tensor, interpolation: str) -> Tensor:
    x = distance.abs()
    if interpolation == "nearest":
        return torch.ones_like(x)
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    # Keys' cubic with a = -1/2
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
