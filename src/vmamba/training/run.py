"""A training run from its config to its report, in a directory of its own."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
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
from ..tasks import Classification, ClassificationScores, Task
from .checkpoints import About, load_trained, make_model, read_checkpoint
from .config import Config, as_dict, from_dict, read_yaml, to_yaml
from .distributed import World, join_world
from .evaluation import check_image_size, evaluate
from .machine import Machine, choose_machine, cpu_threads
from .report import save_confusion_matrix, save_prediction_sheet, save_resources

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    # a function, for a callback's class needs Lightning, which `train` says how to install
    MakeCallbacks = Callable[[], Sequence[Callback]]

SHEET_IMAGES = 24
SAMPLE_IMAGES = 5
PART_NAMES = {"test": "test", "val": "validation"}
PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to show. ``part`` says which images the metrics are of: "test" or "val"."""

    run_dir: Path
    part: str
    images: int
    metrics: dict[str, float]
    best_epoch: int
    checkpoint: Path
    report: Path
    confusion_png: Path
    predictions_png: Path
    sample_images: tuple[Path, ...]


def train(config: Config, run_dir: str | Path | None = None, *, callbacks: MakeCallbacks = tuple) -> Outcome:
    """Train a classifier as ``config`` says and write everything of the run under ``run_dir``.

    None is ``runs/DATA-MODEL``, numbered where that is taken. Under torchrun all its processes train one model, the
    first of them writes, and all return the same. ``callbacks`` makes further callbacks of Lightning; the trainer's
    ``default_root_dir`` is the run directory.

    Raises:
        FileExistsError: ``run_dir`` already holds something.
        FileNotFoundError, ValueError, TypeError: data, model or settings do not fit; nothing was written then.
        FloatingPointError: the loss became infinite or NaN.
        OSError: a file could not be written.
        ModuleNotFoundError: the extra ``train`` is not installed.
    """
    machine = _machine_to_train_on(config)
    with join_world(machine.device) as world:
        return _start(config, machine, world, _new_run_dir(world, config, run_dir), callbacks)


