"""timm's RandAugment for batches: what each image draws, in arrays, and doing it, in groups of images."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import pixel_operations as ops
from .random_numbers import normals

# in the order of their numbers; images of neighbouring kinds are worked on together
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
BLENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"Color": ops.color, "Sharpness": ops.sharpness}
IMAGE_TABLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": ops.autocontrast_tables,
    "Equalize": ops.equalize_tables,
    "Contrast": ops.contrast_tables,
}
TABLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Invert": ops.invert_table,
    "Posterize": ops.posterize_table,
    "Solarize": ops.solarize_table,
    "SolarizeAdd": ops.solarize_add_table,
    "Brightness": ops.brightness_table,
}
OPERATIONS = (*GEOMETRIC, *BLENDS, *IMAGE_TABLES, *TABLES)
NOTHING = -1
# numbers that one layer draws for an image: operation, whether, magnitude (two), sign
DRAWS = 5

_MAGNITUDE_SCALE = 10.0


@dataclass(frozen=True)
class Policy:
    """A policy of timm's: ``layers`` operations an image, each with ``probability`` and about ``magnitude`` (0..10).

    The magnitude is drawn with standard deviation ``deviation``, or uniformly below ``magnitude`` where that is
    infinite, and kept within ``limit``. ``increasing``: every operation grows with the magnitude.
    """

    magnitude: float = _MAGNITUDE_SCALE
    layers: int = 2
    probability: float = 0.5
    deviation: float = 0.0
    limit: float = _MAGNITUDE_SCALE
    increasing: bool = False

    @classmethod
    def parse(cls, text: str) -> Policy:
        """From timm's notation, such as ``"rand-m9-mstd0.5-inc1"``.

        Raises:
            ValueError: it is none, or one with other operations (``-t...``), which only the loader on the CPU knows.
        """
        fields = {"m": "magnitude", "n": "layers", "p": "probability", "mstd": "deviation", "mmax": "limit"}
        kind, *sections = text.split("-")
        values: dict[str, float | bool] = {}
        for section in sections:
            found = re.fullmatch(r"(mstd|mmax|inc|m|n|p)(\d+(?:\.\d+)?|inf)", section)
            if not found or kind != "rand":
                break
            key, number = found[1], float(found[2])
            if key == "inc":
                values["increasing"] = bool(number)
            elif key == "mstd" and number > 100:
                values["deviation"] = math.inf
            else:
                values[fields[key]] = int(number) if key == "n" else number
        else:
            if kind == "rand":
                return cls(**values)
        raise ValueError(
            f"augment.rand_augment {text!r} cannot be done in batches: give a policy such as 'rand-m9-mstd0.5-inc1', "
            f"or set data.in_memory=false"
        )


def draw(policy: Policy, numbers: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What one layer does to each of n images, from uniform ``numbers`` (n, 5): operations (n,), arguments (n,).

    An operation is its place in ``OPERATIONS``, or -1 for nothing. ``size`` (H, W) of the images makes pixels of
    translations.
    """
    which, whether, first, second, sign = numbers.T
    operation = np.minimum((which * len(OPERATIONS)).astype(np.int64), len(OPERATIONS) - 1)
    if math.isinf(policy.deviation):
        magnitude = policy.magnitude * first
    else:
        magnitude = policy.magnitude + policy.deviation * normals(first, second)
    level = magnitude.clip(0, policy.limit) / _MAGNITUDE_SCALE
    sign = np.where(sign > 0.5, -1.0, 1.0)
    argument = np.zeros_like(level)
    for place, values in enumerate(_arguments(policy.increasing, level, sign, size)):
        argument = np.where(operation == place, values, argument)
    return np.where(whether > policy.probability, NOTHING, operation), argument


def _arguments(
    increasing: bool, level: np.ndarray, sign: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray | float, ...]:
    """timm's arguments at ``level`` (1 is magnitude 10), in the order of ``OPERATIONS``."""
    H, W = size
    four, all_values = np.trunc(4 * level), np.minimum(256, np.trunc(256 * level))
    # Pillow 13 refuses to keep no bit
    bits = np.maximum(1, 4 - four if increasing else four)
    threshold = 256 - all_values if increasing else all_values
    factor = np.maximum(0.1, 1 + sign * 0.9 * level) if increasing else 0.1 + 1.8 * level
    return (
        *(sign * 30 * level, sign * 0.3 * level, sign * 0.3 * level, sign * 0.45 * level * W, sign * 0.45 * level * H),
        *(factor, factor),
        *(0.0, 0.0, factor),
        *(0.0, bits, threshold, np.minimum(128, np.trunc(110 * level)), factor),
    )


def apply(
    images: Tensor, operation: np.ndarray, argument: np.ndarray, fill: Tensor, to_device: Callable[[np.ndarray], Tensor]
) -> Tensor:
    """One layer on images (B, 3, H, W) uint8, in place; ``operation`` and ``argument`` (B,) are those of :func:`draw`.

    ``fill`` (3,) float32 is the colour around moved images.
    """
    order = np.argsort(operation, kind="stable")
    order = order[operation[order] != NOTHING]
    kinds, values = operation[order], argument[order]
    # the groups' borders are known here, on the CPU, so nothing waits for the device
    starts = np.searchsorted(kinds, np.arange(len(OPERATIONS) + 1))
    places, arguments = to_device(order), to_device(values.astype(np.float32))

    def group(first: int, last: int) -> slice:
        return slice(int(starts[first]), int(starts[last]))

    moved = group(0, len(GEOMETRIC))
    if moved.start < moved.stop:
        size = images.shape[2], images.shape[3]
        maps = to_device(ops.grid_maps(_matrices(kinds[moved], values[moved], size), size))
        chosen = places[moved]
        images[chosen] = ops.affine(images[chosen], maps, fill)
    first = len(GEOMETRIC)
    for kind, blend in enumerate(BLENDS.values(), first):
        blended = group(kind, kind + 1)
        if blended.start < blended.stop:
            chosen = places[blended]
            images[chosen] = blend(images[chosen], arguments[blended])
    first += len(BLENDS)
    mapped = group(first, len(OPERATIONS))
    if mapped.start < mapped.stop:
        chosen = images[places[mapped]]
        tables = []
        for kind, make in enumerate(IMAGE_TABLES.values(), first):
            part = group(kind, kind + 1)
            if part.start < part.stop:
                made = make(chosen[part.start - mapped.start : part.stop - mapped.start], arguments[part])
                tables.append(made.expand(-1, 3, 256))
        first += len(IMAGE_TABLES)
        made_here = [make(values[group(kind, kind + 1)]) for kind, make in enumerate(TABLES.values(), first)]
        tables.append(to_device(np.concatenate(made_here))[:, None].expand(-1, 3, 256))
        images[places[mapped]] = ops.look_up(chosen, torch.cat(tables))
    return images


def _matrices(kinds: np.ndarray, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The affine maps (n, 6) of geometric operations, see :func:`~.pixel_operations.grid_maps`."""
    H, W = size
    rotate, shear_x, shear_y, translate_x, translate_y = (np.where(kinds == k, values, 0.0) for k in range(5))
    cos, sin = np.cos(np.radians(rotate)), np.sin(np.radians(rotate))
    # rotation about the centre; at most one of the values is not 0
    c = W / 2 - cos * W / 2 + sin * H / 2 + translate_x
    f = H / 2 - sin * W / 2 - cos * H / 2 + translate_y
    return np.stack([cos, shear_x - sin, c, sin + shear_y, cos, f], axis=1)
