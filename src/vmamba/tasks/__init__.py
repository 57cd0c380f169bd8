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
from .optimisation import make_optimizer, warmup_cosine, warmup_polynomial, warmup_steps
from .segmentation import Segmentation, SegmentationScores, class_accuracy, class_iou
from .segmentation_inference import (
    ADE20K_MULTI_SCALE,
    ADE20K_SINGLE_SCALE,
    SegmentationInference,
    class_scores,
    segment,
)
from .task import Chart, Scores, Task

__all__ = [
    "ADE20K_MULTI_SCALE",
    "ADE20K_SINGLE_SCALE",
    "AveragePrecision",
    "Chart",
    "Classification",
    "ClassificationScores",
    "Detection",
    "DetectionScores",
    "Scores",
    "Segmentation",
    "SegmentationInference",
    "SegmentationScores",
    "Task",
    "as_coco",
    "average_precision",
    "box_results",
    "class_accuracy",
    "class_iou",
    "class_scores",
    "confusion_matrix",
    "detect",
    "make_optimizer",
    "mask_results",
    "read_results",
    "segment",
    "top_k_hits",
    "warmup_cosine",
    "warmup_polynomial",
    "warmup_steps",
    "write_results",
]
