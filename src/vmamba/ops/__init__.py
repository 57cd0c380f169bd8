"""Tensors in, tensors out: the selective scan and SS2D, their definition and their backends. Knows torch only."""

from .functional import selective_scan, ss2d
from .routes import ROUTES

__all__ = ["ROUTES", "selective_scan", "ss2d"]
