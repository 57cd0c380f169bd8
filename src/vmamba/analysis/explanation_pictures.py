"""Figures of receptive fields and of the attention of SS2D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .._figures import BLUE, GREEN, ORANGE, PURPLE, VERMILLION, new_figure
from ..ops import ROUTES
from .attention import AttentionMap, StateDecay
from .figures import COLOUR_MAP
from .receptive_field import ReceptiveField

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

__all__ = ["QUANTITIES", "attention_figure", "decay_figure", "receptive_field_figure", "route_names"]

FIELD_DECADES = 4  # of the receptive field's colours, down from its strongest pixel
MAP_DECADES = 3
LONGEST_SIDE = 640  # pixels of a picture under the maps: a panel is 350 dots wide
MARKER = VERMILLION  # which viridis does not have
LINES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"))

QUANTITIES = {
    "activation": "contribution to the query pixel's output, |weight × input|, mean over channels",
    "attention": "attention of the query pixel to every pixel, |weight|, mean over channels",
    "similarity": r"similarity |C · B| of the query pixel with every pixel its walk has read ($QK^\mathsf{T}$)",
    "decay": "what is left of a pixel's state when the walk arrives at the query pixel",
}
OF_ALL_ROUTES = ("activation", "attention")  # which have a map of all routes together, too


def route_names(routes: str) -> list[str]:
    """What to call the K routes of a set, such as "1: rows"."""
    if routes == "cascade2d":
        names = ["rows", "rows, reversed", "then columns", "then columns, reversed"]
    else:
        names = [f"{route.order}s{', reversed' if route.reverse else ''}" for route in ROUTES[routes]]
    return [f"route {k}: {name}" for k, name in enumerate(names, 1)]


def receptive_field_figure(fields: Sequence[Sequence[tuple[str, ReceptiveField] | None]]) -> Figure:
    """Receptive fields side by side: rows such as before and after training, a column for each model.

    Args:
        fields: for every panel its title and field; None leaves a gap. All of one picture size, as a rule.
    """
    colors = _colors()
    rows, columns = len(fields), max(map(len, fields))
    height, width = next(f for row in fields for f in row if f)[1].contribution.shape
    panel = 2.6
    figure = new_figure(panel * columns + 1.1, (panel * height / width + 0.75) * rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False)
    norm = colors.LogNorm(10.0**-FIELD_DECADES, 1)
    for axes_row, row in zip(grid, fields, strict=True):
        for axes, field in zip(axes_row, [*row, *[None] * (columns - len(row))], strict=True):
            if field is None:
                axes.set_axis_off()
            else:
                shown = _draw_field(axes, *field, norm)
    _add_colour_bar(figure, grid, shown, "contribution / largest")
    some = next(f for row in fields for f in row if f)[1]
    kind = "positive gradient of positive features" if some.rectified else "|gradient|"
    images = f"{some.images} image{'s' * (some.images > 1)}"
    figure.supxlabel(
        f"{kind} of the layer's centre, mean of {images}; squares hold 50 % (solid) and 99 % (dashed) of it", fontsize=7
    )
    return figure


def _draw_field(axes: Axes, title: str, field: ReceptiveField, norm):
    share = field.contribution / field.contribution.max()
    shown = axes.imshow(np.maximum(share, norm.vmin), norm=norm, cmap=COLOUR_MAP, interpolation="nearest")
    height, width = share.shape
    half, most = field.areas((0.5, 0.99))
    for area, style in ((half, "-"), (most, "--")):
        reach = area.side / 2
        left, right = max(-0.5, field.centre[1] - reach), min(width - 0.5, field.centre[1] + reach)
        top, bottom = max(-0.5, field.centre[0] - reach), min(height - 0.5, field.centre[0] + reach)
        axes.plot(
            [left, right, right, left, left],
            [top, top, bottom, bottom, top],
            style,
            color="white",
            lw=1.1,
            clip_on=False,
        )
    axes.set_title(title, fontsize=8.5)
    axes.set_xlabel(
        "\n".join(
            f"{100 * area.share:g} %: {area.side:g} px wide, {100 * area.square:.3g} % of the picture"
            for area in (half, most)
        ),
        fontsize=6.5,
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return shown


def attention_figure(
    picture: Image.Image, maps: Sequence[tuple[str, AttentionMap]], quantity: str = "activation"
) -> Figure:
    """Maps of one query pixel over the picture: a row for every layer, a column for every route, and all together.

    Every map is shown as a share of its row's largest value, on a logarithmic scale; the query cell is framed.

    Args:
        picture: what the model saw, of its aspect; drawn in grey under the maps.
        maps: for every row its name and map, such as of layers of one network.
        quantity: "activation", "attention", "similarity" or "decay", see `QUANTITIES`.

    Raises:
        ValueError: an unknown quantity.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"unknown quantity {quantity!r}: choose one of {', '.join(QUANTITIES)}")
    colors = _colors()
    picture = picture.copy()
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    has_all = quantity in OF_ALL_ROUTES and all(m.routes != "cascade2d" for _, m in maps)
    columns = 1 + len(maps[0][1].weights) + has_all
    panel = 1.75
    figure = new_figure(panel * columns + 1.1, (panel * picture.height / picture.width + 0.1) * len(maps) + 0.4)
    grid = figure.subplots(len(maps), columns, squeeze=False)
    norm = colors.Normalize(0, 1) if quantity == "decay" else colors.LogNorm(10.0**-MAP_DECADES, 1)
    grey = np.asarray(picture.convert("L"))
    titles = ["picture", *route_names(maps[0][1].routes), *["all routes"] * has_all]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=7.5)
    for axes_row, (name, found) in zip(grid, maps, strict=True):
        shown_maps = _maps_of(found, quantity)
        largest = 1.0 if quantity == "decay" else max(float(m.max()) for m in shown_maps) or 1.0
        axes_row[0].imshow(picture)
        axes_row[0].set_ylabel(f"{name}\n{shown_maps[0].shape[0]} × {shown_maps[0].shape[1]}", fontsize=7.5)
        for axes, values in zip(axes_row, [None, *shown_maps], strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            if values is not None:
                shown = _overlay(axes, grey, values / largest, norm)
            _frame(axes, found.pixel, shown_maps[0].shape, picture.size)
    _add_colour_bar(figure, grid, shown, "share left" if quantity == "decay" else "share of the row's largest")
    figure.supxlabel(QUANTITIES[quantity], fontsize=7)
    return figure


def _add_colour_bar(figure: Figure, grid: np.ndarray, shown, label: str) -> None:
    shrink = min(0.9, 3.0 / figure.get_figheight())  # three inches are enough to read it
    # a logarithmic scale ends somewhere: what is less has its last colour
    extend = "min" if isinstance(shown.norm, _colors().LogNorm) else "neither"
    bar = figure.colorbar(shown, ax=grid.ravel().tolist(), shrink=shrink, aspect=25, pad=0.015, extend=extend)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _maps_of(found: AttentionMap, quantity: str) -> list[np.ndarray]:
    if quantity in OF_ALL_ROUTES:
        weights = quantity == "attention"
        maps = list(found.by_route(weights=weights))
        if found.routes != "cascade2d":
            maps.append(found.all_routes(weights=weights))
    else:
        maps = list(found.similarity.abs() if quantity == "similarity" else found.decay)
    return [m.cpu().numpy() for m in maps]


def _overlay(axes: Axes, grey: np.ndarray, share: np.ndarray, norm):
    """The map over the picture; what contributes nothing at all shows the picture alone."""
    height, width = grey.shape
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    visible = np.ma.masked_where(share <= 0, np.maximum(share, norm.vmin))
    shown = axes.imshow(
        visible, norm=norm, cmap=COLOUR_MAP, alpha=0.72, interpolation="nearest", extent=(0, width, height, 0)
    )
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    return shown


def _frame(axes: Axes, pixel: tuple[int, int], grid: tuple[int, int], size: tuple[int, int]) -> None:
    """A frame around the query's cell, at least as large as to be seen."""
    cell_width, cell_height = size[0] / grid[1], size[1] / grid[0]
    middle = ((pixel[1] + 0.5) * cell_width, (pixel[0] + 0.5) * cell_height)
    reach = [max(cell, 0.04 * max(size)) / 2 for cell in (cell_width, cell_height)]
    xs = [middle[0] + sign * reach[0] for sign in (-1, 1, 1, -1, -1)]
    ys = [middle[1] + sign * reach[1] for sign in (-1, -1, 1, 1, -1)]
    axes.plot(xs, ys, color="white", lw=2.2, clip_on=False)
    axes.plot(xs, ys, color=MARKER, lw=1.2, clip_on=False)


def decay_figure(decays: Sequence[tuple[str, StateDecay]], routes: str) -> Figure:
    """The state's decay along each route, a panel for every layer: mean over channels and states, and its spread.

    Args:
        decays: for every panel its name and the decay.
        routes: the set of routes, for the legend.
    """
    columns = min(4, len(decays))
    rows = -(-len(decays) // columns)
    figure = new_figure(2.5 * columns + 0.6, 2.1 * rows + 0.9)
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes in grid[len(decays) :]:
        axes.set_axis_off()
    for axes, (name, decay) in zip(grid, decays, strict=False):
        steps = decay.steps.numpy()
        for k, ((colour, style), label) in enumerate(zip(LINES, route_names(routes), strict=True)):
            axes.fill_between(steps, decay.low[k].numpy(), decay.high[k].numpy(), color=colour, alpha=0.08, lw=0)
            axes.plot(steps, decay.mean[k].numpy(), style, color=colour, lw=1.4, label=label)
        axes.set_title(name, fontsize=8.5)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("steps ago", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("share of the state left", fontsize=8)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=7.5, frameon=False)
    figure.supxlabel("lines: mean over channels and states; bands: 10th to 90th percentile", fontsize=7)
    return figure


def _colors():
    from .._extras import require

    return require("matplotlib.colors", "train")