def resume(run_dir: str | Path, *, callbacks: MakeCallbacks = tuple) -> Outcome:
    """Go on with the run in ``run_dir`` from its last checkpoint; the result is that of an uninterrupted run.

    A run that was stopped before its first checkpoint starts again, one that was stopped before its report writes it.
    ``callbacks`` are those of :func:`train`.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the run is finished, or its data has changed since.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise FileNotFoundError(f"{run_dir} holds no run to resume: it has no config.yaml")
    config = from_dict(read_yaml(run_dir / "config.yaml"))
    last = run_dir / "checkpoints" / "last.ckpt"
    about = About.from_dict(read_checkpoint(last)["vmamba"]) if last.is_file() else None
    if _is_finished(config, about) and (run_dir / "report" / "summary.md").is_file():
        raise ValueError(f"the run in {run_dir} is finished: it has done its {config.schedule.epochs} epochs")
    machine = _machine_to_train_on(config)
    with join_world(machine.device) as world:
        return _go_on(config, machine, world, run_dir, about, callbacks)


@dataclass(frozen=True)
class StepParts:
    """What a training step of a run is made of; the batches are those of a pass, on the CPU or, with
    ``data.in_memory``, on the device that trains."""

    model: nn.Module
    task: Task
    batches: Iterable[Any]
    optimizer: torch.optim.Optimizer
    machine: Machine


def step_parts(config: Config) -> StepParts:
    """Make what :func:`train` would train with, in one process, and write nothing. The model is on its device.

    Raises:
        FileNotFoundError, ValueError, TypeError: data, model or settings do not fit.
    """
    from .lightning_module import optimizer_of

    machine = _machine_to_train_on(config)
    prepared = _prepare(config, machine, World(), weights=True)
    model = prepared.model.train().to(machine.device)
    if config.run.grad_checkpointing:
        model.set_grad_checkpointing(True)
    batches = training_batches(
        prepared.splits.train,
        preprocessing_of(config),
        config.augment,
        batch_size=_pass_size(config, World()),
        workers=config.data.workers,
        seed=config.run.seed,
        in_memory=config.data.in_memory,
        longest=config.data.memory_size,
        device=machine.device,
        accumulate=config.run.accumulate,
    )
    return StepParts(model, prepared.task, batches, optimizer_of(model, config), machine)


def _start(config: Config, machine: Machine, world: World, run_dir: Path, callbacks: MakeCallbacks) -> Outcome:
    prepared = _prepare(config, machine, world, weights=True)
    if world.is_first:
        for folder in (run_dir, run_dir / "checkpoints"):
            folder.mkdir(parents=True, exist_ok=True)
        write_text("".join(f"{name}\n" for name in prepared.splits.classes), run_dir / "classes.txt")
        # last: where it is, there is a run to resume
        write_text(to_yaml(config), run_dir / "config.yaml")
    return _fit_and_report(config, prepared, run_dir, callbacks, resume=None)


def _go_on(
    config: Config, machine: Machine, world: World, run_dir: Path, about: About | None, callbacks: MakeCallbacks
) -> Outcome:
    """``about`` is what the last checkpoint says; None where there is none."""
    prepared = _prepare(config, machine, world, weights=about is None)
    if about is not None and prepared.splits.classes != about.classes:
        raise ValueError(
            f"{config.data.source} has other classes now than when the run in {run_dir} began: "
            f"{', '.join(sorted(set(prepared.splits.classes) ^ set(about.classes)))}"
        )
    if world.is_first:
        for unfinished in run_dir.rglob(".*.writing-*"):  # of a process that was killed while it wrote
            unfinished.unlink()
    if _is_finished(config, about):
        return _report(config, prepared, run_dir)
    last = run_dir / "checkpoints" / "last.ckpt"
    return _fit_and_report(config, prepared, run_dir, callbacks, resume=last if about is not None else None)


def _is_finished(config: Config, about: About | None) -> bool:
    return about is not None and about.epoch >= config.schedule.epochs


def preprocessing_of(config: Config) -> Preprocessing:
    """What a model trained with ``config`` expects of its input."""
    data = config.data
    return Preprocessing(
        (data.image_size, data.image_size), data.interpolation, data.crop_pct, crop_mode=data.crop_mode
    )


def _machine_to_train_on(config: Config) -> Machine:
    for module in ("lightning.pytorch", "matplotlib.figure", "tensorboard", "rich"):
        require(module, "train")
    return choose_machine(config.run.device, config.run.precision)


def _new_run_dir(world: World, config: Config, wanted: str | Path | None) -> Path:
    """A directory that is still free, the same one in every process."""
    stem = Path("runs") / f"{Path(config.data.source).resolve().name}-{config.model.name}"
    run_dir = stem if wanted is None else Path(wanted)
    number = 1
    while wanted is None and run_dir.exists():
        number += 1
        run_dir = stem.with_name(f"{stem.name}-{number}")
    taken = run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir()))
    # the first process decides, since the directory may be on a disk that the others do not see
    run_dir, taken = world.from_first((run_dir, taken))
    if taken:
        raise FileExistsError(
            f"{run_dir} already exists: choose another directory with --out, or continue the run in it with "
            f"--resume {run_dir}"
        )
    return run_dir


@dataclass(frozen=True)
class _Prepared:
    """Everything that can fail because of a user's mistake, made before anything is written."""

    splits: Splits
    task: Classification
    model: nn.Module
    model_kwargs: dict[str, Any]
    machine: Machine
    world: World


