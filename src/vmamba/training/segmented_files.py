"""A trained segmentation model at work: measured on a labelled data set, or on photos, written as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from .._devices import choose_device
from ..data import list_images, read_image
from ..data.segmentation import (
    ADE20K_CLASSES,
    SegmentationSource,
    TransformedMasks,
    open_segmentation,
    segmentation_evaluation_transform,
)
from ..models import UPerNet, upernet_from_checkpoint
from ..pictures import ClassShare, class_shares, save_index_mask, save_legend, save_overlay
from ..tasks import Segmentation, SegmentationInference, segment
from .checkpoints import About, about_of, load_trained
from .config import from_dict
from .evaluation import evaluate

__all__ = ["SegmentationResult", "Segmented", "evaluate_segmentation", "load_segmenter", "segment_files"]


@dataclass(frozen=True)
class SegmentationResult:
    """Metrics of a checkpoint on ``images`` images of a part of ``data``: of `SegmentationScores`, and by class."""

    data: str
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
    device: str = "auto",
    overwrite: bool = False,
) -> list[Segmented]:
    """Segment image files, and the images directly in the folders, among ``images``.

    For ``a.jpg`` writes into ``out``: ``a.mask.png`` (pixel values are class indices), ``a.overlay.png`` and
    ``a.legend.png``.

    Args:
        checkpoint, backbone: as `load_segmenter`.
        classes: names; by default those a run was trained with, ADE20K's for 150 classes, otherwise numbers.
        inference: how photos are looked at; by default as a run was evaluated, otherwise whole and at their size.
        opacity: of the colours in the overlay, 0 to 1.
        overwrite: replace pictures that are there already.

    Raises:
        FileExistsError: a picture is there already.
        FileNotFoundError, ValueError: checkpoint, device, class names or an image are missing or do not fit; two images
            would write the same files. Nothing is written before all arguments are looked at.
    """
    files = _apart(list_images(images))
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must lie between 0 and 1, not {opacity}")
    device = choose_device(device)
    out = Path(out)
    targets = {file: _targets(file, out) for file in files}
    if not overwrite:
        for target in (path for paths in targets.values() for path in paths.values()):
            if target.exists():
                raise FileExistsError(f"{target} exists already: choose another folder with --out or add --overwrite")
    model, about = load_segmenter(checkpoint, backbone)
    model.to(device)
    names = _names(about.display_names if classes is None and about else classes, model.num_classes)
    inference = inference or _inference_of(about)
    out.mkdir(parents=True, exist_ok=True)
    normalise = segmentation_evaluation_transform()
    results = []
    for file, paths in targets.items():
        photo = read_image(file)
        pixels, _ = normalise(photo, np.zeros((photo.height, photo.width), dtype=np.uint8))
        with torch.inference_mode():
            mask = segment(model, pixels[None].to(device), inference)[0].cpu().numpy()
        save_index_mask(mask, len(names), paths["mask"])
        save_overlay(photo, mask, names, paths["overlay"], opacity)
        save_legend(mask, names, paths["legend"])
        results.append(Segmented(file, **paths, classes=tuple(class_shares(mask, names))))
    return results


def evaluate_segmentation(
    checkpoint: str | Path,
    data: str | Path | SegmentationSource | None = None,
    *,
    backbone: str | None = None,
    inference: SegmentationInference | None = None,
    workers: int = 0,
    device: str = "auto",
    precision: str = "fp32",
) -> SegmentationResult:
    """Measure a checkpoint on the test images of a data set, or on its validation images where it has no others.

    Images are taken one by one, since their sizes differ, and compared at the size of their masks.

    Args:
        checkpoint, backbone: as `load_segmenter`.
        data: as `open_segmentation`; None for what a run was trained on.
        inference: how images are looked at; by default as a run was evaluated, otherwise whole and at their size.
        workers: loading processes.
        precision: as in :func:`~.evaluation.evaluate`.

    Raises:
        FileNotFoundError, ValueError: checkpoint, data or device are missing or do not fit together; a file is damaged.
    """
    device = choose_device(device)
    model, about = load_segmenter(checkpoint, backbone)
    split = {}
    if data is None:
        if about is None:
            raise ValueError("the checkpoint does not say what it was trained on: name images and masks with --data")
        trained_on = about.config["data"]
        data, split = trained_on["source"], {name: trained_on[name] for name in ("val_fraction", "split_seed")}
    splits = open_segmentation(data, **split)
    part, samples = ("test", splits.test) if splits.test is not None else ("validation", splits.val)
    if model.num_classes != len(splits.classes):
        raise ValueError(f"the model knows {model.num_classes} classes, the data has {len(splits.classes)}")
    if about is not None and about.classes != splits.classes:
        pairs = zip(about.classes, splits.classes, strict=True)
        i, (ours, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(f"the model knows class {i} as {ours!r}, in the data it is {theirs!r}")
    task = Segmentation(model.num_classes, inference=inference or _inference_of(about))
    loader = DataLoader(TransformedMasks(samples, segmentation_evaluation_transform()), num_workers=workers)
    scores = evaluate(model, task, loader, device, precision)
    where = data.root if isinstance(data, SegmentationSource) else data
    return SegmentationResult(
        str(where), part, len(samples), splits.classes, scores.compute(), tuple(scores.by_class())
    )


def load_segmenter(checkpoint: str | Path, backbone: str | None = None) -> tuple[UPerNet, About | None]:
    """A segmentation network in evaluation mode on the CPU, and what it knows of itself, where it is of a run.

    ``checkpoint`` is a run directory or a checkpoint of one, or any file that `upernet_from_checkpoint` takes, with
    ``backbone``.

    Raises:
        FileNotFoundError, ValueError: there is no such run or file, or it is no segmentation network.
    """
    path = Path(checkpoint)
    if path.is_dir() or (path.is_file() and about_of(path) is not None):
        return load_trained(path, task="segmentation")
    return upernet_from_checkpoint(path, backbone), None


def _inference_of(about: About | None) -> SegmentationInference | None:
    """How a run's validation looked at images."""
    return None if about is None else from_dict(about.config).segmentation.inference


def _targets(file: Path, out: Path) -> dict[str, Path]:
    return {kind: out / f"{file.stem}.{kind}.png" for kind in ("mask", "overlay", "legend")}


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
