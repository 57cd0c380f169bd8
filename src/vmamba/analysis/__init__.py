"""Figures about networks and operators, measured and drawn."""

from .detection_pictures import draw_detections
from .detector_flops import detector_macs
from .operator_speed import OperatorReport, OperatorSettings, measure_operator
from .throughput import ModelReport, ModelSettings, measure_models

__all__ = [
    "ModelReport",
    "ModelSettings",
    "OperatorReport",
    "OperatorSettings",
    "detector_macs",
    "draw_detections",
    "measure_models",
    "measure_operator",
]
