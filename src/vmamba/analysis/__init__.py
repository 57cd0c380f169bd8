"""Figures about networks and operators, measured and drawn."""

from .complexity import Complexity, detector_macs, measure_complexity
from .operator_speed import OperatorReport, OperatorSettings, measure_operator
from .throughput import ModelReport, ModelSettings, measure_models

__all__ = [
    "Complexity",
    "ModelReport",
    "ModelSettings",
    "OperatorReport",
    "OperatorSettings",
    "detector_macs",
    "measure_complexity",
    "measure_models",
    "measure_operator",
]
