"""Semantic segmentation: cross-entropy with an auxiliary head, mean intersection over union, accuracy by class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._devices import constant
from ..data.segmentation import IGNORED
from .classification import confusion_matrix
from .segmentation_inference import SegmentationInference, class_scores
from .task import Chart

__all__ = [
    "Segmentation",
    "SegmentationScores",
    "class_accuracy",
    "class_iou",
    "pixel_confusion",
    "pixel_cross_entropy",
]

Batch = tuple[Tensor, Tensor]


def pixel_cross_entropy(scores: Tensor, masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the labelled pixels; 0 where there are none.

    Args:
        scores: (B, classes, h, w); resized bilinearly where the masks have another size.
        masks: (B, H, W) int64, `IGNORED` (255) for no label.
        weights: (classes,) fp32, what a pixel of each class counts in the mean; None: all count the same.
    """
    if scores.shape[2:] != masks.shape[1:]:
        scores = F.interpolate(scores, size=masks.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(scores.float(), masks, weights, ignore_index=IGNORED, reduction="sum")
    labelled = masks != IGNORED
    if weights is None:
        return total / labelled.sum().clamp(min=1)
    counted = weights[masks.where(labelled, 0)].where(labelled, 0.0).sum()
    return total / counted.clamp(min=weights.min())


def pixel_confusion(masks: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts of labelled pixels (true class, predicted class), (classes, classes) int64, from two equal shapes."""
    labelled = masks != IGNORED
    return confusion_matrix(masks[labelled], predicted[labelled], classes)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of every class, (classes,) fp64; NaN for one neither labelled nor predicted."""
    hits = confusion.diagonal().double()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


def class_accuracy(confusion: Tensor) -> Tensor:
    """Share of every class's pixels that were recognised, (classes,) fp64; NaN for one without any."""
    return confusion.diagonal().double() / confusion.sum(1)


class SegmentationScores:
    """Loss, mean IoU, mean accuracy and pixel accuracy in percent, and the confusion matrix behind them.

    A mean is over the classes that occur: labelled or predicted for IoU, labelled for accuracy. The loss is the mean
    over all labelled pixels of all images.
    """

    def __init__(self, classes: int, inference: SegmentationInference | None = None) -> None:
        self.classes = classes
        self.inference = inference
        self._loss = 0.0
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64)

    def update(self, model: nn.Module, batch: Batch) -> None:
        """Add images (B, 3, H, W) with masks (B, H', W') int64: scores are compared at the masks' size."""
        images, masks = batch
        scores = class_scores(model, images, self.inference, masks.shape[1:])
        self._loss += float(F.cross_entropy(scores, masks, ignore_index=IGNORED, reduction="sum"))
        self._confusion += pixel_confusion(masks, scores.argmax(dim=1), self.classes).cpu()

    def merge(self, other: SegmentationScores) -> None:
        """Add what another process has evaluated."""
        self._loss += other._loss
        self._confusion += other._confusion

    def confusion(self) -> Tensor:
        """Counts of labelled pixels (true class, predicted class), (classes, classes) int64."""
        return self._confusion

    def compute(self) -> dict[str, float]:
        """``{"loss", "miou", "macc", "accuracy"}``. ValueError when no labelled pixel was added."""
        pixels = int(self._confusion.sum())
        if not pixels:
            raise ValueError("no labelled pixel was evaluated")
        return {
            "loss": self._loss / pixels,
            "miou": 100 * float(class_iou(self._confusion).nanmean()),
            "macc": 100 * float(class_accuracy(self._confusion).nanmean()),
            "accuracy": 100 * int(self._confusion.trace()) / pixels,
        }

    def by_class(self) -> list[dict[str, float]]:
        """For every class ``{"iou", "accuracy", "pixels"}``: percent, NaN where it does not occur; labelled pixels."""
        columns = (100 * class_iou(self._confusion), 100 * class_accuracy(self._confusion), self._confusion.sum(1))
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [dict(zip(("iou", "accuracy", "pixels"), row, strict=True)) for row in rows]


@dataclass(frozen=True)
class Segmentation:
    """The task, for ``classes`` classes.

    The model gives scores (B, classes, h, w), or in training a pair with those of an auxiliary head, whose loss counts
    ``auxiliary_weight``. ``inference``: how images are looked at in evaluation. ``class_weights``: what a pixel of each
    class counts in the losses of training; None: all count the same.

    Raises:
        ValueError: fewer than two classes, a negative weight, or not a positive weight for every class.
    """

    classes: int
    auxiliary_weight: float = 0.4
    inference: SegmentationInference | None = None
    class_weights: tuple[float, ...] | None = None

    metric: ClassVar[str] = "miou"
    figures: ClassVar[Mapping[str, str]] = {"miou": "mean IoU", "macc": "mean accuracy", "accuracy": "pixel accuracy"}
    chart: ClassVar[Chart] = Chart(
        "iou.png", "Mean IoU", "validation (%)", {"miou": "mean IoU", "macc": "mean accuracy"}
    )
    loss_axis: ClassVar[str] = "cross-entropy a pixel (nats)"
    trains_at_one_size: ClassVar[bool] = True
    evaluates_at_one_size: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"segmentation needs at least two classes, not {self.classes}")
        if self.auxiliary_weight < 0:
            raise ValueError(f"auxiliary_weight must not be negative, not {self.auxiliary_weight}")
        weights = self.class_weights
        if weights is not None and (len(weights) != self.classes or min(weights) <= 0):
            raise ValueError(f"class_weights must be {self.classes} positive numbers, not {weights}")

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of both heads; images (B, 3, H, W), masks (B, H, W) int64."""
        images, masks = batch
        weights = None
        if self.class_weights is not None:
            weights = constant(self.class_weights, torch.float32, masks.device)
        scores = model(images)
        if isinstance(scores, Tensor):
            return pixel_cross_entropy(scores, masks, weights)
        main, auxiliary = (pixel_cross_entropy(each, masks, weights) for each in scores)
        return main + self.auxiliary_weight * auxiliary

    def scores(self) -> SegmentationScores:
        return SegmentationScores(self.classes, self.inference)
