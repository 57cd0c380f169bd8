"""Trained models at work on files: evaluation of a checkpoint, predictions for images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from .._devices import choose_device
from ..data import evaluation_batches, list_images, open_labelled, open_source, read_image
from ..data.sources import DIGITS, Samples
from ..tasks import Classification
from .checkpoints import About, checkpoint_file, load_trained
from .evaluation import check_image_size, evaluate, predict
from .report import save_prediction_sheet


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics ("top1" and "top5" in percent, "loss") of a checkpoint on ``images`` images of ``data``.

    ``published`` holds what is published of the released weights on ImageNet-1K, for files of bare weights with its
    1,000 classes; otherwise nothing.
    """

    model: str
    checkpoint: Path
    data: str
    images: int
    metrics: dict[str, float]
    published: dict[str, float]


@dataclass(frozen=True)
class Predictions:
    """For every image its classes as (name to show, probability), the most probable first."""

    model: str
    checkpoint: Path
    predictions: tuple[tuple[Path, tuple[tuple[str, float], ...]], ...]


def evaluate_checkpoint(
    checkpoint: str | Path,
    *,
    data: str | None = None,
    model_name: str | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    image_size: int | None = None,
    crop_pct: float | None = None,
    precision: str = "fp32",
) -> EvaluationResult:
    """Measure a run or checkpoint on ``data``, or on the images its training held out when that is None.

    ``image_size`` and ``crop_pct`` None are those it was trained for. ``precision`` as in :func:`evaluate`.

    Raises:
        FileNotFoundError, ValueError: checkpoint, data or device are missing or do not fit together.
    """
    device = choose_device(device)
    path = checkpoint_file(checkpoint)
    model, about = load_trained(path, model_name, task="classification")
    preprocessing = about.preprocessing.at(image_size, crop_pct)
    check_image_size(model, about.model, preprocessing.image_size)
    description, samples = _labelled_samples(about, data)
    batches = evaluation_batches(samples, preprocessing, batch_size=batch_size, workers=workers)
    scores = evaluate(model, Classification(len(about.classes)), batches, device, precision)
    published = _published(model) if model_name is not None else {}
    return EvaluationResult(about.model, path, description, len(samples), scores.compute(), published)


def predict_files(
    checkpoint: str | Path,
    images: Sequence[str | Path],
    *,
    model_name: str | None = None,
    top_k: int = 5,
    device: str = "auto",
    sheet: str | Path | None = None,
) -> Predictions:
    """Classify image files, and the images directly in the folders, among ``images``; ``sheet`` is a PNG to draw.

    Raises:
        FileNotFoundError, ValueError: checkpoint, device or an image are missing or damaged.
    """
    device = choose_device(device)
    files = list_images(images)
    path = checkpoint_file(checkpoint)
    model, about = load_trained(path, model_name, task="classification")
    ranked = predict(model, about.preprocessing, files, top_k=top_k, device=device)
    named = tuple(tuple((about.display_names[index], share) for index, share in row) for row in ranked)
    if sheet is not None:
        titles = [
            f"{_short(file.name)}\n{row[0][0]} {100 * row[0][1]:.0f} %" for file, row in zip(files, named, strict=True)
        ]
        pictures = [read_image(file) for file in files]
        save_prediction_sheet(pictures, titles, [None] * len(files), Path(sheet), f"{about.model}: most probable class")
    return Predictions(about.model, path, tuple(zip(files, named, strict=True)))


def newest_run(folder: str | Path) -> Path:
    """The run directory under ``folder`` whose checkpoint was written last.

    Raises:
        FileNotFoundError: there is none.
    """
    checkpoints = list(Path(folder).glob("*/checkpoints/best.ckpt"))
    if not checkpoints:
        raise FileNotFoundError(f"no trained run under {folder}/: name one with --checkpoint, or run `vmamba train`")
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent.parent


def _published(model: nn.Module) -> dict[str, float]:
    notes = (model.pretrained_cfg.get("notes") or ()) if model.num_classes == 1000 else ()
    words = [note.split() for note in notes if note.startswith("imagenet1k ")]
    return {name: float(value) for _, name, value in words}


def _labelled_samples(about: About, data: str | None) -> tuple[str, Samples]:
    trained_on = about.config.get("data", {})
    source = trained_on.get("source")
    if data is None and source is None:
        raise ValueError("the checkpoint does not say what it was trained on: name labelled images with --data")
    same = data is None or data == source
    if not same and source not in (None, DIGITS):
        same = Path(data).resolve() == Path(source).resolve()
    if not same:
        return data, open_labelled(data, about.classes)
    splits = open_source(
        source,
        val_fraction=trained_on["val_fraction"],
        split_seed=trained_on["split_seed"],
        on_unreadable=trained_on["on_unreadable"],
    )
    if splits.classes != about.classes:
        raise ValueError(f"{source} has other classes now than when the model was trained on it")
    if splits.test is not None:
        return f"{source} (test images)", splits.test
    return f"{source} (validation images)", splits.val


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
