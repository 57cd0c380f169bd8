"""What figures for a paper have in common: colours, files as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .._files import write_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOUR_MAP", "save_figure"]

COLOUR_MAP = "viridis"  # even steps of lightness, the same to every kind of colour vision, readable in grey
DOTS_PER_INCH = 200


def save_figure(figure: Figure, stem: str | Path) -> tuple[Path, Path]:
    """Write `stem`.png and `stem`.svg; returns both paths.

    Raises:
        OSError: a file could not be written.
    """
    stem = Path(stem)
    png, svg = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg"))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not for every file again
    write_aside(png, lambda aside: figure.savefig(aside, format="png", dpi=DOTS_PER_INCH))
    # without a date the same figure is the same file
    write_aside(svg, lambda aside: figure.savefig(aside, format="svg", dpi=DOTS_PER_INCH, metadata={"Date": None}))
    return png, svg