def _prepare(config: Config, machine: Machine, world: World, *, weights: bool) -> _Prepared:
    from .lightning_module import optimizer_of

    splits = open_source(
        config.data.source,
        val_fraction=config.data.val_fraction,
        split_seed=config.data.split_seed,
        on_unreadable=config.data.on_unreadable,
    )
    loss = config.loss
    task = Classification(
        len(splits.classes), loss.label_smoothing, loss.mixup, loss.cutmix, loss.mix_prob, loss.mix_switch
    )
    _check_batch_size(config, world, task, splits)
    _check_strategy(config, machine)
    check_batches(
        [splits.train, splits.val],
        preprocessing_of(config),
        config.augment,
        in_memory=config.data.in_memory,
        longest=config.data.memory_size,
        processes=world.local_size,
    )
    kwargs = {**config.model.kwargs, "num_classes": len(splits.classes)}
    if config.model.drop_path is not None:
        kwargs["drop_path_rate"] = config.model.drop_path
    seed_generators(config.run.seed)
    model = _make_model(config, kwargs, weights)
    if config.run.grad_checkpointing and not hasattr(model, "set_grad_checkpointing"):
        raise ValueError(f"{config.model.name} cannot do gradient checkpointing: set run.grad_checkpointing=false")
    check_image_size(
        model,
        config.model.name,
        preprocessing_of(config).image_size,
        " (data.image_size; some models need the size in model.kwargs, too)",
    )
    optimizer_of(model, config)
    return _Prepared(splits, task, model, kwargs, machine, world)


def _pass_size(config: Config, world: World) -> int:
    """How many images a process takes at once."""
    return config.data.batch_size // (world.size * config.run.accumulate)


def _check_strategy(config: Config, machine: Machine) -> None:
    if config.run.strategy == "fsdp" and machine.precision == "fp16":
        raise ValueError("run.strategy=fsdp does not go with fp16, whose scaler looks at whole gradients: use bf16")


