"""Image classification: soft-target cross-entropy, mixup and CutMix, top-k accuracy, confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from .task import Chart

Batch = tuple[Tensor, Tensor]


def top_k_hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """How many rows of ``logits`` (B, classes) have their label (B,) among the ``k`` largest entries; int64 scalar."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(dim=1).sum()


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts (true class, predicted class), (classes, classes) int64, from two (B,) integer tensors."""
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


class ClassificationScores:
    """Loss (plain cross-entropy), top-1 and top-5 in percent, confusion matrix and every single prediction.

    What a batch gives stays on its device until somebody asks, so that a GPU is not waited for at every batch.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._losses: list[Tensor] = []
        self._top5: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._predicted: list[Tensor] = []

    def __getstate__(self) -> dict[str, object]:
        # another process may have no such device
        gathered = ("_losses", "_top5", "_labels", "_predicted")
        return self.__dict__ | {name: [tensor.cpu() for tensor in getattr(self, name)] for name in gathered}

    def update(self, model: nn.Module, batch: Batch) -> None:
        """Add images (B, C, H, W) with labels (B,) int64."""
        images, labels = batch
        logits = model(images).float()
        self._losses.append(F.cross_entropy(logits, labels, reduction="sum"))
        self._top5.append(top_k_hits(logits, labels, 5))
        self._labels.append(labels)
        self._predicted.append(logits.argmax(dim=1))

    def merge(self, other: ClassificationScores) -> None:
        """Add what ``other`` gathered; its images come after ours."""
        self._losses += other._losses
        self._top5 += other._top5
        self._labels += other._labels
        self._predicted += other._predicted

    @property
    def labels(self) -> Tensor:
        """The true class of every image so far, (n,) int64, in the order they came."""
        return torch.cat(self._labels).cpu()

    @property
    def predicted(self) -> Tensor:
        """The predicted class of every image so far, (n,) int64."""
        return torch.cat(self._predicted).cpu()

    def confusion(self) -> Tensor:
        """Counts (true class, predicted class), (classes, classes) int64."""
        return confusion_matrix(self.labels, self.predicted, self.classes)

    def compute(self) -> dict[str, float]:
        """``{"loss", "top1", "top5"}``. ValueError when nothing was added."""
        if not self._labels:
            raise ValueError("no image was evaluated")
        images = len(self.labels)
        return {
            "loss": float(torch.stack(self._losses).double().sum()) / images,
            "top1": 100 * int((self.labels == self.predicted).sum()) / images,
            "top5": 100 * int(torch.stack(self._top5).sum()) / images,
        }


@dataclass(frozen=True)
class Classification:
    """The task, for ``classes`` classes.

    ``mixup`` and ``cutmix`` are the alphas of timm's batch-mode Mixup (0: off). A batch is mixed with probability
    ``mix_prob``; with both on, by CutMix with probability ``mix_switch``. Training targets are smoothed by
    ``label_smoothing``.

    Raises:
        ValueError: fewer than two classes, or a value out of range.
    """

    classes: int
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch: float = 0.5

    metric: ClassVar[str] = "top1"
    figures: ClassVar[Mapping[str, str]] = {"top1": "accuracy", "top5": "top-5"}
    chart: ClassVar[Chart] = Chart(
        "accuracy.png", "Accuracy", "validation images right (%)", {"top1": "top-1", "top5": "top-5"}
    )
    loss_axis: ClassVar[str] = "cross-entropy (nats)"
    trains_at_one_size: ClassVar[bool] = True
    evaluates_at_one_size: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"classification needs at least two classes, not {self.classes}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), not {self.label_smoothing}")
        if min(self.mixup, self.cutmix) < 0:
            raise ValueError(f"mixup and cutmix must not be negative: {self.mixup}, {self.cutmix}")

    @property
    def mixes(self) -> bool:
        """Whether training mixes images; batches must then be even."""
        return self.mixup > 0 or self.cutmix > 0

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy with the smoothed, possibly mixed targets; images (B, C, H, W), labels (B,) int64."""
        images, labels = batch
        if self.mixes:
            mix = Mixup(
                self.mixup,
                self.cutmix,
                prob=self.mix_prob,
                switch_prob=self.mix_switch,
                label_smoothing=self.label_smoothing,
                num_classes=self.classes,
            )
            # in place: Mixup would write into a batch that a data loader may still hold in shared memory
            images, targets = mix(images.clone(), labels)
            return F.cross_entropy(model(images).float(), targets)
        return F.cross_entropy(model(images).float(), labels, label_smoothing=self.label_smoothing)

    def scores(self) -> ClassificationScores:
        return ClassificationScores(self.classes)
