"""RandAugment's operations for many images at once, each image with an argument of its own.

They give what Pillow's give: those that map each grey value by itself and the autocontrast, equalise and colour ones to
the last bit, sharpness within a rounding. Images are (n, 3, H, W) uint8, RGB.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Pillow's conversion to grey, in 1/65536
_RED, _GREEN, _BLUE = 19595, 38470, 7471


def grey(images: Tensor) -> Tensor:
    """Luma (n, 1, H, W) int32, 0..255, rounded as Pillow rounds it."""
    red, green, blue = images.to(torch.int32).split(1, dim=1)
    return (_RED * red + _GREEN * green + _BLUE * blue + 32768) >> 16


def affine(images: Tensor, maps: Tensor, fill: Tensor) -> Tensor:
    """Images moved by affine ``maps``, see :func:`grid_maps`; bilinear, ``fill`` (3,) where there is no image."""
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    sampled = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    outside = ((grid < -1) | (grid >= 1)).any(dim=3)[:, None]
    # Pillow cuts off; the hundredth keeps what is a whole number there from being a little less here
    return torch.where(outside, fill[:, None, None], sampled.add_(0.01)).to(torch.uint8)


def grid_maps(matrices: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Affine maps in pixels as grid_sample counts, from -1 to 1 over the image: (n, 2, 3) float32.

    ``matrices`` (n, 6) are a to f: output pixel (x, y) shows input pixel (a x + b y + c, d x + e y + f). Coordinates
    count from the image's corner, so that pixel centres lie at halves. ``size`` is (H, W).
    """
    H, W = size
    a, b, c, d, e, f = matrices.T
    b, d = b * (H / W), d * (W / H)
    rows = [a, b, a + b + c * (2 / W) - 1, d, e, d + e + f * (2 / H) - 1]
    return np.stack(rows, axis=1).reshape(-1, 2, 3).astype(np.float32)


def color(images: Tensor, factors: Tensor) -> Tensor:
    """Away from grey (factor > 1) or towards it (< 1); 1 changes nothing."""
    return _blend(grey(images).float(), images, factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Away from a smoothed image (factor > 1) or towards it (< 1). Border pixels stay as they are."""
    pixels = images.float()
    smooth = pixels.clone()
    if min(images.shape[2:]) > 2:
        around = F.avg_pool2d(pixels, 3, stride=1, divisor_override=13)
        inner = around + pixels[..., 1:-1, 1:-1] * (4 / 13)
        # so little more than a half that a sum which is a half in exact arithmetic is rounded up, as by Pillow
        smooth[..., 1:-1, 1:-1] = (inner + 0.50001).floor()
    return _blend(smooth, images, factors)


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Every grey value replaced by its entry in ``tables`` (n, 3, 256) or (n, 1, 256) uint8."""
    n, C, H, W = images.shape
    places = images.reshape(n * C, H * W).long()
    return tables.expand(n, C, 256).reshape(n * C, 256).gather(1, places).reshape(n, C, H, W)


# Tables for look_up that depend on arguments (n,) alone, (n, 256) uint8, made on the CPU.

_VALUES = np.arange(256)


def invert_table(arguments: np.ndarray) -> np.ndarray:
    return np.broadcast_to(255 - _VALUES, (len(arguments), 256)).astype(np.uint8)


def posterize_table(bits: np.ndarray) -> np.ndarray:
    """Only the ``bits`` uppermost bits are kept."""
    return (_VALUES & (0xFF << (8 - bits.astype(np.int64)))[:, None]).astype(np.uint8)


def solarize_table(thresholds: np.ndarray) -> np.ndarray:
    """Values from the threshold (0..256) on are inverted."""
    return np.where(thresholds[:, None] > _VALUES, _VALUES, 255 - _VALUES).astype(np.uint8)


def solarize_add_table(addends: np.ndarray) -> np.ndarray:
    """The addend is added to values below 128."""
    return np.where(_VALUES < 128, np.minimum(255, _VALUES + addends[:, None]), _VALUES).astype(np.uint8)


def brightness_table(factors: np.ndarray) -> np.ndarray:
    return (_VALUES.astype(np.float32) * factors[:, None].astype(np.float32)).clip(0, 255).astype(np.uint8)


# Tables (n, 1 or 3, 256) uint8 for look_up that depend on the images, too.


def contrast_tables(images: Tensor, factors: Tensor) -> Tensor:
    """Away from the image's mean grey (factor > 1) or towards it (< 1)."""
    total = grey(images).sum(dim=(1, 2, 3))
    pixels = images.shape[2] * images.shape[3]
    # the mean rounded half up, in whole numbers
    mean = (2 * total + pixels) // (2 * pixels)
    return _blend(mean.float()[:, None, None], _values(images), factors[:, None])


def autocontrast_tables(images: Tensor, _: Tensor) -> Tensor:
    """Each channel's values spread over the whole range."""
    flat = images.flatten(2)
    # Pillow computes in double precision and cuts off, which decides between two grey values
    low, high = (extreme.double()[..., None] for extreme in (flat.amin(2), flat.amax(2)))
    scale = torch.full_like(low, 255) / (high - low)  # a scalar would be multiplied by the reciprocal
    spread = (_values(images) * scale + -low * scale).clamp(0, 255).floor()
    return torch.where(high > low, spread, _values(images).double()).to(torch.uint8)


def equalize_tables(images: Tensor, _: Tensor) -> Tensor:
    """Each channel's values spread so that all are about as frequent."""
    n, C, H, W = images.shape
    places = images.reshape(n * C, H * W).long()
    counts = torch.zeros(n * C, 256, dtype=torch.int32, device=images.device)
    counts.scatter_add_(1, places, torch.ones((), dtype=torch.int32, device=images.device).expand_as(places))
    counts = counts.reshape(n, C, 256)
    most = images.flatten(2).amax(2, keepdim=True).long()
    step = (H * W - counts.gather(2, most)) // 255
    before = counts.cumsum(2) - counts
    spread = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, spread, _values(images).int()).to(torch.uint8)


def _values(images: Tensor) -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device=images.device)[None, None]


def _blend(other: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """``other`` at factor 0, ``images`` at factor 1, beyond it beyond; cut off to uint8 as Pillow does."""
    factors = factors.reshape(-1, *([1] * (images.dim() - 1)))
    return (other + factors * (images - other)).clamp_(0, 255).to(torch.uint8)
