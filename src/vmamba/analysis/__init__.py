"""Figures about networks and operators, measured and drawn."""

from .complexity import Complexity, ModuleCount, count_modules, detector_macs, measure_complexity
from .detection_pictures import draw_detections
from .ladder import RUNGS, LadderReport, climb_ladder, make_rung
from .operator_speed import OperatorReport, OperatorSettings, measure_operator
from .scaling import ScalingReport, accuracy_by_size, fit_slope, measure_scaling
from .throughput import ModelReport, ModelSettings, measure_models

__all__ = [
    "RUNGS",
    "Complexity",
    "LadderReport",
    "ModelReport",
    "ModelSettings",
    "ModuleCount",
    "OperatorReport",
    "OperatorSettings",
    "ScalingReport",
    "accuracy_by_size",
    "climb_ladder",
    "count_modules",
    "detector_macs",
    "draw_detections",
    "fit_slope",
    "make_rung",
    "measure_complexity",
    "measure_models",
    "measure_operator",
    "measure_scaling",
]
