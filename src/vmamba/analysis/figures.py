"""What figures for a paper have in common: colours, resolution, files as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .._extras import require
from .._files import write_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOUR_MAP", "figure_files", "save_figure", "write_figure"]

COLOUR_MAP = "viridis"  # even steps of lightness, the same to every kind of colour vision, readable in grey
DOTS_PER_INCH = 200
KINDS = ("png", "svg")


def figure_files(path: str | Path) -> tuple[Path, ...]:
    """The files that a figure of that name is written to: the one, or a PNG and an SVG if the name has no ending.

    Raises:
        ValueError: it has another ending.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind in KINDS:
        return (path,)
    if kind:
        raise ValueError(f"cannot draw {path}: a figure's name must end in .png or .svg, or have no ending for both")
    return _both(path)


def save_figure(figure: Figure, stem: str | Path) -> tuple[Path, Path]:
    """Write `stem`.png and `stem`.svg; returns both paths.

    Raises:
        OSError: a file could not be written.
    """
    files = _both(Path(stem))
    write_figure(figure, files)
    return files


def write_figure(figure: Figure, files: Sequence[Path]) -> None:
    """Write a figure to files, each a .png or a .svg. The same figure is the same file, whenever it is written.

    Raises:
        OSError: a file could not be written.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not for every file again
    for file in files:
        kind = file.suffix.lower().removeprefix(".")
        options = {"format": kind, "dpi": DOTS_PER_INCH}
        if kind == "svg":
            options["metadata"] = {"Date": None}
        # the salt makes the names of an SVG's parts those of the drawing, not random ones
        with require("matplotlib", "train").rc_context({"svg.hashsalt": "vmamba"}):
            write_aside(file, lambda aside, options=options: figure.savefig(aside, **options))


def _both(stem: Path) -> tuple[Path, Path]:
    png, svg = (stem.with_name(f"{stem.name}.{kind}") for kind in KINDS)
    return png, svg
