"""Figures about networks and operators, measured and drawn."""

from .detector_flops import detector_macs
from .operator_speed import OperatorReport, OperatorSettings, measure_operator
from .throughput import ModelReport, ModelSettings, measure_models

__all__ = [
    "ModelReport",
    "ModelSettings",
    "OperatorReport",
    "OperatorSettings",
    "detector_macs",
    "measure_models",
    "measure_operator",
]
