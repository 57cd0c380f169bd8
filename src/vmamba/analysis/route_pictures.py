"""The scan routes over a grid, drawn: a figure, and an animation of the walk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .._extras import require
from .._figures import VERMILLION, new_figure
from .._files import write_aside
from ..ops import ROUTES
from ..ops.routes import route_indices
from .explanation_pictures import route_names
from .figures import COLOUR_MAP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = ["ROUTE_SETS", "route_figure", "route_walks", "save_route_animation"]

ROUTE_SETS = (*ROUTES, "cascade2d")
NUMBERED = 64  # cells of the largest grid whose steps are numbered
FRAMES = 64  # of an animation at most; larger grids take several steps a frame
LARGEST_DRAWN = 128  # cells of a side: beyond it lines run into each other
LIGHT_FROM = 0.6  # of the walk: from there on viridis is so light that numbers are black
MARKER = VERMILLION  # of the step that an animation has reached
GAP, NAME_HEIGHT, NAME_WIDTH = 14, 26, 150  # pixels of an animation: between panels, of a route's name


def route_walks(routes: str, height: int, width: int) -> list[list[np.ndarray]]:
    """Where each of the K routes walks: K lists of walks, each an array (steps, 2) of (row, column), int64.

    A route is one walk over all pixels; with "cascade2d" it is a walk of its own in every row, or every column.

    Raises:
        ValueError: no such set of routes, or no grid.
    """
    if routes not in ROUTE_SETS:
        raise ValueError(f"unknown routes {routes!r}: choose one of {', '.join(ROUTE_SETS)}")
    if height < 1 or width < 1:
        raise ValueError(f"a grid has at least one row and one column, not {height} x {width}")
    if routes != "cascade2d":
        orders = [route_indices(route, height, width).numpy() for route in ROUTES[routes]]
        return [[np.stack(np.divmod(order, width), axis=1)] for order in orders]
    cells = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    rows, columns = list(cells), list(cells.swapaxes(0, 1))
    return [rows, [walk[::-1] for walk in rows], columns, [walk[::-1] for walk in columns]]


def route_figure(routes: str, height: int, width: int, picture: Image.Image | None = None) -> Figure:
    """The K routes over a grid, a panel each: cells numbered in the order of the walk, its line from dark to light.

    Args:
        routes, height, width: as in `route_walks`; at most 128 cells a side.
        picture: drawn in the cells, as the paper's figure does.

    Raises:
        ValueError: as `route_walks`, or the grid is too large to be drawn.
    """
    walks = route_walks(routes, height, width)
    _check_drawable(height, width)
    colormap = require("matplotlib", "train").colormaps[COLOUR_MAP]
    panel = 2.5
    figure = new_figure(panel * len(walks) + 0.8, panel * height / width + 0.7)
    grid = figure.subplots(1, len(walks), squeeze=False)[0]
    for axes, name, parts in zip(grid, route_names(routes), walks, strict=True):
        axes.set_title(name, fontsize=9)
        if picture is not None:
            axes.imshow(picture, extent=(-0.5, width - 0.5, height - 0.5, -0.5), alpha=0.75)
        for walk in parts:
            _draw_walk(axes, walk, colormap, numbered=height * width <= NUMBERED)
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(height - 0.5, -0.5)
        axes.set_aspect("equal")
        if height * width <= 32 * 32:
            axes.set_xticks(np.arange(width + 1) - 0.5)
            axes.set_yticks(np.arange(height + 1) - 0.5)
            axes.grid(color="0.6", lw=0.5)
        axes.tick_params(length=0, labelbottom=False, labelleft=False)
    shown = require("matplotlib.cm", "train").ScalarMappable(cmap=colormap)
    bar = figure.colorbar(shown, ax=list(grid), shrink=0.8, pad=0.01, ticks=[0, 1])
    bar.ax.set_yticklabels(["first", "last"], fontsize=8)
    bar.set_label("step of the walk", fontsize=8, labelpad=-8)
    figure.supxlabel(_note(routes, height, width), fontsize=7.5)
    return figure


def _note(routes: str, height: int, width: int) -> str:
    note = f"{routes} on a grid of {height} × {width}"
    if height * width > NUMBERED:
        note += "; circle: first step, square: last"
    if routes != "cascade2d" and min(height, width) > 1:
        note += "; dotted: jumps"
    if routes == "cascade2d":
        note += "; each line is a scan of its own, columns scan what the rows gave; reversed scans are added unflipped"
    return note


def _draw_walk(axes: Axes, walk: np.ndarray, colormap: Colormap, numbered: bool) -> None:
    steps = len(walk)
    colours = colormap(np.linspace(0, 1, max(steps, 2)))[:steps]
    places = walk[:, ::-1]  # (x, y)
    lines = np.stack([places[:-1], places[1:]], axis=1)
    far = np.abs(places[1:] - places[:-1]).sum(1) > 1  # a jump to the next row or column
    collection = require("matplotlib.collections", "train").LineCollection
    axes.add_collection(collection(lines[~far], colors=colours[:-1][~far], linewidths=1.8, zorder=2))
    axes.add_collection(collection(lines[far], colors=colours[:-1][far], linewidths=0.8, linestyles=":", zorder=2))
    if numbered:
        axes.scatter(*places.T, s=130, c=colours, edgecolors="white", linewidths=0.8, zorder=3)
        for step, place in enumerate(places):
            ink = "white" if step < LIGHT_FROM * steps else "black"
            axes.text(*place, str(step + 1), color=ink, fontsize=6.5, ha="center", va="center", zorder=4)
    else:
        ends = {"s": 28, "edgecolors": "black", "linewidths": 0.8, "zorder": 3}
        axes.scatter(*places[:1].T, c=colours[:1], marker="o", **ends)
        axes.scatter(*places[-1:].T, c=colours[-1:], marker="s", **ends)


def save_route_animation(
    routes: str,
    height: int,
    width: int,
    path: str | Path,
    *,
    picture: Image.Image | None = None,
    panel: int = 200,
    milliseconds: int = 120,
) -> int:
    """Write a GIF of the K routes walking side by side; cells visited take the colour of their step.

    Args:
        routes, height, width, picture: as in `route_figure`.
        path: of the GIF.
        panel: width of a route's panel in pixels. milliseconds: a frame is shown; the last one stays longer.

    Returns:
        The number of frames, at most 65: on a large grid a frame is several steps.

    Raises:
        ValueError: as `route_figure`. OSError: the file could not be written.
    """
    walks = route_walks(routes, height, width)
    _check_drawable(height, width)
    colormap = require("matplotlib", "train").colormaps[COLOUR_MAP]
    # with cascade2d all rows walk at the same time, so a frame is a step in each of them
    longest = max(len(walk) for parts in walks for walk in parts)
    stops = sorted({round(s) for s in np.linspace(0, longest, min(longest, FRAMES) + 1)})
    colours = [tuple(round(255 * c) for c in colormap(i / max(longest - 1, 1))[:3]) for i in range(longest)]
    frames = list(_frames(walks, stops, colours, route_names(routes), (height, width), picture, panel))
    durations = [milliseconds] * (len(frames) - 1) + [max(1500, milliseconds)]
    # one palette for all frames, of the last one, which has every colour: only what changes is stored then
    palette = frames[-1].quantize(256, Image.Quantize.MAXCOVERAGE)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    write_aside(
        path,
        lambda aside: first.save(aside, format="GIF", save_all=True, append_images=others, duration=durations, loop=0),
    )
    return len(frames)


def _frames(
    walks: list[list[np.ndarray]],
    stops: list[int],
    colours: list[tuple[int, int, int]],
    names: list[str],
    grid: tuple[int, int],
    picture: Image.Image | None,
    panel: int,
) -> Iterator[Image.Image]:
    """A frame for each of `stops`: every walk after that many steps."""
    height, width = grid
    cell = max(2, panel // max(height, width))
    size = (cell * width, cell * height)
    pitch = max(size[0], NAME_WIDTH) + GAP
    corners = [(GAP + k * pitch, GAP + NAME_HEIGHT) for k in range(len(walks))]
    canvas = Image.new("RGB", (pitch * len(walks) + GAP, size[1] + NAME_HEIGHT + 2 * GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for (left, top), name in zip(corners, names, strict=True):
        draw.text((left, GAP), name, font=ImageFont.load_default(size=12), fill="black")
        if picture is not None:
            canvas.paste(Image.blend(picture.resize(size), Image.new("RGB", size, "white"), 0.35), (left, top))
    font = ImageFont.load_default(size=max(8, min(13, cell // 3))) if height * width <= NUMBERED else None
    inset = 0 if picture is None else cell // 4
    for before, stop in zip([0, *stops], stops, strict=False):
        for (left, top), parts in zip(corners, walks, strict=True):
            for walk in parts:
                for step, (row, column) in enumerate(walk[before:stop].tolist(), before):
                    x, y = left + column * cell, top + row * cell
                    square = (x + inset, y + inset, x + cell - 1 - inset, y + cell - 1 - inset)
                    draw.rectangle(square, fill=colours[step])
                    if font is not None:
                        ink = "white" if step < LIGHT_FROM * len(colours) else "black"
                        draw.text((x + cell / 2, y + cell / 2), str(step + 1), font=font, fill=ink, anchor="mm")
        frame = canvas.copy()
        above = ImageDraw.Draw(frame)
        for (left, top), parts in zip(corners, walks, strict=True):
            _draw_grid(above, (left, top), grid, cell)
            for walk in parts:
                if 0 < stop <= len(walk):
                    row, column = walk[stop - 1].tolist()
                    x, y = left + column * cell, top + row * cell
                    above.rectangle((x, y, x + cell, y + cell), outline=MARKER, width=max(2, cell // 10))
        yield frame


def _draw_grid(draw: ImageDraw.ImageDraw, corner: tuple[int, int], grid: tuple[int, int], cell: int) -> None:
    (left, top), (height, width) = corner, grid
    every = 1 if cell >= 6 else max(grid)  # narrow cells: the outline alone
    for i in range(0, height + 1, min(every, height)):
        draw.line((left, top + i * cell, left + width * cell, top + i * cell), fill="#999999")
    for j in range(0, width + 1, min(every, width)):
        draw.line((left + j * cell, top, left + j * cell, top + height * cell), fill="#999999")


def _check_drawable(height: int, width: int) -> None:
    if max(height, width) > LARGEST_DRAWN:
        raise ValueError(f"a grid of {height} x {width} is too large to be drawn: at most {LARGEST_DRAWN} cells a side")
