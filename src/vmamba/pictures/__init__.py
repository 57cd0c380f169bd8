"""Pictures of what networks find: masks, overlays and legends, boxes with names. NumPy and Pillow, no network."""

from .detection import draw_detections
from .segmentation import (
    ClassShare,
    class_colours,
    class_shares,
    draw_overlay,
    save_index_mask,
    save_legend,
    save_overlay,
)

__all__ = [
    "ClassShare",
    "class_colours",
    "class_shares",
    "draw_detections",
    "draw_overlay",
    "save_index_mask",
    "save_legend",
    "save_overlay",
]
