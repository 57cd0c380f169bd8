"""Pictures with what a detector found drawn in: boxes, masks, names, scores."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["draw_detections"]

_LEAST_LONG_SIDE = 800  # pixels; smaller pictures are enlarged, or names would cover what they name
_GOLDEN = 0.618034  # of a turn of hue from one colour to the next: neighbours in number are far apart in colour
_OPACITY = 0.45  # of a mask


def draw_detections(image: Image.Image, detections: Mapping[str, Tensor], names: Sequence[str]) -> Image.Image:
    """A copy of an RGB picture with detections drawn in, the best on top.

    Small pictures are enlarged by a whole factor. A class has a colour; of a single class every object has its own.

    Args:
        detections: `boxes` (N, 4) x1 y1 x2 y2, `labels` (N,) from 1, and perhaps `scores` (N,), which annotations have
            not, and `masks` (N, 1, H, W).
        names: of the labels 1, 2, ...
    """
    factor = max(1, -(-_LEAST_LONG_SIDE // max(image.size)))
    size = (image.width * factor, image.height * factor)
    canvas = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)).copy()
    labels = detections["labels"].tolist()
    colours = [_colour(i if len(names) == 1 else label - 1) for i, label in enumerate(labels)]
    backwards = range(len(labels) - 1, -1, -1)
    if "masks" in detections:
        masks = detections["masks"][:, 0].numpy()
        for i in backwards:
            _paint(canvas, masks[i].repeat(factor, axis=0).repeat(factor, axis=1), colours[i])
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    width = max(2, round(max(size) / 500))
    font = ImageFont.load_default(size=max(11, round(max(size) / 65)))
    boxes = (detections["boxes"] * factor).tolist()
    for i in backwards:
        draw.rectangle(boxes[i], outline=colours[i], width=width)
    for i in backwards:
        text = names[labels[i] - 1]
        if "scores" in detections:
            text += f" {detections['scores'][i]:.2f}"
        _write(draw, text, boxes[i], colours[i], font, size)
    return picture


def _colour(number: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb((0.58 + number * _GOLDEN) % 1, 0.85, 0.95 if number % 2 else 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def _paint(canvas: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Tint the pixels (H, W, 3) uint8 under a mask, and draw its outline."""
    if not mask.any():
        return
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    canvas[inner] = (1 - _OPACITY) * canvas[inner] + _OPACITY * np.array(colour)
    canvas[mask & ~inner] = colour


def _write(
    draw: ImageDraw.ImageDraw,
    text: str,
    box: Sequence[float],
    colour: tuple[int, int, int],
    font: ImageFont.ImageFont,
    size: tuple[int, int],
) -> None:
    """A line of text on a ground of the box's colour, above the box, or inside it where there is no room above."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(box[0], 0), max(size[0] - width, 0))
    y = box[1] - height if box[1] >= height else box[1]
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    draw.text((x + 2 - left, y + 2 - top), text, fill="black" if bright else "white", font=font)
