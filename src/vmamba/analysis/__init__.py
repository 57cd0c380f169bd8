"""Figures about networks and operators, measured and drawn."""

from .attention import (
    AttentionMap,
    RoutedScan,
    StateDecay,
    attention_map,
    attention_matrix,
    routed_scan,
    scan_attention,
    scan_of_layer,
    ss2d_layers,
    state_decay,
)
from .complexity import Complexity, detector_macs, measure_complexity
from .operator_speed import OperatorReport, OperatorSettings, measure_operator
from .receptive_field import Area, ReceptiveField, effective_receptive_field
from .route_pictures import route_figure, route_walks, save_route_animation
from .throughput import ModelReport, ModelSettings, measure_models

__all__ = [
    "Area",
    "AttentionMap",
    "Complexity",
    "ModelReport",
    "ModelSettings",
    "OperatorReport",
    "OperatorSettings",
    "ReceptiveField",
    "RoutedScan",
    "StateDecay",
    "attention_map",
    "attention_matrix",
    "detector_macs",
    "effective_receptive_field",
    "measure_complexity",
    "measure_models",
    "measure_operator",
    "route_figure",
    "route_walks",
    "routed_scan",
    "save_route_animation",
    "scan_attention",
    "scan_of_layer",
    "ss2d_layers",
    "state_decay",
]
