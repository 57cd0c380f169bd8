"""Tensors in, tensors out: the selective scan and SS2D, their definition and their backends. Knows torch only."""

from .dispatch import backends
from .functional import selective_scan, ss2d
from .routes import ROUTES

__all__ = ["ROUTES", "backends", "selective_scan", "ss2d"]
