"""Tasks: loss, metrics and optimiser as plain functions of a model and a batch; no framework."""

from .average_precision import (
    AveragePrecision,
    as_coco,
    average_precision,
    box_results,
    mask_results,
    read_results,
    write_results,
)
from .classification import Classification, ClassificationScores, confusion_matrix, top_k_hits
from .detection import Detection, DetectionScores, detect
from .optimisation import make_optimizer, warmup_cosine
from .task import Scores, Task

__all__ = [
    "AveragePrecision",
    "Classification",
    "ClassificationScores",
    "Detection",
    "DetectionScores",
    "Scores",
    "Task",
    "as_coco",
    "average_precision",
    "box_results",
    "confusion_matrix",
    "detect",
    "make_optimizer",
    "mask_results",
    "read_results",
    "top_k_hits",
    "warmup_cosine",
    "write_results",
]
