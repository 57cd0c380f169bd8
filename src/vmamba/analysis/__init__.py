"""Figures about networks and operators, measured and drawn."""

from .complexity import Complexity, measure_complexity
from .operator_speed import OperatorReport, OperatorSettings, measure_operator
from .throughput import ModelReport, ModelSettings, measure_models

__all__ = [
    "Complexity",
    "ModelReport",
    "ModelSettings",
    "OperatorReport",
    "OperatorSettings",
    "measure_complexity",
    "measure_models",
    "measure_operator",
]
