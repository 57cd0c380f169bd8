"""Tasks: loss, metrics and optimiser as plain functions of a model and a batch; no framework."""

from .classification import Classification, ClassificationScores, confusion_matrix, top_k_hits
from .optimisation import make_optimizer, warmup_cosine
from .segmentation import Segmentation, SegmentationScores, class_accuracy, class_iou
from .segmentation_inference import (
    ADE20K_MULTI_SCALE,
    ADE20K_SINGLE_SCALE,
    SegmentationInference,
    class_scores,
    segment,
)
from .task import Scores, Task

__all__ = [
    "ADE20K_MULTI_SCALE",
    "ADE20K_SINGLE_SCALE",
    "Classification",
    "ClassificationScores",
    "Scores",
    "Segmentation",
    "SegmentationInference",
    "SegmentationScores",
    "Task",
    "class_accuracy",
    "class_iou",
    "class_scores",
    "confusion_matrix",
    "make_optimizer",
    "segment",
    "top_k_hits",
    "warmup_cosine",
]
