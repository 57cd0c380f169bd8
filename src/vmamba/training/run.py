"""A training run from its config to its report, in a directory of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from .._extras import require
from .._files import write_text
from ..data import Preprocessing, Splits, check_batches, evaluation_batches, open_source, training_batches
from ..data.folder import Files
from ..data.loading import seed_generators
from ..data.sources import Samples
from ..models import load_checkpoint
from ..tasks import Classification, ClassificationScores
from .checkpoints import About, load_trained, make_model, read_checkpoint
from .config import Config, as_dict, from_dict, read_yaml, to_yaml
from .evaluation import evaluate
from .report import save_confusion_matrix, save_prediction_sheet

SHEET_IMAGES = 24
SAMPLE_IMAGES = 5
PART_NAMES = {"test": "test", "val": "validation"}


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to show. ``part`` says which images the metrics are of: "test" or "val"."""

    run_dir: Path
    part: str
    images: int
    metrics: dict[str, float]
    best_epoch: int
    checkpoint: Path
    confusion_png: Path
    predictions_png: Path
    sample_images: tuple[Path, ...]


def train(config: Config, run_dir: str | Path) -> Outcome:
    """Train a classifier as ``config`` says and write everything of the run under ``run_dir``.

    Raises:
        FileExistsError: ``run_dir`` already holds something.
        FileNotFoundError, ValueError, TypeError: data, model or settings do not fit; nothing was written then.
        FloatingPointError: the loss became infinite or NaN.
        OSError: a file could not be written.
        ModuleNotFoundError: the extra ``train`` is not installed.
    """
    run_dir = Path(run_dir)
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise FileExistsError(
            f"{run_dir} already exists: choose another directory with --out, or continue the run in it with "
            f"--resume {run_dir}"
        )
    prepared = _prepare(config)
    for folder in (run_dir, run_dir / "checkpoints"):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(to_yaml(config), run_dir / "config.yaml")
    write_text("".join(f"{name}\n" for name in prepared.splits.classes), run_dir / "classes.txt")
    return _fit_and_report(config, prepared, run_dir, resume=None)


def resume(run_dir: str | Path) -> Outcome:
    """Go on with the run in ``run_dir`` from its last checkpoint; the result is that of an uninterrupted run.

    Raises:
        FileNotFoundError: there is no run, or it was stopped before its first checkpoint.
        ValueError: the run is finished, or its data has changed since.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise FileNotFoundError(f"{run_dir} holds no run to resume: it has no config.yaml")
    last = run_dir / "checkpoints" / "last.ckpt"
    if not last.is_file():
        raise FileNotFoundError(
            f"the run in {run_dir} stopped before its first checkpoint; start it again with "
            f"`vmamba train --config {run_dir / 'config.yaml'} --out NEW_DIR`"
        )
    config = from_dict(read_yaml(run_dir / "config.yaml"))
    about = About.from_dict(read_checkpoint(last)["vmamba"])
    if about.epoch >= config.schedule.epochs:
        raise ValueError(f"the run in {run_dir} is finished: it has done its {config.schedule.epochs} epochs")
    prepared = _prepare(config)
    if prepared.splits.classes != about.classes:
        raise ValueError(
            f"{config.data.source} has other classes now than when the run in {run_dir} began: "
            f"{', '.join(sorted(set(prepared.splits.classes) ^ set(about.classes)))}"
        )
    return _fit_and_report(config, prepared, run_dir, resume=last)


def preprocessing_of(config: Config) -> Preprocessing:
    """What a model trained with ``config`` expects of its input."""
    data = config.data
    return Preprocessing(
        (data.image_size, data.image_size), data.interpolation, data.crop_pct, crop_mode=data.crop_mode
    )


@dataclass(frozen=True)
class _Prepared:
    """Everything that can fail because of a user's mistake, made before anything is written."""

    splits: Splits
    task: Classification
    model: nn.Module
    model_kwargs: dict[str, Any]
    machine: Any


def _prepare(config: Config) -> _Prepared:
    for module in ("lightning.pytorch", "matplotlib.figure", "tensorboard", "rich"):
        require(module, "train")
    from .lightning_engine import choose_machine, optimizer_of

    machine = choose_machine(config.run.device, config.run.precision)
    splits = open_source(
        config.data.source,
        val_fraction=config.data.val_fraction,
        split_seed=config.data.split_seed,
        on_unreadable=config.data.on_unreadable,
    )
    loss = config.loss
    task = Classification(len(splits.classes), loss.label_smoothing, loss.mixup, loss.cutmix)
    if task.mixes and (config.data.batch_size % 2 or len(splits.train) < config.data.batch_size):
        raise ValueError(
            f"mixup and CutMix need an even data.batch_size of at most the {len(splits.train)} training images, "
            f"not {config.data.batch_size}"
        )
    check_batches(
        [splits.train, splits.val],
        preprocessing_of(config),
        config.augment,
        in_memory=config.data.in_memory,
        longest=config.data.memory_size,
    )
    kwargs = {**config.model.kwargs, "num_classes": len(splits.classes)}
    if config.model.drop_path is not None:
        kwargs["drop_path_rate"] = config.model.drop_path
    seed_generators(config.run.seed)
    model = make_model(config.model.name, **kwargs)
    if config.model.weights is not None:
        load_checkpoint(model, config.model.weights, new_head=True)
    _try_model(model, config)
    optimizer_of(model, config)
    return _Prepared(splits, task, model, kwargs, machine)


