"""Bar charts of measured figures, as PNG or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .._figures import BLUE, GREEN, ORANGE, PURPLE, SKY_BLUE, VERMILLION, new_figure
from .figures import figure_files, write_figure

__all__ = ["COLOURS", "Bar", "Panel", "save_bars"]

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY_BLUE, VERMILLION)


class Bar(NamedTuple):
    """One bar: its group and series, its length with the range of the samples, or why there is none."""

    group: str
    series: str
    value: float | None
    low: float = 0.0
    high: float = 0.0
    note: str = ""


class Panel(NamedTuple):
    """One set of axes. unit: of the values, with what is better. bars: in the order in which they stand. log: whether
    the axis is logarithmic.
    """

    title: str
    unit: str
    bars: Sequence[Bar]
    log: bool = False


def save_bars(panels: Sequence[Panel], heading: str, footnote: str, path: Path) -> None:
    """Draw horizontal bars, one panel beneath the other, each bar with its value; whiskers from least to most.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        OSError: the file could not be written.
        ValueError: `path` has another ending than .png or .svg; without one both are written.
    """
    files = figure_files(path)
    series = list(dict.fromkeys(bar.series for panel in panels for bar in panel.bars))
    heights = [0.9 + 0.3 * len(panel.bars) for panel in panels]
    figure = new_figure(9.5, sum(heights) + 1.5)
    figure.suptitle(heading, fontsize=11)
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        _draw(axes, panel, series)
    figure.supxlabel(footnote, fontsize=7)
    write_figure(figure, files)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _draw(axes, panel: Panel, series: list[str]) -> None:
    values = [bar for bar in panel.bars if bar.value is not None]
    longest = max((bar.high for bar in values), default=1.0)
    # where bars begin; on a logarithmic axis there is no zero
    start = min((bar.low for bar in values), default=1.0) / 3 if panel.log else 0.0

    def beyond(value: float, share: float) -> float:
        """So far to the right of a value, as a share of the axis."""
        return value * (longest / start) ** share if panel.log else value + share * longest

    groups: dict[str, list[float]] = {}
    named = set()
    y = 0.0
    for bar in panel.bars:
        if groups and bar.group not in groups:
            y += 0.5  # air between groups
        groups.setdefault(bar.group, []).append(y)
        if bar.value is None:
            axes.text(beyond(start, 0.01), y, f"{bar.series}: {bar.note}", va="center", fontsize=7)
        else:
            axes.barh(
                y,
                bar.value - start,
                left=start,
                height=0.85,
                color=COLOURS[series.index(bar.series) % len(COLOURS)],
                label=None if bar.series in named else bar.series,
                xerr=[[bar.value - bar.low], [bar.high - bar.value]] if bar.high > bar.low else None,
                error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "black"},
            )
            named.add(bar.series)
            axes.text(beyond(bar.high, 0.012), y, _short(bar.value), va="center", fontsize=8)
        y += 1
    axes.set_yticks([sum(ys) / len(ys) for ys in groups.values()], list(groups), fontsize=8)
    axes.invert_yaxis()
    if panel.log:
        axes.set_xscale("log")
    axes.set_xlim(start, beyond(longest, 0.12))
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(panel.unit, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if named:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
