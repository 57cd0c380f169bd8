"""What all figures drawn by matplotlib have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by every common kind of colour vision, and in grey by their lightness
BLUE, ORANGE, GREEN, PURPLE, SKY_BLUE, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"


def new_figure(width: float, height: float) -> Figure:
    """A figure of that size in inches; it draws with Agg and leaves pyplot's global state alone.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    return require("matplotlib.figure", "train").Figure(figsize=(width, height), layout="constrained")
