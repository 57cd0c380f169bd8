"""Figures about networks and operators, measured and drawn."""

from .operator_speed import OperatorReport, OperatorSettings, measure_operator
from .throughput import ModelReport, ModelSettings, measure_models

__all__ = [
    "ModelReport",
    "ModelSettings",
    "OperatorReport",
    "OperatorSettings",
    "measure_models",
    "measure_operator",
]
