"""Curves of figures against the size of the image, as PNG or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .._figures import new_figure
from .charts import COLOURS
from .figures import figure_files, write_figure

__all__ = ["Curve", "Plot", "save_curves"]

# told apart where colours are not; in the order of COLOURS
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))


class Curve(NamedTuple):
    """One series: its name, which has one colour and marker in all plots, what the legend adds, and its points."""

    series: str
    note: str
    sizes: Sequence[int]
    values: Sequence[float]


class Plot(NamedTuple):
    """One set of axes over image sizes. unit: of the values. log: both axes logarithmic, with guides for values that
    grow with the pixels and with their square; else the values' axis is linear.
    """

    title: str
    unit: str
    curves: Sequence[Curve]
    log: bool = True


def save_curves(plots: Sequence[Plot], heading: str, footnote: str, path: Path) -> None:
    """Draw plots, two in a row.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        OSError: the file could not be written.
        ValueError: `path` has another ending than .png or .svg; without one both are written.
    """
    files = figure_files(path)
    series = list(dict.fromkeys(curve.series for plot in plots for curve in plot.curves))
    rows = -(-len(plots) // 2)
    figure = new_figure(11, 4.3 * rows + 0.8)
    figure.suptitle(heading, fontsize=11)
    grid = figure.subplots(rows, min(2, len(plots)), squeeze=False).ravel()
    for axes, plot in zip(grid, plots, strict=False):
        draw(axes, plot, series)
    for axes in grid[len(plots) :]:
        axes.remove()
    figure.supxlabel(footnote, fontsize=7)
    write_figure(figure, files)


def draw(axes, plot: Plot, series: Sequence[str]) -> None:
    """Draw one plot; `series` gives every name its colour, marker and line."""
    for curve in plot.curves:
        i = series.index(curve.series)
        axes.plot(
            curve.sizes,
            curve.values,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=LINES[i % len(LINES)],
            markersize=5,
            linewidth=1.5,
            label=f"{curve.series} {curve.note}".rstrip(),
        )
    sizes = sorted({size for curve in plot.curves for size in curve.sizes})
    if plot.log and plot.curves:
        _draw_guides(axes, plot, sizes)
        axes.set_xscale("log")
        axes.set_yscale("log")
        values = [value for curve in plot.curves for value in curve.values]
        axes.set_ylim(min(values) / 3, 6 * max(values))  # guides run out at the top; the legend has its place there
    # the sizes themselves, but for those whose labels would touch the one before on a logarithmic axis
    ticks: list[int] = []
    for size in sizes:
        if not ticks or size >= 1.12 * ticks[-1]:
            ticks.append(size)
    axes.set_xticks(ticks, [str(size) for size in ticks], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title(plot.title, fontsize=10, loc="left")
    axes.set_xlabel("height and width of the image, px", fontsize=8)
    axes.set_ylabel(plot.unit, fontsize=8)
    axes.grid(True, which="major", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if plot.curves:
        axes.legend(fontsize=7, frameon=False)


def _draw_guides(axes, plot: Plot, sizes: Sequence[int]) -> None:
    """Grey lines from below the lowest first point."""
    firsts = [curve.values[0] for curve in plot.curves if curve.sizes and curve.sizes[0] == sizes[0]]
    if len(sizes) < 2 or not firsts:
        return
    ends = (sizes[0], sizes[-1])
    for power, style, label in ((1, (0, (2, 2)), "linear in pixels"), (2, (0, (1, 1)), "quadratic")):
        values = [0.6 * min(firsts) * (size / ends[0]) ** (2 * power) for size in ends]
        axes.plot(ends, values, color="0.6", linewidth=1, linestyle=style, label=label)
