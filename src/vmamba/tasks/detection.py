"""Object detection and instance segmentation: the detector's own losses, COCO's average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from ..data import Category, CocoAnnotations
from ..data.packed_masks import unpack_masks
from .average_precision import AveragePrecision, average_precision, box_results, mask_results
from .task import Chart

__all__ = ["Detection", "DetectionScores", "detect"]

Batch = tuple[Sequence[Tensor], Sequence[Mapping[str, Tensor]]]


class DetectionScores:
    """Average precision of boxes, and of masks where there are any, on the images that were added.

    `boxes` and `masks` are COCO's results so far: :func:`~.average_precision.write_results` writes them.
    """

    def __init__(self, task: Detection) -> None:
        self._task = task
        self._images: list[int] = []
        self.boxes: list[dict[str, Any]] = []
        self.masks: list[dict[str, Any]] = []

    def update(self, model: nn.Module, batch: Batch) -> None:
        """Add images (list of (3, H, W) in [0, 1]) with targets that say their `image_id`."""
        images, targets = batch
        for found, target in zip(model(list(images)), targets, strict=True):
            image_id = int(target["image_id"])
            self._images.append(image_id)
            self.boxes += box_results(found, image_id, self._task.categories)
            if self._task.masks:
                self.masks += mask_results(found, image_id, self._task.categories)

    def merge(self, other: DetectionScores) -> None:
        """Add what another process has evaluated."""
        self._images += other._images
        self.boxes += other.boxes
        self.masks += other.masks

    def average_precision(self, kind: str = "box") -> AveragePrecision:
        """Of "box" or "mask". ValueError when nothing was added."""
        if not self._images:
            raise ValueError("no image was evaluated")
        return average_precision(
            self._task.ground_truth,
            self.boxes if kind == "box" else self.masks,
            kind,
            max_dets=self._task.max_dets,
            categories=self._task.categories,
            image_ids=self._images,
        )

    def compute(self) -> dict[str, float]:
        """`box_ap`, `box_ap50`, `box_ap75`, `box_aps`, `box_apm`, `box_apl` in percent, and `mask_...` likewise.

        There is no "loss": a detector in evaluation gives detections, and its losses are of regions drawn at random.
        """
        kinds = ("box", "mask") if self._task.masks else ("box",)
        figures: dict[str, float] = {}
        for kind in kinds:
            figures |= self.average_precision(kind).as_dict(kind)
        return figures


@dataclass(frozen=True)
class Detection:
    """The task: batches are (images, targets) as :func:`vmamba.data.collate_detection` makes them.

    Training takes masks packed, too: see :meth:`~vmamba.data.CocoDataset.with_packed_masks`.

    Attributes:
        ground_truth: the annotations that scores are measured against.
        categories: what the labels 1, 2, ... stand for.
        masks: whether masks are trained and measured, too.
        max_dets: detections an image that count; COCO's own figure is 100. The detector must report as many.

    Raises:
        ValueError: no categories, or no detections to count.
    """

    ground_truth: CocoAnnotations
    categories: tuple[Category, ...]
    masks: bool = True
    max_dets: int = 100

    loss_axis: ClassVar[str] = "sum of the detector's losses"
    trains_at_one_size: ClassVar[bool] = False
    evaluates_at_one_size: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.categories:
            raise ValueError("detection needs at least one category")
        if self.max_dets < 1:
            raise ValueError(f"max_dets must be at least 1, got {self.max_dets}")

    @property
    def metric(self) -> str:
        """What marks the best checkpoint: the AP of masks, or of boxes where there are no masks."""
        return "mask_ap" if self.masks else "box_ap"

    @property
    def figures(self) -> dict[str, str]:
        """All twelve figures of COCO, or the six of boxes."""
        names = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "aps": "AP small", "apm": "AP medium", "apl": "AP large"}
        kinds = ("mask", "box") if self.masks else ("box",)
        return {f"{kind}_{name}": f"{kind} {shown}" for kind in kinds for name, shown in names.items()}

    @property
    def chart(self) -> Chart:
        """AP of masks and boxes."""
        curves = {name: shown for name, shown in self.figures.items() if name.endswith("_ap")}
        return Chart("ap.png", "Average precision", "validation (%)", curves)

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the detector's losses: objectness and boxes of proposals, classes, boxes and masks of regions."""
        images, targets = batch
        targets = [
            target | {"masks": unpack_masks(target["packed_masks"], len(target["labels"]))}
            if "packed_masks" in target
            else target
            for target in targets
        ]
        return sum(model(list(images), targets).values())

    def scores(self) -> DetectionScores:
        return DetectionScores(self)


def detect(detector: nn.Module, image: Image.Image) -> dict[str, Tensor]:
    """What a detector finds in a picture, on the CPU.

    Args:
        detector: in evaluation mode, on any device.
        image: RGB.

    Returns:
        `boxes`, `labels`, `scores` and `masks` as the detector gives them.
    """
    device = next(detector.parameters()).device
    with torch.inference_mode():
        (found,) = detector([pil_to_tensor(image).to(device).float() / 255])
    return {name: tensor.cpu() for name, tensor in found.items()}
