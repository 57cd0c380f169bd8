"""A trained segmentation model at work: measured on a labelled data set, or on photos, written as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from .._devices import check_device
from ..data import list_images, read_image
from ..data.segmentation import (
    ADE20K_CLASSES,
    SegmentationSource,
    TransformedMasks,
    open_segmentation,
    segmentation_evaluation_transform,
)
from ..models import UPerNet, upernet_from_checkpoint
from ..tasks import SegmentationInference, SegmentationScores, segment
from .segmentation_pictures import ClassShare, class_shares, save_index_mask, save_legend, save_overlay

__all__ = ["SegmentationResult", "Segmented", "evaluate_segmentation", "segment_files"]


@dataclass(frozen=True)
class SegmentationResult:
    """Metrics of a checkpoint on ``images`` images: those of `SegmentationScores`, and by class, in percent."""

    part: str
    images: int
    classes: tuple[str, ...]
    metrics: dict[str, float]
    by_class: tuple[dict[str, float], ...]


@dataclass(frozen=True)
class Segmented:
    """One segmented photo: the files written for it and the classes in it, the largest first."""

    image: Path
    mask: Path
    overlay: Path
    legend: Path
    classes: tuple[ClassShare, ...]


def segment_files(
    checkpoint: str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    backbone: str | None = None,
    classes: Sequence[str] | None = None,
    inference: SegmentationInference | None = None,
    opacity: float = 0.55,
    device: str = "cpu",
) -> list[Segmented]:
    """Segment image files, and the images directly in the folders, among ``images``.

    For ``a.jpg`` writes into ``out``: ``a.mask.png`` (pixel values are class indices), ``a.overlay.png`` and
    ``a.legend.png``.

    Args:
        checkpoint, backbone: as `upernet_from_checkpoint`.
        classes: names; by default ADE20K's for 150 classes, otherwise numbers.
        inference: how photos are looked at; whole and at their size by default.
        opacity: of the colours in the overlay, 0 to 1.

    Raises:
        FileNotFoundError, ValueError: checkpoint, device, class names or an image are missing or do not fit; two images
            would write the same files. Nothing is written before all arguments are looked at.
    """
    files = _apart(list_images(images))
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must lie between 0 and 1, not {opacity}")
    model = _load(checkpoint, backbone, device)
    names = _names(classes, model.num_classes)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    normalise = segmentation_evaluation_transform()
    results = []
    for file in files:
        photo = read_image(file)
        pixels, _ = normalise(photo, np.zeros((photo.height, photo.width), dtype=np.uint8))
        with torch.inference_mode():
            mask = segment(model, pixels[None].to(device), inference)[0].cpu().numpy()
        paths = {kind: out / f"{file.stem}.{kind}.png" for kind in ("mask", "overlay", "legend")}
        save_index_mask(mask, len(names), paths["mask"])
        save_overlay(photo, mask, names, paths["overlay"], opacity)
        save_legend(mask, names, paths["legend"])
        results.append(Segmented(file, **paths, classes=tuple(class_shares(mask, names))))
    return results


def evaluate_segmentation(
    checkpoint: str | Path,
    data: str | Path | SegmentationSource,
    *,
    backbone: str | None = None,
    inference: SegmentationInference | None = None,
    workers: int = 0,
    device: str = "cpu",
) -> SegmentationResult:
    """Measure a checkpoint on the test images of a data set, or on its validation images where it has no others.

    Images are taken one by one, since their sizes differ, and compared at the size of their masks.

    Args:
        checkpoint, backbone: as `upernet_from_checkpoint`.
        data: as `open_segmentation`.
        inference: how images are looked at; whole and at their size by default.
        workers: loading processes.

    Raises:
        FileNotFoundError, ValueError: checkpoint, data or device are missing or do not fit together; a file is damaged.
    """
    splits = open_segmentation(data)
    part, samples = ("test", splits.test) if splits.test is not None else ("validation", splits.val)
    model = _load(checkpoint, backbone, device)
    if model.num_classes != len(splits.classes):
        raise ValueError(f"the model knows {model.num_classes} classes, the data has {len(splits.classes)}")
    scores = SegmentationScores(model.num_classes, inference)
    loader = DataLoader(TransformedMasks(samples, segmentation_evaluation_transform()), num_workers=workers)
    with torch.inference_mode():
        for batch in loader:
            scores.update(model, tuple(tensor.to(device) for tensor in batch))
    return SegmentationResult(part, len(samples), splits.classes, scores.compute(), tuple(scores.by_class()))


def _load(checkpoint: str | Path, backbone: str | None, device: str) -> UPerNet:
    check_device(device)
    return upernet_from_checkpoint(checkpoint, backbone).to(device)


def _apart(files: Sequence[Path]) -> list[Path]:
    """The files, each once; two of one name would write the same pictures."""
    stems: dict[str, Path] = {}
    for file in files:
        if (other := stems.setdefault(file.stem, file)) != file:
            raise ValueError(f"{other} and {file} would write the same files: segment them into different folders")
    return list(stems.values())


def _names(classes: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if classes is None:
        return ADE20K_CLASSES if count == len(ADE20K_CLASSES) else tuple(f"class {i}" for i in range(count))
    if len(classes) != count:
        raise ValueError(f"{len(classes)} class names are given, the model knows {count} classes")
    return tuple(classes)