def _check_batch_size(config: Config, world: World, task: Classification, splits: Splits) -> None:
    size, parts = config.data.batch_size, world.size * config.run.accumulate
    if size % parts:
        raise ValueError(
            f"data.batch_size is that of a whole step: {world.size} processes times run.accumulate "
            f"{config.run.accumulate} must divide it, and {parts} does not divide {size}"
        )
    images = len(splits.train)
    if task.mixes and (size // parts % 2 or images < size):
        raise ValueError(
            f"mixup and CutMix need an even number of images in a pass and a data.batch_size of at most the {images} "
            f"training images, not {size}{f' in {parts} passes' if parts > 1 else ''}"
        )
    if parts > 1 and images < size:
        raise ValueError(f"data.batch_size {size} is more than the {images} training images: make it smaller")
    if len(splits.val) < world.size:
        raise ValueError(f"{len(splits.val)} validation images are too few for {world.size} processes")


def _make_model(config: Config, kwargs: dict[str, Any], weights: bool) -> nn.Module:
    name, source = config.model.name, config.model.weights if weights else None
    if source == PRETRAINED:
        if timm.is_model(name) and not timm.models.is_model_pretrained(name):
            raise ValueError(f"there are no pretrained weights of {name}: name a file in model.weights (--weights)")
        return make_model(name, pretrained=True, **kwargs)
    model = make_model(name, **kwargs)
    if source is not None:
        load_checkpoint(model, source, new_head=True)
    return model


def _fit_and_report(
    config: Config, prepared: _Prepared, run_dir: Path, callbacks: MakeCallbacks, resume: Path | None
) -> Outcome:
    from .lightning_engine import fit
    from .lightning_module import TaskModule
    from .recorder import Recorder

    splits, data, world = prepared.splits, config.data, prepared.world
    preprocessing = preprocessing_of(config)
    share = {"rank": world.rank, "world": world.size, "batch_size": _pass_size(config, world), "workers": data.workers}
    placing = {"in_memory": data.in_memory, "device": prepared.machine.device}
    train_batches = training_batches(
        splits.train,
        preprocessing,
        config.augment,
        seed=config.run.seed,
        longest=data.memory_size,
        accumulate=config.run.accumulate,
        **share,
        **placing,
    )
    val_batches = evaluation_batches(splits.val, preprocessing, **share, **placing)
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
    finished = step = 0
    if resume is not None:
        checkpoint = read_checkpoint(resume)
        finished, step = About.from_dict(checkpoint["vmamba"]).epoch, checkpoint["global_step"]
    if world.is_first:
        print(_describe(config, prepared, finished, step), f"run directory: {run_dir}", sep="\n", flush=True)
    with cpu_threads(config.run.threads):
        module = TaskModule(
            prepared.model.train(), prepared.task, config, len(train_batches) // config.run.accumulate, world
        )
        recorder = Recorder(
            run_dir,
            about,
            machine=prepared.machine,
            world=world,
            images_per_step=min(data.batch_size, len(splits.train)),
            finished_epochs=finished,
        )
        fit(module, recorder, train_batches, val_batches, prepared.machine, resume, callbacks())
        return _report(config, prepared, run_dir)


def _describe(config: Config, prepared: _Prepared, finished: int, step: int) -> str:
    splits, world = prepared.splits, prepared.world
    parameters = sum(p.numel() for p in prepared.model.parameters())
    test = f", {len(splits.test)} test images" if splits.test else ""
    processes = f" x {world.size} processes" if world.size > 1 else ""
    resumed = f", resumed in epoch {finished + 1} after step {step}" if step else ""
    return (
        f"vmamba {__version__}: {config.model.name} ({parameters / 1e6:.2f} M parameters) on {config.data.source}, "
        f"{len(splits.classes)} classes, {len(splits.train)} training and {len(splits.val)} validation images{test}; "
        f"{config.data.image_size} px, {config.schedule.epochs} epochs, {prepared.machine.device}{processes}, "
        f"{prepared.machine.precision}{resumed}"
    )


def _report(config: Config, prepared: _Prepared, run_dir: Path) -> Outcome:
    """The first process measures the best weights and writes the report; the others wait for it."""
    outcome = _write_report(config, prepared, run_dir) if prepared.world.is_first else None
    return prepared.world.from_first(outcome)


def _write_report(config: Config, prepared: _Prepared, run_dir: Path) -> Outcome:
    from .summary import write_report

    splits, machine = prepared.splits, prepared.machine
    part, samples = ("test", splits.test) if splits.test is not None else ("val", splits.val)
    checkpoint = run_dir / "checkpoints" / "best.ckpt"
    model, about = load_trained(checkpoint)
    batches = evaluation_batches(
        samples,
        about.preprocessing,
        batch_size=_pass_size(config, prepared.world),
        workers=config.data.workers,
    )
    scores = evaluate(model, prepared.task, batches, machine.device, machine.precision)
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    confusion_png, predictions_png = folder / "confusion_matrix.png", folder / "predictions.png"
    save_confusion_matrix(scores.confusion(), splits.display_names, confusion_png)
    _draw_predictions(samples, scores, splits.display_names, PART_NAMES[part], predictions_png)
    pictures = {confusion_png.name: "Confusion matrix", predictions_png.name: "Predictions"}
    if save_resources(run_dir / "resources.csv", folder / "resources.png"):  # of a watchdog
        pictures["resources.png"] = "Memory and utilisation"
    metrics = scores.compute()
    report = write_report(
        folder,
        config,
        metrics_csv=run_dir / "metrics.csv",
        result=metrics,
        result_of=PART_NAMES[part],
        images=len(samples),
        best_epoch=about.epoch,
        averaged=about.averaged,
        hardware=_hardware(machine, prepared.world),
        pictures=pictures,
    )
    return Outcome(
        run_dir=run_dir,
        part=part,
        images=len(samples),
        metrics=metrics,
        best_epoch=about.epoch,
        checkpoint=checkpoint,
        report=report,
        confusion_png=confusion_png,
        predictions_png=predictions_png,
        sample_images=_sample_images(samples, run_dir),
    )


def _hardware(machine: Machine, world: World) -> str:
    if machine.device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        where = f"{machine.device} ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"
    return f"{f'{world.size} x ' if world.size > 1 else ''}{where}, {machine.precision}"


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
