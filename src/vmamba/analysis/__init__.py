"""Figures about networks and operators, measured and drawn."""

from .complexity import Complexity, ModuleCount, count_modules, detector_macs, measure_complexity
from .detection_pictures import draw_detections
from .operator_speed import OperatorReport, OperatorSettings, measure_operator
from .throughput import ModelReport, ModelSettings, measure_models

__all__ = [
    "Complexity",
    "ModelReport",
    "ModelSettings",
    "ModuleCount",
    "OperatorReport",
    "OperatorSettings",
    "count_modules",
    "detector_macs",
    "draw_detections",
    "measure_complexity",
    "measure_models",
    "measure_operator",
]
