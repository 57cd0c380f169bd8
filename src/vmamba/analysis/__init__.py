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
from .complexity import Complexity, ModuleCount, count_modules, detector_macs, measure_complexity
from .ladder import RUNGS, LadderReport, climb_ladder, make_rung
from .operator_speed import OperatorReport, OperatorSettings, measure_operator
from .receptive_field import Area, ReceptiveField, effective_receptive_field
from .route_pictures import route_figure, route_walks, save_route_animation
from .scaling import ScalingReport, accuracy_by_size, fit_slope, measure_scaling
from .throughput import ModelReport, ModelSettings, measure_models

__all__ = [
    "RUNGS",
    "Area",
    "AttentionMap",
    "Complexity",
    "LadderReport",
    "ModelReport",
    "ModelSettings",
    "ModuleCount",
    "OperatorReport",
    "OperatorSettings",
    "ReceptiveField",
    "RoutedScan",
    "ScalingReport",
    "StateDecay",
    "accuracy_by_size",
    "attention_map",
    "attention_matrix",
    "climb_ladder",
    "count_modules",
    "detector_macs",
    "effective_receptive_field",
    "fit_slope",
    "make_rung",
    "measure_complexity",
    "measure_models",
    "measure_operator",
    "measure_scaling",
    "route_figure",
    "route_walks",
    "routed_scan",
    "save_route_animation",
    "scan_attention",
    "scan_of_layer",
    "ss2d_layers",
    "state_decay",
]