def _try_model(model: nn.Module, config: Config) -> None:
    size = config.data.image_size
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"{config.model.name} does not take images of {size} x {size} px (data.image_size; some models need the "
            f"size in model.kwargs, too): {error}"
        ) from error


def _fit_and_report(config: Config, prepared: _Prepared, run_dir: Path, resume: Path | None) -> Outcome:
    from .lightning_engine import Recorder, TaskModule, fit

    splits, data = prepared.splits, config.data
    preprocessing = preprocessing_of(config)
    loading = {"batch_size": data.batch_size, "workers": data.workers}
    placing = {"in_memory": data.in_memory, "device": prepared.machine.device}
    train_batches = training_batches(
        splits.train,
        preprocessing,
        config.augment,
        seed=config.run.seed,
        longest=data.memory_size,
        **loading,
        **placing,
    )
    about = About(
        model=config.model.name,
        model_kwargs=prepared.model_kwargs,
        classes=splits.classes,
        display_names=splits.display_names,
        preprocessing=preprocessing,
        config=as_dict(config),
        epoch=0,
        metrics={},
    )
    resumed_at = About.from_dict(read_checkpoint(resume)["vmamba"]).epoch if resume else 0
    parameters = sum(p.numel() for p in prepared.model.parameters())
    print(
        f"vmamba {__version__}: {config.model.name} ({parameters / 1e6:.2f} M parameters) on {data.source}, "
        f"{len(splits.classes)} classes, {len(splits.train)} training and {len(splits.val)} validation images"
        f"{f', {len(splits.test)} test images' if splits.test else ''}; {data.image_size} px, {config.schedule.epochs} "
        f"epochs, {prepared.machine.device}, {prepared.machine.precision}"
        f"{f', resumed after epoch {resumed_at}' if resume else ''}\nrun directory: {run_dir}",
        flush=True,
    )
    with _cpu_threads(config.run.threads):
        fit(
            TaskModule(prepared.model.train(), prepared.task, config, len(train_batches)),
            Recorder(run_dir, about, config.schedule.epochs, resumed_at),
            train_batches,
            evaluation_batches(splits.val, preprocessing, **loading, **placing),
            prepared.machine,
            resume,
        )
        return _report(splits, prepared, run_dir, loading)


@contextlib.contextmanager
def _cpu_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _report(splits: Splits, prepared: _Prepared, run_dir: Path, loading: dict[str, int]) -> Outcome:
    part, samples = ("test", splits.test) if splits.test is not None else ("val", splits.val)
    checkpoint = run_dir / "checkpoints" / "best.ckpt"
    model, about = load_trained(checkpoint)
    batches = evaluation_batches(samples, about.preprocessing, **loading)
    scores = evaluate(model, prepared.task, batches, prepared.machine.device)
    confusion_png, predictions_png = run_dir / "confusion_matrix.png", run_dir / "predictions.png"
    save_confusion_matrix(scores.confusion(), splits.display_names, confusion_png)
    _draw_predictions(samples, scores, splits.display_names, PART_NAMES[part], predictions_png)
    return Outcome(
        run_dir=run_dir,
        part=part,
        images=len(samples),
        metrics=scores.compute(),
        best_epoch=about.epoch,
        checkpoint=checkpoint,
        confusion_png=confusion_png,
        predictions_png=predictions_png,
        sample_images=_sample_images(samples, run_dir),
    )


def _draw_predictions(
    samples: Samples, scores: ClassificationScores, names: tuple[str, ...], wording: str, path: Path
) -> None:
    """Up to half the sheet are wrong predictions, the rest right ones; both spread evenly over the data set."""
    labels, predicted = scores.labels, scores.predicted
    wrong = (labels != predicted).nonzero().flatten().tolist()
    right = (labels == predicted).nonzero().flatten().tolist()
    wrong_wanted = min(len(wrong), max(SHEET_IMAGES // 2, SHEET_IMAGES - len(right)))
    right_wanted = min(len(right), SHEET_IMAGES - wrong_wanted)
    shown = _spread(wrong, wrong_wanted) + _spread(right, right_wanted)
    save_prediction_sheet(
        [samples[i][0] for i in shown],
        [
            f"{names[predicted[i]]}" if predicted[i] == labels[i] else f"{names[predicted[i]]}, true {names[labels[i]]}"
            for i in shown
        ],
        [bool(predicted[i] == labels[i]) for i in shown],
        path,
        f"{len(wrong)} of {len(samples)} {wording} images wrong; {wrong_wanted} of them shown, then right ones",
    )


def _sample_images(samples: Samples, run_dir: Path) -> tuple[Path, ...]:
    """A few image files to try ``vmamba predict`` on; images that are no files yet are written into the run."""
    chosen = _spread(range(len(samples)), min(SAMPLE_IMAGES, len(samples)))
    if isinstance(samples, Files):
        return tuple(samples.path(i) for i in chosen)
    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    paths = []
    for i in chosen:
        image, label = samples[i]
        paths.append(folder / f"{samples.classes[label]}_{i}.png")
        image.save(paths[-1])
    return tuple(paths)


def _spread(items: Sequence[int], count: int) -> list[int]:
    return [items[i * len(items) // count] for i in range(count)]
