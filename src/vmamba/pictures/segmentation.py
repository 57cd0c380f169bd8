"""Pictures of a segmentation: the index mask, the photo under its colours, and a legend, with Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from .._files import write_aside

__all__ = [
    "ClassShare",
    "class_colours",
    "class_shares",
    "draw_overlay",
    "save_index_mask",
    "save_legend",
    "save_overlay",
]

NAMED_FROM = 0.01  # share of the picture from which a class is named in it
LEGEND_ROWS = 30  # in a column
PLACING_GRID = 160  # pixels of the longer side of the reduced mask on which a name's place is looked for


class ClassShare(NamedTuple):
    """A class that occurs in a mask: its index, name, and share of the pixels (0 to 1)."""

    index: int
    name: str
    share: float


def class_shares(mask: np.ndarray, names: Sequence[str]) -> list[ClassShare]:
    """The classes in a mask of any shape, the largest first."""
    counts = np.bincount(mask.ravel(), minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    return [ClassShare(int(i), names[i], float(counts[i] / mask.size)) for i in order if counts[i]]


@cache
def class_colours(count: int) -> np.ndarray:
    """Colours of ``count`` classes, (count, 3) uint8: each is the farthest from those before it, as the eye sees it.

    The first classes' colours do not depend on how many follow. Black, white and grey are kept away from.
    """
    levels = np.linspace(0, 255, 13)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _cielab(candidates)
    visible = (lab[:, 0] > 25) & (lab[:, 0] < 92)
    candidates, lab = candidates[visible], lab[visible]
    distance = np.full(len(lab), np.inf)
    for grey in (0, 128, 255):
        distance = np.minimum(distance, np.linalg.norm(lab - _cielab(np.full((1, 3), grey)), axis=1))
    chosen = []
    for _ in range(count):
        best = int(distance.argmax())
        chosen.append(best)
        distance = np.minimum(distance, np.linalg.norm(lab - lab[best], axis=1))
    return candidates[chosen].round().astype(np.uint8)


def _cielab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (n, 3) in 0..255 as CIELAB under D65 (IEC 61966-2-1, CIE 15)."""
    c = rgb / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ matrix.T / matrix.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def save_index_mask(mask: np.ndarray, count: int, path: Path) -> None:
    """Write a mask (H, W) of class indices as a PNG of those numbers, shown in the classes' colours."""
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(class_colours(count).tobytes())
    write_aside(path, lambda aside: image.save(aside, format="PNG"))


def draw_overlay(photo: Image.Image, mask: np.ndarray, names: Sequence[str], opacity: float = 0.55) -> Image.Image:
    """The photo under its classes' colours, with borders, and names of the larger classes where there is room.

    Args:
        photo: RGB, of the mask's size. mask: (H, W) class indices; a larger number than there are classes stands for no
            class, and is black. names: of all classes.
        opacity: of the colours, 0 to 1.
    """
    colours = np.concatenate([class_colours(len(names)), np.zeros((1, 3), np.uint8)])[mask.clip(max=len(names))]
    blended = np.asarray(photo) * (1 - opacity) + colours * opacity
    blended[_borders(mask)] = 255
    image = Image.fromarray(blended.round().astype(np.uint8))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=max(11, round(max(image.size) / 45)))
    taken = np.zeros(mask.shape, dtype=bool)
    for entry in class_shares(mask[mask < len(names)], names):
        if entry.share < NAMED_FROM:
            break
        box = draw.textbbox((0, 0), entry.name, font, "mm")
        place = _kept_inside(_middle(mask == entry.index), box, image.size)
        left, top, right, bottom = (max(0, round(side)) for side in draw.textbbox(place, entry.name, font, "mm"))
        if not taken[top:bottom, left:right].any():  # a name of a larger class stays readable
            draw.text(place, entry.name, font=font, fill="white", stroke_fill="black", stroke_width=2, anchor="mm")
            taken[top:bottom, left:right] = True
    return image


def save_overlay(photo: Image.Image, mask: np.ndarray, names: Sequence[str], path: Path, opacity: float = 0.55) -> None:
    """Write what :func:`draw_overlay` draws as PNG."""
    image = draw_overlay(photo, mask, names, opacity)
    write_aside(path, lambda aside: image.save(aside, format="PNG"))


def save_legend(mask: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Write the classes in a mask (H, W), the largest first, with their colours and shares of the picture, as PNG."""
    rows = class_shares(mask, names)
    colours = class_colours(len(names))
    font = ImageFont.load_default(size=16)
    row_height, swatch, gap = 26, 20, 10
    name_width = max(int(font.getlength(row.name)) for row in rows) + 1
    share_width = int(font.getlength("100.0 %")) + 1
    width = 4 * gap + swatch + name_width + share_width
    columns = -(-len(rows) // LEGEND_ROWS)
    image = Image.new("RGB", (columns * width, min(len(rows), LEGEND_ROWS) * row_height + 2 * gap), "white")
    draw = ImageDraw.Draw(image)
    for i, row in enumerate(rows):
        left = gap + i // LEGEND_ROWS * width
        middle = gap + i % LEGEND_ROWS * row_height + row_height // 2
        draw.rectangle(
            (left, middle - swatch // 2, left + swatch, middle + swatch // 2),
            fill=tuple(colours[row.index].tolist()),
            outline="black",
        )
        draw.text((left + swatch + gap, middle), row.name, font=font, fill="black", anchor="lm")
        right = left + width - 2 * gap
        draw.text((right, middle), f"{100 * row.share:.1f} %", font=font, fill="black", anchor="rm")
    write_aside(path, lambda aside: image.save(aside, format="PNG"))


def _borders(mask: np.ndarray) -> np.ndarray:
    """Where the pixel to the right or below is of another class, (H, W) bool."""
    borders = np.zeros(mask.shape, dtype=bool)
    borders[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    borders[:-1] |= mask[:-1] != mask[1:]
    return borders


def _kept_inside(
    place: tuple[int, int], box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[float, float]:
    """A place for a text whose box around (0, 0) is given, moved so that it lies in an image of a size."""
    left, top, right, bottom = box
    margin = 3
    x = max(margin - left, min(place[0], size[0] - margin - right))
    y = max(margin - top, min(place[1], size[1] - margin - bottom))
    return x, y


def _middle(region: np.ndarray) -> tuple[int, int]:
    """x and y of a pixel of a region (H, W) that survives eroding it the longest, the middle one of those."""
    step = max(1, -(-max(region.shape) // PLACING_GRID))
    # by area, so that no region vanishes
    inside = F.avg_pool2d(torch.from_numpy(region)[None].float(), step, ceil_mode=True) >= 0.5
    if not inside.any():
        y, x = np.argwhere(region)[0]
        return int(x), int(y)
    alive = F.pad(inside.float(), (1, 1, 1, 1))
    depth = alive.clone()
    while alive.any():
        alive = -F.max_pool2d(-alive, 3, stride=1, padding=1)
        depth += alive
    deepest = (depth[0] == depth.max()).nonzero().float()
    y, x = deepest[(deepest - deepest.mean(0)).norm(dim=1).argmin()].int().tolist()
    return (x - 1) * step + step // 2, (y - 1) * step + step // 2
