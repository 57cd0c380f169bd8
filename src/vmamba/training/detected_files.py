"""A trained detector at work: loaded with what it knows, and measured on annotated images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._devices import choose_device
from ..data import (
    AnnotatedImages,
    Category,
    CocoDataset,
    coco_categories,
    collate_detection,
    detection_evaluation_transform,
    open_detection,
    read_coco,
)
from ..data.loading import ordered_loader
from ..models.detection import MaskRCNN, load_detector
from ..tasks import AveragePrecision, Detection, write_results
from .checkpoints import About, about_of, load_trained
from .evaluation import evaluate

__all__ = ["DetectionResult", "evaluate_detection", "load_trained_detector"]

COCO_CLASSES = 80
SHOWN_CATEGORIES = 5  # in a message


@dataclass(frozen=True)
class DetectionResult:
    """AP of a checkpoint on ``images`` images of ``data``, in percent: of boxes, and of masks where it finds any.

    ``files`` are the result files that were written, by kind.
    """

    data: str
    images: int
    max_dets: int
    precision: dict[str, AveragePrecision]
    files: dict[str, Path]


def load_trained_detector(
    checkpoint: str | Path, backbone: str | None = None, **options: Any
) -> tuple[MaskRCNN, tuple[Category, ...] | None, About | None]:
    """A detector in evaluation mode on the CPU, its categories, and what it knows of itself, where it is of a run.

    Args:
        checkpoint: a run directory or a checkpoint of one, or any file that `load_detector` takes, with ``backbone``.
        options: of `mask_rcnn`, in place of those that a run was trained with, or of the published ones.

    Returns:
        The detector; its categories, None where a file does not tell (a detector of 80 classes is taken for COCO's);
        and `About`, None for a file of no run.

    Raises:
        FileNotFoundError, ValueError: there is no such run or file, or it is no detector.
    """
    path = Path(checkpoint)
    if path.is_dir() or (path.is_file() and about_of(path) is not None):
        model, about = load_trained(path, task="detection", **options)
        return model, tuple(map(Category, about.category_ids, about.classes)), about
    model = load_detector(path, backbone, **options)
    return model, coco_categories() if model.classes == COCO_CLASSES else None, None


def evaluate_detection(
    checkpoint: str | Path,
    data: str | Path | None = None,
    annotations: str | Path | None = None,
    *,
    backbone: str | None = None,
    max_dets: int | None = None,
    results: str | Path | None = None,
    workers: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    on_finding: str = "skip",
    **options: Any,
) -> DetectionResult:
    """Measure a detector by COCO's average precision, image by image.

    Args:
        checkpoint, backbone, options: as `load_trained_detector`.
        data: with ``annotations`` the folder that their file names are relative to; without, one that `open_detection`
            knows, of which the test part is taken, or the validation part where there is none. None for what a run was
            trained on.
        annotations: a COCO file.
        max_dets: detections an image that are reported and count; a run's own number, or COCO's 100, by default.
        results: a folder for ``boxes.json`` and ``masks.json``, COCO's result files.
        on_finding: as of `CocoDataset`.

    Raises:
        FileNotFoundError, ValueError: checkpoint, data or device are missing or do not fit together.
    """
    device = choose_device(device)
    if max_dets is not None:
        options["max_detections"] = max_dets
    model, categories, about = load_trained_detector(checkpoint, backbone, **options)
    where, part = _images(data, annotations, about)
    known = part.coco.categories if categories is None else categories
    if len(known) != model.classes:
        raise ValueError(f"{part.coco.file} has {len(known)} categories, but the detector knows {model.classes}")
    if others := sorted(set(part.coco.categories) - set(known)):
        shown = ", ".join(f"{number} {name!r}" for number, name in others[:SHOWN_CATEGORIES])
        raise ValueError(
            f"{part.coco.file} has categories that the detector does not know by this id and name: {shown}"
        )
    masks = model.has_masks and part.coco.has_masks
    dataset = CocoDataset(
        part.images,
        part.coco,
        categories=known,
        masks=masks,
        keep_empty=True,
        on_finding=on_finding,
        transform=detection_evaluation_transform(),
    )
    counted = model.roi_heads.detections_per_img
    task = Detection(part.coco, known, masks=masks, max_dets=counted)
    batches = ordered_loader(dataset.without_masks(), batch_size=1, workers=workers, collate=collate_detection)
    scores = evaluate(model, task, batches, device, precision)
    found = {"box": scores.boxes} | ({"mask": scores.masks} if masks else {})
    files = {}
    if results is not None:
        folder = Path(results)
        folder.mkdir(parents=True, exist_ok=True)
        for kind, name in (("box", "boxes.json"), ("mask", "masks.json")):
            if kind in found:
                files[kind] = folder / name
                write_results(found[kind], files[kind])
    return DetectionResult(
        where, len(dataset), counted, {kind: scores.average_precision(kind) for kind in found}, files
    )


def _images(
    data: str | Path | None, annotations: str | Path | None, about: About | None
) -> tuple[str, AnnotatedImages]:
    """What to measure on, in words and as it is."""
    if annotations is not None:
        if data is None:
            raise ValueError(f"name the folder of the images of {annotations} with --data")
        return str(annotations), AnnotatedImages(Path(data), read_coco(annotations))
    split = {}
    if data is None:
        if about is None:
            raise ValueError("the checkpoint does not say what it was trained on: name annotated images with --data")
        trained_on = about.config["data"]
        data, split = trained_on["source"], {name: trained_on[name] for name in ("val_fraction", "split_seed")}
    parts = open_detection(data, **split)
    part = parts.get("test", parts["val"])
    return str(part.coco.file), part
