"""Tensors in, tensors out: selective scan, SS2D, its convolution; their definition and backends. Knows torch only."""

from .dispatch import backends
from .functional import depthwise_conv3x3, selective_scan, ss2d
from .routes import ROUTES

__all__ = ["ROUTES", "backends", "depthwise_conv3x3", "selective_scan", "ss2d"]
